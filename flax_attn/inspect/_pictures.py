"""``overlay`` and ``color_map``: a map, such as a spatial gate, over its image."""

import math
from typing import Any

import jax
import numpy as np

# Value, red, green, blue. From dark to light, so that it can be read in gray too.
_COLORS = np.array(
    [
        (0.00, 8, 8, 38),
        (0.25, 86, 24, 118),
        (0.50, 196, 48, 92),
        (0.75, 248, 140, 56),
        (1.00, 252, 244, 176),
    ]
)


# Gates that differ by less over an image are drawn as constant.
LEAST_SPREAD = 0.05


def overlay(
    image: Any,
    gate: Any,
    *,
    alpha: float = 0.6,
    limits: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Draws a spatial gate over its image, from dark (closed) to light (open).

    The image is visible only where the gate is open, so bright pixels cannot be
    mistaken for open gates. With the gate's color c, and the gate s scaled to [0, 1] by
    ``limits``, the result is ``c + (1 - alpha) * s * (image - c)``. A gate that varies
    by less than 0.05 over an image is treated as constant and drawn as the color of its
    mean, without the image.

    The gate is resized to the image with bilinear interpolation::

      >>> image = np.full((32, 32, 3), 255, np.uint8)
      >>> gate = np.array([[0.0, 1.0]])
      >>> picture = overlay(image, gate, alpha=0)
      >>> picture.shape, picture.dtype, picture[0, 0].tolist(), picture[0, -1].tolist()
      ((32, 32, 3), dtype('uint8'), [8, 8, 38], [255, 255, 255])

    Args:
      image: ``(H, W, 3)`` or a batch ``(N, H, W, 3)``, uint8 or float within [0, 1].
      gate: spatial gate, ``(h, w)``, ``(h, w, 1)`` or ``(1, h, w, 1)`` for one image,
        ``(N, h, w)`` or ``(N, h, w, 1)`` for a batch. If only one of h and w is 1, a
        batch needs the form with the last axis. Divide maps with another scale, such as
        those of ``grad_cam``, by their maximum first.
      alpha: fraction of the gate's color where it is open; the rest is the image
        (default: 0.6).
      limits: values of the darkest and the lightest color; values outside are clipped
        (default: (0.0, 1.0)).

    Returns:
      uint8 array of the shape of ``image``, RGB.

    Raises:
      ValueError: an argument has an invalid shape, dtype or range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"`alpha` must be within [0, 1], got {alpha!r}; pass 0 to dim the image by "
            "the gate, 1 for the gate alone."
        )
    check_limits(limits)
    low, high = limits
    pixels = _pixels(image)
    values = spatial_maps(gate, pixels.shape[:-1])
    shape = (*values.shape[:-2], *pixels.shape[-3:-1])
    constant = is_constant(values)[..., None, None]
    mean = values.mean((-2, -1), keepdims=True)
    resized = np.asarray(jax.image.resize(values, shape, "bilinear"), np.float64)
    share = (np.where(constant, mean, resized) - low) / (high - low)
    colors = color_map(share)
    shown = np.where(constant, 0, (1 - alpha) * np.clip(share, 0, 1))[..., None]
    return np.rint(colors + shown * (pixels - colors)).astype(np.uint8)


def is_constant(maps: np.ndarray) -> np.ndarray:
    """Whether each map ``(..., h, w)`` differs too little to mean anything."""
    return maps.max((-2, -1)) - maps.min((-2, -1)) < LEAST_SPREAD


