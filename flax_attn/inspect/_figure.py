"""``plot``: images, their spatial gates and Grad-CAM side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_attn.inspect._pictures import (
    LEAST_SPREAD,
    check_limits,
    color_map,
    is_constant,
    overlay,
    spatial_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_INCHES = 1.3


def plot(
    images: Any,
    gates: Mapping[str, Any],
    *,
    cams: Mapping[str, Any] | None = None,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Draws each image next to its maps, alone and as overlays.

    Each name has two columns: the map, with a color bar below, and its ``overlay``. A
    map that varies by less than 0.05 over an image is labeled as constant and drawn
    without the image::

      >>> images = np.zeros((2, 32, 32, 3), np.uint8)
      >>> figure = plot(images, {"stage1": np.ones((2, 8, 8, 1))})
      >>> [text.get_text() for text in figure.axes[2].texts]
      ['constant at 1.00']

    Args:
      images: ``(N, H, W, 3)``, uint8 or float within [0, 1].
      gates: spatial gates by name, ``(N, h, w)`` or ``(N, h, w, 1)``.
      cams: results of ``grad_cam`` by name, with the same shapes as gates. Each is
        divided by its maximum over the image (default: none).
      limits: gate values of the darkest and the lightest color (default: the minimum
        and the maximum for each name).

    Returns:
      A matplotlib figure, made without pyplot; notebooks display it, and ``savefig``
      saves it.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: an argument has an invalid shape, dtype or range, or there is no map.
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib, which is not installed: pip install matplotlib."
        ) from error

    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"`images` must have shape (N, H, W, 3), got {images.shape}; pass "
            "image[None] for one."
        )
    if limits is not None:
        check_limits(limits)
    for field, named in (("gates", gates), ("cams", cams or {})):
        if not isinstance(named, Mapping):
            raise ValueError(
                f"`{field}` must be a dict from name to map, got "
                f"{type(named).__name__}; pass e.g. {{'stage1': gate}}."
            )
    columns = []
    for name, given in gates.items():
        maps = spatial_maps(given, images.shape[:3], f"gates[{name!r}]")
        columns.append((name, maps, limits or _own_limits(maps), "spatial gate"))
    for name, given in (cams or {}).items():
        maps = _scaled(spatial_maps(given, images.shape[:3], f"cams[{name!r}]"))
        columns.append((name, maps, (0.0, 1.0), "Grad-CAM / its maximum"))
    if not columns:
        raise ValueError(
            "`gates` must have at least one map, got none; pass the spatial gates that "
            "attention_maps returns."
        )

    width = PANEL_INCHES * (1 + 2 * len(columns)) + 0.4
    size = (width, PANEL_INCHES * len(images) + 0.8)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))
    axes = figure.subplots(len(images), 1 + 2 * len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("image", fontsize=8)
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(image)
    colors = ListedColormap(color_map(np.linspace(0, 1, 256)) / 255)
    for i, (name, maps, (low, high), label) in enumerate(columns):
        pair = axes[:, 2 * i + 1 : 2 * i + 3]
        shape = "×".join(map(str, maps.shape[1:]))
        # Matplotlib reads dollar signs as mathematics.
        title = f"{name}\n{shape}".replace("$", r"\$")
        pair[0, 0].set_title(title, fontsize=8)
        pair[0, 1].set_title("overlay", fontsize=8)
        pictures = overlay(images, maps[..., None], limits=(low, high))
        for (alone, under), map_, picture in zip(pair, maps, pictures, strict=True):
            drawn = alone.imshow(
                map_, cmap=colors, vmin=low, vmax=high, interpolation="nearest"
            )
            under.imshow(picture)
            if is_constant(map_):
                under.text(
                    *(0.5, 0.5, f"constant at {map_.mean():.2f}"),
                    transform=under.transAxes,
                    ha="center",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
                )
        bar = figure.colorbar(drawn, ax=pair, location="bottom", shrink=0.8, aspect=30)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(label, fontsize=7)
    return figure


def _own_limits(maps: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest gate, widened to a minimal range of colors."""
    low, high = float(maps.min()), float(maps.max())
    margin = max(LEAST_SPREAD - (high - low), 0) / 2
    return low - margin, high + margin


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Each map divided by its maximum; zeros stay zeros."""
    most = maps.max((-2, -1), keepdims=True)
    return maps / np.where(most > 0, most, 1)
