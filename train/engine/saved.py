"""The content of a checkpoint, and how to read it without training."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from train.data.inputs import Inputs
from train.engine import devices, workdir
from train.engine.checkpoint import Checkpoints
from train.engine.config import Resolved
from train.engine.model import (
    TrainState,
    make_model,
    make_optimizer,
    make_schedule,
    make_state,
)


def last_saved(
    config: Resolved, inputs: Inputs, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of the run in ``folder`` and its variables at the last checkpoint.

    Nothing is trained, and no file of the run is written.

    Args:
      config: of the run.
      inputs: of the run; only their shapes are used.
      folder: its workdir.

    Raises:
      ValueError: there is no checkpoint, or another process uses the folder.
      CheckpointError: all of them are damaged.
    """
    template = saved_template(config, inputs)
    with (
        workdir.locked(folder, config),
        contextlib.closing(
            Checkpoints(folder / workdir.CHECKPOINTS, config.keep, devices.log)
        ) as checkpoints,
    ):
        found = checkpoints.restore(template)
    if found is None:
        raise ValueError(f"`workdir` {folder} holds no checkpoint; train there first.")
    tree, _ = found
    model = make_model(config, inputs.num_classes)
    return model, {name: tree[name] for name in ("params", "batch_stats")}


def saved_template(config: Resolved, inputs: Inputs) -> dict[str, Any]:
    """Zeros in the shapes and dtypes of a checkpoint of ``config``."""
    model = make_model(config, inputs.num_classes)
    total = config.epochs * inputs.steps_per_epoch
    optimizer = make_optimizer(
        config, make_schedule(config, inputs.steps_per_epoch, total)
    )

    def tree() -> dict[str, Any]:
        key = jax.random.key(config.seed)
        return saved_tree(make_state(model, optimizer, key, inputs.image_size), key)

    shapes = jax.eval_shape(tree)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def saved_tree(state: TrainState, key: jax.Array) -> dict[str, Any]:
    """The arrays of a checkpoint."""
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "key": jax.random.key_data(key),
    }
