"""The progress of a run and its result."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from train.data.inputs import Inputs
from train.engine.config import Resolved
from train.engine.model import TrainState, count_parameters, variables_of


def headline(config: Resolved, model: nn.Module, inputs: Inputs) -> str:
    """The device and the network in one line; nothing is compiled."""
    image = jnp.zeros((1, inputs.image_size, inputs.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    total, attention = count_parameters(shapes["params"])
    device = inputs.mesh.devices.flat[0].device_kind
    network = f"ResNet-{config.depth}" + (f" + {config.block}" if attention else "")
    return (
        f"jax {jax.__version__} · {inputs.mesh.size} × {device} · {network}, "
        f"{total:,} parameters · compiling…"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a run."""

    config: Resolved
    model: nn.Module
    state: TrainState
    history: list[dict[str, float]]
    """One entry for each line of metrics.jsonl."""
    timing: list[dict[str, Any]]
    """One entry for each line of timing.jsonl."""

    @property
    def variables(self) -> dict[str, Any]:
        """The trained variables of ``model``."""
        return variables_of(self.state)

    def summary(self) -> str:
        """The network and its test accuracy, in two lines."""
        config, last = self.config, self.history[-1]
        total, attention = count_parameters(self.state.params)
        minutes, seconds = divmod(round(sum(t["seconds"] for t in self.timing)), 60)
        return (
            f"ResNet-{config.depth}, attention {config.block}, on "
            f"{config.dataset}: {total:,} parameters ({attention:,} of them "
            f"attention),\ntest accuracy {last['test_accuracy']:.2%} after "
            f"{len(self.history)} epoch{'s' if len(self.history) > 1 else ''} in "
            f"{minutes} min {seconds} s."
        )


@dataclasses.dataclass
class Progress:
    """The state of a run on which its remaining steps depend."""

    state: TrainState
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the completed steps of the current epoch."""
    accuracies: list[float] = dataclasses.field(default_factory=list)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    timing: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    """Of the current epoch, before it was interrupted."""
