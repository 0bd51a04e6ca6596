"""Reading the gates back: every gate of a model, what it does, and a picture of it.

Each block sows its gate, and nobody pays for one that nobody reads. ``attention_maps``
reads all gates of a model for one input, ``statistics`` says how far they are open, and
``overlay`` lays a spatial gate over the image it was computed for.
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

# Dark to light, so that it reads in gray as well: the value, and its red, green, blue.
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

    The block's output is its input times these, bit for bit (BAM and scSE join them as
    their docs say): the program that computes the output is the one that they are read
    from::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = flax_attn.CBAM()
      >>> variables = block.init(jax.random.key(0), x)
      >>> gates = flax_attn.inspect.attention_maps(block, variables, x)
      >>> {path: gate.shape for path, gate in gates.items()}
      {'channel/channel_gate': (2, 1, 1, 64), 'spatial/spatial_gate': (2, 8, 8, 1)}

    Nothing is changed: gates are all that the model may store in the call, and of what
    else it sows nothing is returned. So a normalisation must use its running average.

    Args:
      model: any module with one of this library's blocks in it, however deep.
      variables: its variables.
      x: its input.
      *args: further arguments of the call.
      **kwargs: keyword arguments of ``model.apply``, such as ``train=False``,
        ``method="features"`` or ``rngs={"dropout": key}``.

    Returns:
      The gates in the order in which they were computed (under ``jax.jit``: sorted), in
      the dtype and the shape that the block gave them, ``(..., 1, 1, C)``,
      ``(..., H, W, 1)`` or, of BAM, ``(..., H, W, C)``. A block that is called several
      times has a path for each call, ending in ``/0``, ``/1`` and so on. Layers that
      ``nn.scan`` or ``nn.vmap`` stacks are one gate with the axis that
      ``variable_axes`` names.

    Raises:
      ValueError: there is no gate, one is lost in ``nn.scan`` or ``nn.vmap``, or
        ``mutable`` is among the keyword arguments.
    """
    if "mutable" in kwargs:
        raise ValueError(
            f"`mutable` must be left out, got {kwargs['mutable']!r}: only the gates "
            "are collected; call model.apply for the rest."
        )
    # What variables hold of an earlier call would stand before the gates of this one.
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
            f"`model` must have an attention block that this call reaches, got {got} "
            f"from {type(model).__name__}; put a block in, or, where it is inside "
            f'nn.scan or nn.vmap, name its gates: variable_axes={{"{COLLECTION}": 0}}.'
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
      path: where it is in the model; empty for a gate that came without one.
      shape: its shape.
      below: share of its elements below ``low``: nearly shut.
      above: share of its elements above ``high``: nearly open.
      mean: the mean of its elements.
      entropy: the mean over its elements g of ``-g log2 g - (1 - g) log2 (1 - g)``, in
        bits: 1 where all are 1/2, 0 where each is 0 or 1.
    """

    path: str
    shape: tuple[int, ...]
    below: float
    above: float
    mean: float
    entropy: float


class StatisticsTable(tuple[GateStatistics, ...]):
    """Statistics of several gates, which print as a table."""

    def __str__(self) -> str:
        """A line for each gate, under the names of the fields."""
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
    """Says of each gate how much of it is saturated, its mean and its entropy.

    Computed in float64, whatever the dtype of the gate::

      >>> print(statistics({"a": np.array([0.0, 0.5, 1.0, 0.5])}))
      path  shape  below  above   mean  entropy
      a         4  25.0%  25.0%  0.500    0.500

    Args:
      gates: what ``attention_maps`` returns, or one gate. Those of ``identity_init``
        reach to 2: halve them first.
      low: elements below it count as shut (default: 0.05).
      high: elements above it count as open (default: 0.95).

    Returns:
      A tuple of ``GateStatistics``, in the order of ``gates``; as a string, a table.

    Raises:
      ValueError: ``low`` and ``high`` are not in ``0 <= low < high <= 1``, or a gate is
        empty or not within [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            "`low` and `high` must be in 0 <= low < high <= 1, got "
            f"{low!r} and {high!r}; the defaults are 0.05 and 0.95."
        )
    named = gates if isinstance(gates, Mapping) else {"": gates}
    if not named:
        raise ValueError("`gates` must be at least one gate, got none.")
    return StatisticsTable(
        _statistics(path, gate, low, high) for path, gate in named.items()
    )


