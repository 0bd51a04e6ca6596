"""Spatial gates of trained networks: which blocks have them, and a picture.

jax is imported inside the functions, so that commands start fast.
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
# Gates that differ by less over an image are called constant.
LEAST_SPREAD = 0.05
GRAY = 128


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
    except ValueError:  # A block of another version.
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
        # The variables may be on several devices; a few images need only one.
        maps = read(devices.to_host(variables), normalized)
        last = [f"stage{i}_block{blocks}" for i, blocks in enumerate(model.stages, 1)]
        for path, gate in maps.items():
            block, *_, kind = path.split("/")
            if kind == SPATIAL_GATE and block in last:
                gates[block] = np.asarray(gate[..., 0], np.float32)
    return shown.round().astype(np.uint8), gates


def save_gates(folder: Path, run: "Run", images: "Images") -> None:
    """Writes ``gates.npz`` to a finished run's folder, if its block has such gates."""
    import numpy as np

    from train.engine import devices, loop

    path = folder / GATES
    if path.exists() or not has_spatial_gate(run.config.block):
        return
    inputs = loop.make_inputs(run.config, images, devices.make_mesh(1))
    with contextlib.closing(inputs):
        shown, gates = spatial_gates(run.model, run.variables, inputs)
    arrays: dict[str, Any] = gates | {"images": shown}
    # Renamed when complete, since an existing file is kept.
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def plot(
    images: "np.ndarray",
    gates: Mapping[str, "np.ndarray"],
    *,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Draws images and, beside each, its spatial gates alone and the image under them.

    Each name has two columns: the gates, whose colors the bar below explains, and the
    image faded to gray where the gate is closed. A gate whose spread over an image is
    below 0.05 is called constant, and nothing of the image is shown under it.

    Args:
      images: ``(N, H, W, 3)`` uint8.
      gates: by name, ``(N, h, w)``.
      limits: gates with the first and the last color; by default those of each name
        are its lowest and its highest.
    """
    from train.study.plots import new_figure

    rows, columns = len(images), 1 + 2 * len(gates)
    figure = new_figure(1.3 * columns + 0.4, 1.3 * rows + 1)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("image", fontsize=8)
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(image)
    for i, (name, maps) in enumerate(gates.items()):
        pair = axes[:, 2 * i + 1 : 2 * i + 3]
        low, high = limits or _own_limits(maps)
        size = "×".join(map(str, maps.shape[1:3]))
        for axis, title in zip(
            pair[0], (f"{name}\n{size}", "image under it"), strict=True
        ):
            axis.set_title(title, fontsize=8)
        for (alone, under), image, gate in zip(pair, images, maps, strict=True):
            drawn = alone.imshow(
                gate, cmap="viridis", vmin=low, vmax=high, interpolation="nearest"
            )
            under.imshow(fade(image, gate, (low, high)))
            if is_constant(gate):
                under.text(
                    *(0.5, 0.5, f"constant at {gate.mean():.2f}"),
                    transform=under.transAxes,
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        bar = figure.colorbar(drawn, ax=pair, location="bottom", shrink=0.8, aspect=30)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("spatial gate", fontsize=7)
    return figure


def is_constant(gate: "np.ndarray") -> bool:
    """Whether a gate varies too little over its image to mean anything."""
    return float(gate.max() - gate.min()) < LEAST_SPREAD


def _own_limits(maps: "np.ndarray") -> tuple[float, float]:
    """The lowest and the highest gate, widened to a minimal range of colors."""
    low, high = float(maps.min()), float(maps.max())
    margin = max(LEAST_SPREAD - (high - low), 0) / 2
    return low - margin, high + margin


def fade(
    image: "np.ndarray", gate: "np.ndarray", limits: tuple[float, float]
) -> "np.ndarray":
    """The image under its gate: unchanged where it is open, gray where it is closed.

    A constant gate does not show where the network attends, so all is gray::

      >>> import numpy as np
      >>> image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
      >>> fade(image, np.array([[0.2, 0.8]]), (0.2, 0.8))[..., 0].tolist()
      [[128, 255]]
      >>> fade(image, np.array([[0.5, 0.5]]), (0.2, 0.8))[..., 0].tolist()
      [[128, 128]]

    Args:
      image: ``(H, W, 3)`` uint8.
      gate: ``(h, w)``.
      limits: the gates that hide and show the image completely.

    Returns:
      ``(H, W, 3)`` uint8.
    """
    import numpy as np

    low, high = limits
    share = np.clip((gate.astype(np.float64) - low) / (high - low), 0, 1)
    if is_constant(gate):
        share = np.zeros_like(share)
    # Each pixel gets the gate at its center, as in the plot of the gate.
    at = [
        np.arange(size) * cells // size
        for size, cells in zip(image.shape, gate.shape, strict=False)
    ]
    share = share[np.ix_(*at)][..., None]
    return np.rint(GRAY + share * (image - float(GRAY))).astype(np.uint8)
