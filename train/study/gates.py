"""Spatial gates of trained networks: which blocks have them, and where they are open.

The imports of jax are inside the functions, so that commands answer before it is there.
"""

import contextlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.study.logs import GATES

if TYPE_CHECKING:
    import numpy as np
    from flax import linen as nn
    from matplotlib.figure import Figure

    from train.data.inputs import Inputs
    from train.engine.loop import Images, Run

SHOWN_IMAGES = 8
SPATIAL_GATE = "spatial_gate"


@cache
def has_spatial_gate(name: str) -> bool:
    """Whether a block, named as ``Config.block`` does, sows a spatial gate."""
    import jax
    import jax.numpy as jnp

    from train.engine.attention import attention_fields, check_attention, make_attention
    from train.engine.config import Config

    config = Config(**attention_fields(name))
    try:
        check_attention(config)
    except ValueError:  # A block that is no longer there.
        return False
    make = make_attention(config, train=False)
    if make is None:
        return False
    init = partial(make().init, mutable=True)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 16)))
    paths, _ = jax.tree_util.tree_flatten_with_path(variables.get("intermediates", {}))
    return any(jax.tree_util.DictKey(SPATIAL_GATE) in path for path, _ in paths)


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

    data = inputs.test_data
    item, _ = next(inputs.test_batches())
    normalized = inputs.test_batch(data, item)[0][:count]
    shown = np.asarray((normalized * data.std + data.mean) * 255)
    gates: dict[str, np.ndarray] = {}
    if model.attention is not None:
        read = jax.jit(partial(inspect.attention_maps, model))
        # The variables may lie on several devices; for a few images one will do.
        maps = read(devices.to_host(variables), normalized)
        last = [f"stage{i}_block{blocks}" for i, blocks in enumerate(model.stages, 1)]
        for path, gate in maps.items():
            block, *_, kind = path.split("/")
            if kind == SPATIAL_GATE and block in last:
                gates[block] = np.asarray(gate[..., 0], np.float32)
    return shown.round().astype(np.uint8), gates


def save_gates(folder: Path, run: "Run", images: "Images") -> None:
    """Leaves ``gates.npz`` in a finished run's folder, if its block has such gates."""
    import numpy as np

    from train.engine import devices, loop

    path = folder / GATES
    if path.exists() or not has_spatial_gate(run.config.block):
        return
    inputs = loop.make_inputs(run.config, images, devices.make_mesh(1))
    with contextlib.closing(inputs):
        shown, gates = spatial_gates(run.model, run.variables, inputs)
    arrays: dict[str, Any] = gates | {"images": shown}
    # Under its name only when it is whole: a file that is there is never made again.
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def plot(
    images: "np.ndarray",
    gates: Mapping[str, "np.ndarray"],
    *,
    limits: tuple[float, float] = (0.0, 1.0),
) -> "Figure":
    """Lays spatial gates over images, a column for each name.

    Args:
      images: ``(N, H, W, 3)`` uint8.
      gates: by name, ``(N, h, w)``.
      limits: gates with the darkest and the lightest color (default: (0.0, 1.0)).
    """
    import numpy as np

    from flax_attn import inspect
    from train.study import plots

    overlays = {
        plots.title_of(name, maps): inspect.overlay(images, maps, limits=limits)
        for name, maps in gates.items()
    }
    colors = inspect.color_map(np.linspace(0, 1, 256))
    return plots.plot_overlays(images, overlays, colors, limits)