def _statistics(path: str, gate: Any, low: float, high: float) -> GateStatistics:
    g = np.asarray(gate).astype(np.float64)
    name = f"`gates`[{path!r}]" if path else "`gates`"
    # Written so that a value that is no number fails as well.
    if not (g.size and g.min() >= 0 and g.max() <= 1):
        got = f"values from {g.min()} to {g.max()}" if g.size else f"shape {g.shape}"
        raise ValueError(
            f"{name} must have elements, all within [0, 1], got {got}; map them "
            "there first: halve what `identity_init` has doubled, or (1 + tanh) / 2."
        )
    return GateStatistics(
        path=path,
        shape=g.shape,
        below=float((g < low).mean()),
        above=float((g > high).mean()),
        mean=float(g.mean()),
        # Not a negation, whose nothing would print as -0.
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
    """Lays a spatial gate over its image, in colors from dark (shut) to light (open).

    The gate is resized to the image bilinearly::

      >>> image = np.zeros((32, 32, 3), np.uint8)
      >>> picture = overlay(image, np.ones((8, 8, 1)), alpha=1.0)
      >>> picture.shape, picture.dtype, picture[0, 0].tolist()
      ((32, 32, 3), dtype('uint8'), [252, 244, 176])

    Args:
      image: ``(H, W, 3)`` or a batch ``(N, H, W, 3)``, uint8 or float within [0, 1].
      gate: spatial gate of one image, ``(h, w)``, ``(h, w, 1)`` or ``(1, h, w, 1)``;
        of a batch, ``(N, h, w)`` or ``(N, h, w, 1)``. Where h or w alone is 1 and the
        images have more there, it has to be the latter.
      alpha: share of the gate's color; the rest is the image (default: 0.6).
      limits: values with the darkest and the lightest color; what lies beyond has
        those too (default: (0.0, 1.0)).

    Returns:
      uint8 array of the shape of ``image``, in red, green and blue.

    Raises:
      ValueError: an argument has another shape, dtype or range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"`alpha` must be within [0, 1], got {alpha!r}; 0 shows the image alone, 1 "
            "the gate alone."
        )
    low, high = limits
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            f"`limits` must be two finite numbers, the lower one first, got "
            f"{limits!r}; a sigmoid has (0.0, 1.0)."
        )
    pixels = _pixels(image)
    values = _maps(gate, pixels.shape[:-1])
    shape = (*values.shape[:-2], *pixels.shape[-3:-1])
    resized = np.asarray(jax.image.resize(values, shape, "bilinear"), np.float64)
    colors = color_map((resized - low) / (high - low))
    return np.rint(alpha * colors + (1 - alpha) * pixels).astype(np.uint8)


def color_map(values: Any) -> np.ndarray:
    """The colors of ``overlay``: values within [0, 1] to red, green and blue.

      >>> color_map([0.0, 0.5, 1.0]).tolist()
      [[8.0, 8.0, 38.0], [196.0, 48.0, 92.0], [252.0, 244.0, 176.0]]

    Args:
      values: array ``(...)``; what lies beyond [0, 1] has the color of its end.

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
    # As JAX has it: bfloat16 is a floating-point dtype too.
    if not jax.numpy.issubdtype(image.dtype, jax.numpy.floating):
        raise ValueError(
            f"`image` must be uint8, or floating-point within [0, 1], got dtype "
            f"{image.dtype}; convert it first, e.g. image.astype(np.uint8)."
        )
    image = image.astype(np.float64)
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            "`image` must be within [0, 1] where it is floating-point, got values from "
            f"{image.min()} to {image.max()}; undo a normalisation first, e.g. "
            "x * std + mean, or divide by 255."
        )
    return image * 255


def _three_channels(shape: tuple[int, ...]) -> str:
    """How an image of another shape comes to three channels."""
    axes = len(shape)
    if axes in (3, 4) and shape[-1] == 1:
        return "repeat a gray one, e.g. np.repeat(image, 3, axis=-1)"
    if axes in (3, 4) and shape[-1] == 4:
        return "leave the fourth channel out, e.g. image[..., :3]"
    if axes in (3, 4) and shape[-3] == 3:
        return "put the channels last, e.g. np.moveaxis(image, -3, -1)"
    if axes in (2, 3) and 0 not in shape:
        return "repeat a gray one, e.g. np.repeat(image[..., None], 3, axis=-1)"
    return "pass one image or a batch of at least one"


def _maps(gate: Any, place: tuple[int, ...]) -> np.ndarray:
    """The gate without its axis of size 1, as it belongs to images of axes ``place``.

    ``place`` is (H, W) or (N, H, W).
    """
    given = np.asarray(gate)
    maps = given
    if len(place) == 2 and maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    if maps.ndim == len(place) + 1 and maps.shape[-1] == 1:
        maps = maps[..., 0]
    if maps.ndim != len(place) or maps.shape[:-2] != place[:-2] or 0 in maps.shape:
        wanted = "(h, w) or (h, w, 1)"
        if len(place) == 3:
            wanted = f"({place[0]}, h, w) or ({place[0]}, h, w, 1)"
        raise ValueError(
            f"`gate` must have shape {wanted} for this `image`, got "
            f"{given.shape}; pass a spatial gate, and one for each image, e.g. gate[i] "
            "for image[i]."
        )
    # Else a channel gate, or the gate of one image, would pass for a batch of lines.
    alone = [g == 1 < size for g, size in zip(maps.shape[-2:], place[-2:], strict=True)]
    if given.ndim == len(place) == 3 and any(alone) and maps.shape[-2:] != (1, 1):
        raise ValueError(
            f"`gate` must have shape ({place[0]}, h, w, 1) where h or w alone is 1, "
            f"got {given.shape}, which a channel gate or the gate of one image may "
            f"have too; pass gate[..., None] if it is ({place[0]}, h, w)."
        )
    maps = maps.astype(np.promote_types(given.dtype, np.float32))
    if not np.isfinite(maps).all():
        raise ValueError("`gate` must be finite, got nan or infinite values.")
    return maps