def check_limits(limits: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless ``limits`` are finite and the lower one is first."""
    low, high = limits
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            f"`limits` must be two finite numbers, the lower one first, got "
            f"{limits!r}; pass (0.0, 1.0) for a sigmoid."
        )


def color_map(values: Any) -> np.ndarray:
    """Returns the RGB colors that ``overlay`` uses for values within [0, 1].

      >>> color_map([0.0, 0.5, 1.0]).tolist()
      [[8.0, 8.0, 38.0], [196.0, 48.0, 92.0], [252.0, 244.0, 176.0]]

    Args:
      values: array ``(...)``, clipped to [0, 1].

    Returns:
      float64 array ``(..., 3)`` within [0, 255].
    """
    anchors, *channels = _COLORS.T
    return np.stack([np.interp(values, anchors, c) for c in channels], axis=-1)


colour_map = color_map
"""The older name of ``color_map``."""


def _pixels(image: Any) -> np.ndarray:
    """The image in float64 from 0 to 255."""
    image = np.asarray(image)
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            "`image` must have shape (H, W, 3) or (N, H, W, 3), got "
            f"{image.shape}; {_three_channels(image.shape)}."
        )
    if image.dtype == np.uint8:
        return image.astype(np.float64)
    # JAX's test, for which bfloat16 is floating-point too.
    if not jax.numpy.issubdtype(image.dtype, jax.numpy.floating):
        raise ValueError(
            f"`image` must be uint8, or floating-point within [0, 1], got dtype "
            f"{image.dtype}; convert it first, e.g. image.astype(np.uint8)."
        )
    image = image.astype(np.float64)
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            "`image` must be within [0, 1] if it is floating-point, got values from "
            f"{image.min()} to {image.max()}; undo a normalization first, e.g. "
            "x * std + mean, or divide by 255."
        )
    return image * 255


def _three_channels(shape: tuple[int, ...]) -> str:
    """How to give an image of this shape three channels."""
    axes = len(shape)
    if axes in (3, 4) and shape[-1] == 1:
        return "repeat a gray image, e.g. np.repeat(image, 3, axis=-1)"
    if axes in (3, 4) and shape[-1] == 4:
        return "remove the fourth channel, e.g. image[..., :3]"
    if axes in (3, 4) and shape[-3] == 3:
        return "move the channels last, e.g. np.moveaxis(image, -3, -1)"
    if axes in (2, 3) and 0 not in shape:
        return "repeat a gray image, e.g. np.repeat(image[..., None], 3, axis=-1)"
    return "pass one image or a batch of at least one"


def spatial_maps(gate: Any, shape: tuple[int, ...], field: str = "gate") -> np.ndarray:
    """The gate without its axis of size 1, for images of ``shape``.

    ``shape`` is (H, W) or (N, H, W); ``field`` is the argument that errors name.
    """
    given = np.asarray(gate)
    maps = given
    if len(shape) == 2 and maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    if maps.ndim == len(shape) + 1 and maps.shape[-1] == 1:
        maps = maps[..., 0]
    if maps.ndim != len(shape) or maps.shape[:-2] != shape[:-2] or 0 in maps.shape:
        expected = "(h, w) or (h, w, 1)"
        if len(shape) == 3:
            expected = f"({shape[0]}, h, w) or ({shape[0]}, h, w, 1)"
        raise ValueError(
            f"`{field}` must have shape {expected} for this image, got "
            f"{given.shape}; pass a spatial gate, one for each image, e.g. gate[i] "
            "for image[i]."
        )
    # A channel gate or the gate of one image may have the shape of a batch of lines.
    sides = zip(maps.shape[-2:], shape[-2:], strict=True)
    one_line = any(side == 1 < size for side, size in sides)
    if given.ndim == len(shape) == 3 and one_line and maps.shape[-2:] != (1, 1):
        raise ValueError(
            f"`{field}` must have shape ({shape[0]}, h, w, 1) where h or w alone is 1, "
            f"got {given.shape}, which a channel gate or the gate of one image may "
            f"have too; pass gate[..., None] if it is ({shape[0]}, h, w)."
        )
    maps = maps.astype(np.promote_types(given.dtype, np.float32))
    if not np.isfinite(maps).all():
        raise ValueError(
            f"`{field}` must be finite, got NaN or infinite values; pass the gate of "
            "a finite input."
        )
    return maps
