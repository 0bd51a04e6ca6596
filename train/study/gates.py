"""Where trained networks attend: their spatial gates and Grad-CAM over test images.

jax is imported inside the functions, so that commands start fast.
"""

import contextlib
import itertools
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.study.logs import GATES

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import linen as nn

    from train.data.inputs import Inputs
    from train.engine.config import Resolved
    from train.engine.progress import Run
    from train.engine.setup import Images

SHOWN_IMAGES = 8
GATE = "_gate"
"""The end of a gate's name; what a block adds to the map is none."""
SPATIAL_GATE = f"spatial{GATE}"
QUANTILES = (0.05, 0.5, 0.95)


@cache
def gates_of(name: str) -> frozenset[str]:
    """The kinds of gates that a block, named as ``Config.block`` does, sows."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from train.engine.attention import attention_fields, check_attention, make_attention
    from train.engine.config import Config

    config = Config(**attention_fields(name))
    try:
        check_attention(config)
    except ValueError:  # A block of another version.
        return frozenset()
    make = make_attention(config, train=False)
    if make is None:
        return frozenset()
    init = partial(make().init, mutable=True)
    # A width that the presets for one network have too.
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 256)))
    sown = flatten_dict(variables.get("intermediates", {}))
    return frozenset(path[-1] for path in sown if path[-1].endswith(GATE))


def has_spatial_gate(name: str) -> bool:
    """Whether a block, named as ``Config.block`` does, sows a spatial gate."""
    return SPATIAL_GATE in gates_of(name)


def spatial_gates(
    model: "nn.Module", variables: Any, inputs: "Inputs", count: int = SHOWN_IMAGES
) -> tuple["np.ndarray", dict[str, "np.ndarray"]]:
    """The spatial gates of each stage's last block over the first test images.

    Args:
      model: a residual network of ``flax_attn.resnet``.
      variables: its variables.
      inputs: what it was trained on, on one device.
      count: how many images; at most a batch (default: 8).

    Returns:
      The images, ``(count, H, W, 3)`` uint8, and by the name of the residual block the
      gates ``(count, h, w)`` float32; without spatial attention there are none.
    """
    import jax
    import numpy as np

    from flax_attn import inspect
    from train.engine import devices

    normalized, _ = _first_images(inputs, count)
    data = inputs.test_data
    shown = np.asarray((normalized * data.std + data.mean) * 255)
    gates: dict[str, np.ndarray] = {}
    if model.attention is not None:
        read = jax.jit(partial(inspect.attention_maps, model))
        # The variables may be on several devices; a few images need only one.
        maps = read(devices.to_host(variables), normalized)
        last = [f"stage{i}_block{blocks}" for i, blocks in enumerate(model.stages, 1)]
        for path, gate in maps.items():
            block, *_, kind = path.split("/")
            if kind == SPATIAL_GATE and block in last:
                gates[block] = np.asarray(gate[..., 0], np.float32)
    return shown.round().astype(np.uint8), gates


def grad_cam(
    model: "nn.Module", variables: Any, inputs: "Inputs", count: int = SHOWN_IMAGES
) -> "np.ndarray":
    """Grad-CAM of the last block for the images of ``spatial_gates`` and their classes.

    Its arguments are those of ``spatial_gates``; the result is ``(count, h, w)``
    float32.
    """
    import jax
    import numpy as np

    from flax_attn import inspect
    from train.engine import devices

    normalized, labels = _first_images(inputs, count)
    layer = f"stage{len(model.stages)}_block{model.stages[-1]}"
    read = jax.jit(partial(inspect.grad_cam, model, layer=layer))
    cam = read(devices.to_host(variables), normalized, label=labels)
    return np.asarray(cam[..., 0], np.float32)


def gates_over_steps(
    config: "Resolved", images: "Images", steps: int
) -> dict[str, "np.ndarray"]:
    """How far gates are open before each of a run's first steps, and after the last.

    Trains the run again, which is deterministic, and writes nothing. The gates are
    those of each stage's last block over a batch of test images, normalized as in
    training, by the statistics of the batch.

    Args:
      config: of the run.
      images: that it was trained on.
      steps: how many steps, at most those of the run.

    Returns:
      By the path of a gate, such as ``stage1_block1/attention/spatial_gate``, its
      ``QUANTILES``, ``(steps + 1, 3)`` float32; without attention there are none.

    Raises:
      ValueError: the run has fewer steps.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax.traverse_util import flatten_dict
    from tqdm.auto import tqdm

    from train.engine import devices, loop, setup
    from train.engine.model import TrainState, variables_of

    inputs = setup.make_inputs(config, images, devices.make_mesh(1))
    with contextlib.closing(inputs):
        training = loop.Training(config, inputs)
        if steps > training.total:
            raise ValueError(
                f"`steps` must be at most {training.total}, those of the run with "
                f"attention {config.block}, got {steps}."
            )
        last = {
            f"stage{i}_block{blocks}"
            for i, blocks in enumerate(training.model.stages, 1)
        }
        # A batch that is padded would have other statistics.
        count = min(config.batch_size, inputs.test_size)
        shown, _ = _first_images(inputs, count)

        @jax.jit
        def read(state: TrainState) -> dict[str, jax.Array]:
            mutable = ["intermediates", "batch_stats"]
            _, sown = state.apply_fn(
                variables_of(state), shown, train=True, mutable=mutable
            )
            gates = flatten_dict(sown.get("intermediates", {}), sep="/")
            return {
                path: jnp.quantile(gate.astype(jnp.float32), jnp.array(QUANTILES))
                for path, (gate,) in gates.items()
                if path.split("/")[0] in last and path.endswith(GATE)
            }

        batches = (
            item
            for epoch in range(1, config.epochs + 1)
            for item in inputs.train_batches(epoch, 0, 1)
        )
        state = training.progress.state
        rows = [read(state)]
        for item in tqdm(itertools.islice(batches, steps), total=steps, unit="step"):
            state, _ = training.train_steps(
                state, inputs.data, training.augment_key, item
            )
            rows.append(read(state))
        return {path: np.stack([row[path] for row in rows]) for path in rows[0]}


def _first_images(inputs: "Inputs", count: int) -> tuple["jax.Array", "jax.Array"]:
    """The first test images, normalized, and their labels."""
    item, _ = next(inputs.test_batches())
    images, labels = inputs.test_batch(inputs.test_data, item)
    return images[:count], labels[:count]


def save_gates(folder: Path, run: "Run", images: "Images") -> None:
    """Writes ``gates.npz`` to a finished run's folder, if its block has such gates."""
    import numpy as np

    from train.engine import devices, setup

    path = folder / GATES
    if path.exists() or not has_spatial_gate(run.config.block):
        return
    inputs = setup.make_inputs(run.config, images, devices.make_mesh(1))
    with contextlib.closing(inputs):
        shown, gates = spatial_gates(run.model, run.variables, inputs)
    arrays: dict[str, Any] = gates | {"images": shown}
    # Renamed when complete, since an existing file is kept.
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)
