"""Reading a model's gates: their values, their statistics and pictures of them.

Each block sows its gates, which costs nothing unless they are read. ``attention_maps``
reads all gates of a model for one input, ``statistics`` says how far they are open, and
``overlay`` draws a spatial gate over its image.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_attn.insertion import Call, watch

Array = jax.Array

COLLECTION = "intermediates"

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


def attention_maps(
    model: nn.Module, variables: Mapping[str, Any], x: Any, *args: Any, **kwargs: Any
) -> dict[str, Array]:
    """Returns every gate of ``model`` for the input ``x``, by its path.

    The block's output is its input times these, bit for bit (BAM and scSE combine them
    as their docs say), as they are read from the call that computes the output::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = flax_attn.CBAM()
      >>> variables = block.init(jax.random.key(0), x)
      >>> gates = flax_attn.inspect.attention_maps(block, variables, x)
      >>> {path: gate.shape for path, gate in gates.items()}
      {'channel/channel_gate': (2, 1, 1, 64), 'spatial/spatial_gate': (2, 8, 8, 1)}

    Gates are those that a subclass of ``blocks.Attention`` declares in ``gates``; other
    sown values are not returned. No other collection is mutable in the call, so a
    normalization must use its running average.

    Args:
      model: any module that calls a block, at any depth.
      variables: its variables.
      x: its input.
      *args: further arguments of the call.
      **kwargs: keyword arguments of ``model.apply``, such as ``train=False``,
        ``method="features"`` or ``rngs={"dropout": key}``.

    Returns:
      The gates in the order of their computation (sorted under ``jax.jit``), with the
      block's dtype and the shape ``(..., 1, 1, C)``, ``(..., H, W, 1)`` or, of BAM,
      ``(..., H, W, C)``. A block that is called several times has a path for each call,
      ending in ``/0``, ``/1`` and so on. Layers that ``nn.scan`` or ``nn.vmap`` stacks
      have one gate, stacked along the axis in ``variable_axes``.

    Raises:
      ValueError: if there is no gate, if ``nn.scan`` or ``nn.vmap`` drops one, or if
        ``mutable`` is among the keyword arguments.
    """
    if "mutable" in kwargs:
        raise ValueError(
            f"`mutable` must be left out, got {kwargs['mutable']!r}, since only gates "
            "are collected; call model.apply for other collections."
        )
    # Gates of an earlier call among the variables would come before those of this one.
    known = {name: value for name, value in variables.items() if name != COLLECTION}
    made: set[str] = set()
    lost: set[str] = set()

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        if call.gate is not None:
            path = "/".join((*call.path, call.gate))
            stored = call.module.is_mutable_collection(COLLECTION)
            (made if stored else lost).add(path)
        return run()

    watched = watch(model, watcher)
    _, state = watched.apply(known, x, *args, mutable=[COLLECTION], **kwargs)
    gates = dict(_gates(state.get(COLLECTION, {}), made))
    if not gates or lost:
        got = f"no gate at {', '.join(sorted(lost))}" if lost else "no gate"
        raise ValueError(
            f"`model` must call an attention block and keep its gates, got {got} from "
            f"{type(model).__name__}; add a block, or, where it is inside nn.scan or "
            f'nn.vmap, keep its gates by variable_axes={{"{COLLECTION}": 0}}.'
        )
    return gates


def _gates(
    tree: Mapping[str, Any], made: set[str], prefix: str = ""
) -> Iterator[tuple[str, Array]]:
    """The gates among what was sown: the values at the paths in ``made``."""
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, Mapping):
            yield from _gates(value, made, f"{path}/")
        elif path in made:
            for i, gate in enumerate(value):
                yield (path if len(value) == 1 else f"{path}/{i}"), gate


@dataclasses.dataclass(frozen=True)
class GateStatistics:
    """How far one gate is open.

    Attributes:
      path: where it is in the model; empty for a gate without a path.
      shape: its shape.
      below: fraction of its elements below ``low``: nearly closed.
      above: fraction of its elements above ``high``: nearly open.
      mean: the mean of its elements.
      entropy: the mean over its elements g of ``-g log2 g - (1 - g) log2 (1 - g)``, in
        bits: 1 if all are 1/2, 0 if each is 0 or 1.
    """

    path: str
    shape: tuple[int, ...]
    below: float
    above: float
    mean: float
    entropy: float


class StatisticsTable(tuple[GateStatistics, ...]):
    """Statistics of several gates; ``str`` returns a table."""

    def __str__(self) -> str:
        """One line for each gate, below the names of the fields."""
        header = [field.name for field in dataclasses.fields(GateStatistics)]
        rows = [
            [
                row.path or "gate",
                "×".join(map(str, row.shape)),
                *(f"{share:.1%}" for share in (row.below, row.above)),
                *(f"{value:.3f}" for value in (row.mean, row.entropy)),
            ]
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            f"{first:{widths[0]}}  "
            + "  ".join(
                f"{cell:>{n}}" for cell, n in zip(rest, widths[1:], strict=True)
            )
            for first, *rest in (header, *rows)
        ]
        return "\n".join(lines)


def statistics(
    gates: Any | Mapping[str, Any], *, low: float = 0.05, high: float = 0.95
) -> StatisticsTable:
    """Returns how much of each gate is saturated, its mean and its entropy.

    Computed in float64, whatever the dtype of the gate::

      >>> print(statistics({"a": np.array([0.0, 0.5, 1.0, 0.5])}))
      path  shape  below  above   mean  entropy
      a         4  25.0%  25.0%  0.500    0.500

    Args:
      gates: what ``attention_maps`` returns, or one gate. Halve those of a block with
        ``identity_init`` first, whose range is [0, 2].
      low: elements below it count as closed (default: 0.05).
      high: elements above it count as open (default: 0.95).

    Returns:
      A tuple of ``GateStatistics``, in the order of ``gates``; as a string, a table.

    Raises:
      ValueError: unless ``0 <= low < high <= 1``, or if a gate is empty or not within
        [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            "`low` and `high` must satisfy 0 <= low < high <= 1, got "
            f"{low!r} and {high!r}; the defaults are 0.05 and 0.95."
        )
    named = gates if isinstance(gates, Mapping) else {"": gates}
    if not named:
        raise ValueError(
            "`gates` must contain at least one gate, got none; pass what "
            "attention_maps returns."
        )
    return StatisticsTable(
        _statistics(path, gate, low, high) for path, gate in named.items()
    )


def _statistics(path: str, gate: Any, low: float, high: float) -> GateStatistics:
    g = np.asarray(gate).astype(np.float64)
    name = f"`gates`[{path!r}]" if path else "`gates`"
    # So that NaN fails too.
    if not (g.size and g.min() >= 0 and g.max() <= 1):
        got = f"values from {g.min()} to {g.max()}" if g.size else f"shape {g.shape}"
        raise ValueError(
            f"{name} must have elements, all within [0, 1], got {got}; rescale them "
            "first: half of the gates of `identity_init`, or (1 + tanh) / 2."
        )
    return GateStatistics(
        path=path,
        shape=g.shape,
        below=float((g < low).mean()),
        above=float((g > high).mean()),
        mean=float(g.mean()),
        # Not a negation, which would print zero as -0.
        entropy=float(0 - (_x_log2_x(g) + _x_log2_x(1 - g)).mean()),
    )


def _x_log2_x(x: np.ndarray) -> np.ndarray:
    return x * np.log2(np.where(x > 0, x, 1))


def overlay(
    image: Any,
    gate: Any,
    *,
    alpha: float = 0.6,
    limits: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Draws a spatial gate over its image, from dark (closed) to light (open).

    The gate is resized to the image bilinearly::

      >>> image = np.zeros((32, 32, 3), np.uint8)
      >>> picture = overlay(image, np.ones((8, 8, 1)), alpha=1.0)
      >>> picture.shape, picture.dtype, picture[0, 0].tolist()
      ((32, 32, 3), dtype('uint8'), [252, 244, 176])

    Args:
      image: ``(H, W, 3)`` or a batch ``(N, H, W, 3)``, uint8 or float within [0, 1].
      gate: spatial gate of one image, ``(h, w)``, ``(h, w, 1)`` or ``(1, h, w, 1)``;
        of a batch, ``(N, h, w)`` or ``(N, h, w, 1)``. If h or w alone is 1 and the
        images are larger there, it must be the latter.
      alpha: fraction of the gate's color; the rest is the image (default: 0.6).
      limits: values with the darkest and the lightest color; values beyond are clipped
        (default: (0.0, 1.0)).

    Returns:
      uint8 array of the shape of ``image``, RGB.

    Raises:
      ValueError: if an argument has another shape, dtype or range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"`alpha` must be within [0, 1], got {alpha!r}; pass 0 for the image "
            "alone, 1 for the gate alone."
        )
    low, high = limits
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            f"`limits` must be two finite numbers, the lower one first, got "
            f"{limits!r}; pass (0.0, 1.0) for a sigmoid."
        )
    pixels = _pixels(image)
    values = _maps(gate, pixels.shape[:-1])
    shape = (*values.shape[:-2], *pixels.shape[-3:-1])
    resized = np.asarray(jax.image.resize(values, shape, "bilinear"), np.float64)
    colors = color_map((resized - low) / (high - low))
    return np.rint(alpha * colors + (1 - alpha) * pixels).astype(np.uint8)


def color_map(values: Any) -> np.ndarray:
    """The colors of ``overlay``: values within [0, 1] to RGB.

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


def _maps(gate: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The gate without its axis of size 1, for images of ``shape``.

    ``shape`` is (H, W) or (N, H, W).
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
            f"`gate` must have shape {expected} for this `image`, got "
            f"{given.shape}; pass a spatial gate, one for each image, e.g. gate[i] "
            "for image[i]."
        )
    # A channel gate or the gate of one image may have the shape of a batch of lines.
    sides = zip(maps.shape[-2:], shape[-2:], strict=True)
    one_line = any(side == 1 < size for side, size in sides)
    if given.ndim == len(shape) == 3 and one_line and maps.shape[-2:] != (1, 1):
        raise ValueError(
            f"`gate` must have shape ({shape[0]}, h, w, 1) where h or w alone is 1, "
            f"got {given.shape}, which a channel gate or the gate of one image may "
            f"have too; pass gate[..., None] if it is ({shape[0]}, h, w)."
        )
    maps = maps.astype(np.promote_types(given.dtype, np.float32))
    if not np.isfinite(maps).all():
        raise ValueError(
            "`gate` must be finite, got NaN or infinite values; pass the gate of a "
            "finite input."
        )
    return maps
