"""The blocks as pure array functions: what is computed, without any parameters' home.

Each block squeezes a feature map ``x`` of shape ``(..., H, W, C)`` to descriptors,
excites them to logits, turns the logits into a gate and multiplies. The squeezes, the
two convolutions and the product with a spatial gate are defined here and nowhere else;
the modules add parameters, an activation and a gate function. With ``spatial_dims=1``
a map is ``(..., L, C)``, and with 3 ``(..., D, H, W, C)``.

What works on feature maps has two implementations. ``"plain"`` is the definition, in
the obvious operations, differentiated automatically. ``"fast"`` computes the same with
fewer passes over the map, forward and backward, but only in reverse mode: ``jax.jvp``,
``jax.jacfwd`` and ``jax.hessian`` need ``"plain"``.

Options are keyword-only. A bad option raises ``ValueError``; arrays are checked by
``check_feature_map``, once, where they enter a module.
"""

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from flax_attn.functional import _kernels
from flax_attn.functional._kernels import CHANNEL, SPATIAL

Array = jax.Array
Pool = Literal["avg", "max"]
Excite = Literal["mlp", "conv"]
Padding = Literal["zeros", "circular"]
Implementation = Literal["fast", "plain"]

POOLS: tuple[Pool, ...] = ("avg", "max")
EXCITES: tuple[Excite, ...] = ("mlp", "conv")
PADDINGS: tuple[Padding, ...] = ("zeros", "circular")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("fast", "plain")

# The spatial axes, by their number.
LAYOUTS = {1: "L", 2: "H, W", 3: "D, H, W"}


def check_choice(field: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if not (isinstance(value, str) and value in choices):
        names = " or ".join(f'"{c}"' for c in choices)
        raise ValueError(f"`{field}` must be {names}, got {value!r}.")


def check_positive(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an integer of at least 1."""
    if not is_int(value) or value < 1:
        raise ValueError(
            f"`{field}` must be an integer of at least 1, got {value!r}; pass a "
            "positive int."
        )


def check_odd(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an odd integer of at least 1.

    Only an odd kernel has a centre, so only an odd one keeps the size of the map.
    """
    if not is_int(value) or value < 1 or value % 2 == 0:
        near = f" such as {max(int(value), 0) + 1}" if is_int(value) else ""
        raise ValueError(
            f"`{field}` must be an odd integer of at least 1, got {value!r}; pass an "
            f"odd size{near}."
        )


def check_feature_map(x: Any, *, spatial_dims: int = 2) -> Array:
    """Returns ``x`` as an array, or raises ``ValueError`` where no block is defined.

    Args:
      x: floating-point array ``(..., H, W, C)`` without empty axes.
      spatial_dims: number of spatial axes, 1, 2 or 3 (default: 2).
    """
    if not is_int(spatial_dims) or spatial_dims not in LAYOUTS:
        raise ValueError(
            f"`spatial_dims` must be 1, 2 or 3, got {spatial_dims!r}; it counts the "
            "axes between the batch and the channels."
        )
    x = jnp.asarray(x)
    if x.ndim < spatial_dims + 1:
        ones = "None, " * spatial_dims
        raise ValueError(
            f"`x` must have at least {spatial_dims + 1} axes (..., "
            f"{LAYOUTS[spatial_dims]}, C), got shape {x.shape}; add the missing axes, "
            f"e.g. x[:, {ones}:] for a batch of vectors."
        )
    if 0 in x.shape:
        raise ValueError(
            f"`x` must have no empty axis, got shape {x.shape}; the mean and maximum "
            "of nothing are undefined, so leave such a batch out."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`x` must be a floating-point array, got dtype {x.dtype}; convert it "
            "first, e.g. x.astype(jnp.float32)."
        )
    return x


def check_mask(mask: Any, x: Array) -> Array | None:
    """Returns ``mask`` as ``(..., H, W, 1)``, or raises ``ValueError``.

    Args:
      mask: boolean array that broadcasts to ``(..., H, W)``, or None.
      x: array ``(..., H, W, C)``.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"`mask` must be boolean, True where `x` is valid, got dtype {mask.dtype}; "
            "convert it first, e.g. mask != 0."
        )
    rule = (
        f"`mask` must have the shape of `x` without its channels, {x.shape[:-1]}, or "
        f"broadcast to it, got {mask.shape}"
    )
    if mask.ndim > x.ndim - 1:
        raise ValueError(f"{rule}; drop the last axis, e.g. mask[..., 0].")
    try:
        return jnp.broadcast_to(mask, x.shape[:-1])[..., None]
    except ValueError as error:
        raise ValueError(f"{rule}; pad it as `x` is padded.") from error


def keep(x: Array, mask: Array | None) -> Array:
    """``x`` where ``mask`` is True, and zero elsewhere, whatever stood there.

    Args:
      x: array ``(..., H, W, C)``.
      mask: boolean array ``(..., H, W, 1)``, or None for all of ``x``.
    """
    return x if mask is None else jnp.where(mask, x, 0)


def eca_kernel_size(features: int, *, gamma: float = 2, b: float = 1) -> int:
    """The width of ECA's 1-D convolution, https://arxiv.org/abs/1910.03151, eq. 12.

    ``t = int(abs((log2(features) + b) / gamma))``, or ``t + 1`` where ``t`` is even::

      >>> [eca_kernel_size(c) for c in (16, 54, 64, 128, 512, 2048)]
      [3, 3, 3, 5, 5, 7]

    Args:
      features: number of channels C, at least 1. The result is exact to 2**20 at least.
      gamma: slope divisor, a finite number other than 0 (default: 2).
      b: offset, a finite number (default: 1).

    Returns:
      An odd integer of at least 1.

    Raises:
      ValueError: an argument is out of its range.

    Deviations: none from the article; timm clamps the result to at least 3, which
    differs for C < 8 only.
    """
    check_positive("features", features)
    for field, value in (("gamma", gamma), ("b", b)):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"`{field}` must be a finite number, got {value!r}.")
    if gamma == 0:
        raise ValueError("`gamma` must not be 0: it divides; the article has 2.")
    # math.log2 is exact for powers of two, which math.log(features, 2) is not.
    t = int(abs((math.log2(features) + b) / gamma))
    return t if t % 2 else t + 1


def squeeze_spatial(
    x: Array,
    *,
    pool: Pool = "avg",
    mask: Array | None = None,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> Array:
    """Reduces H and W: ``(..., H, W, C)`` to ``(..., 1, 1, C)``.

    The mean is accumulated in float32 or wider and *returned* so; the maximum keeps the
    dtype of ``x``. Elements that tie for the maximum share its gradient evenly. Where
    ``mask`` admits none, both are zero.

      >>> squeeze_spatial(jnp.full((2, 3, 4), 300.0, jnp.float16)).ravel().tolist()
      [300.0, 300.0, 300.0, 300.0]

    Args:
      x: floating-point array ``(..., H, W, C)``.
      pool: ``"avg"`` or ``"max"`` (default: ``"avg"``).
      mask: boolean array ``(..., H, W, 1)``, True where ``x`` counts (default: None,
        everywhere).
      spatial_dims: number of spatial axes, 1, 2 or 3 (default: 2).
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    check_choice("pool", pool, POOLS)
    if mask is not None:
        x = jnp.where(mask, x, 0 if pool == "avg" else -jnp.inf)
    folded = _fold(x, spatial_dims)
    if _is_fast(implementation):
        squeeze = _kernels.mean if pool == "avg" else _kernels.maximum
        y = squeeze(folded, SPATIAL)
    elif pool == "avg":
        y = _mean(folded, SPATIAL)
    else:
        y = folded.max(SPATIAL, keepdims=True)
    y = y.reshape(*x.shape[: -1 - spatial_dims], *(1,) * spatial_dims, x.shape[-1])
    return y if mask is None else _of_valid(y, mask, pool, spatial_dims)


def squeeze_channels(x: Array, *, implementation: Implementation = "fast") -> Array:
    """Reduces C by maximum and mean: ``(..., H, W, C)`` to ``(..., H, W, 2)``.

    The order is ``[max, mean]``, as in the article and the official code (timm has it
    the other way round). Computed in float32 or wider, and returned so.

      >>> squeeze_channels(jnp.array([[[1.0, 2.0, 6.0]]])).tolist()
      [[[6.0, 3.0]]]

    Args:
      x: floating-point array ``(..., H, W, C)``.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    if _is_fast(implementation):
        maximum, mean = _kernels.maximum(x, CHANNEL), _kernels.mean(x, CHANNEL)
    else:
        maximum, mean = x.max(CHANNEL, keepdims=True), _mean(x, CHANNEL)
    return jnp.concatenate([maximum.astype(mean.dtype), mean], axis=-1)


def scale(
    x: Array,
    gate: Array,
    *,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> Array:
    """Multiplies a feature map by a channel gate or a spatial gate: ``x * gate``.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., 1, 1, C)`` or ``(..., H, W, 1)`` of the same dtype.
      spatial_dims: number of spatial axes, 1, 2 or 3 (default: 2).
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    if not _is_fast(implementation):
        return x * gate
    of_channels = gate.shape[-1] == x.shape[-1] and all(
        n == 1 for n in gate.shape[-1 - spatial_dims : -1]
    )
    folded = _fold(x, spatial_dims), _fold(gate, spatial_dims)
    y = _kernels.scale(*folded, SPATIAL if of_channels else CHANNEL)
    return y.reshape(x.shape)


def scale_and_squeeze(
    x: Array,
    gate: Array,
    *,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> tuple[Array, Array]:
    """``y = x * gate`` for a channel gate, and ``squeeze_channels(y)``.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., 1, 1, C)`` of the same dtype.
      spatial_dims: number of spatial axes, 1, 2 or 3 (default: 2).
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``). The fast form
        squeezes the product before it is rounded to a half-precision dtype.
    """
    if _is_fast(implementation):
        y, maximum, mean = _kernels.scale_and_squeeze(
            _fold(x, spatial_dims), _fold(gate, spatial_dims)
        )
        maps = jnp.concatenate([maximum, mean], axis=-1)
        return y.reshape(x.shape), maps.reshape(*x.shape[:-1], 2)
    y = x * gate
    return y, squeeze_channels(y, implementation=implementation)


def conv_spatial(
    maps: Array,
    kernel: Array,
    *,
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "fast",
) -> Array:
    """A convolution that keeps the size of its maps, with zeros outside.

    The kernel has as many spatial axes as the maps have, from one to three.

    Args:
      maps: array ``(..., H, W, M)`` of few channels.
      kernel: array ``(kh, kw, M, O)`` of odd sizes.
      precision: see ``jax.lax.Precision``.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).

    Returns:
      Array ``(..., H, W, O)``.
    """
    if _is_fast(implementation):
        return _CONVS[kernel.ndim - 2](maps, kernel, precision)
    spatial = "DHW"[5 - kernel.ndim :]
    flat = maps.reshape(-1, *maps.shape[1 - kernel.ndim :])
    y = lax.conv_general_dilated(
        flat,
        kernel,
        window_strides=(1,) * len(spatial),
        padding="SAME",
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=precision,
    )
    return y.reshape(*maps.shape[:-1], kernel.shape[-1])


def conv_channels(
    s: Array,
    kernel: Array,
    *,
    padding: Padding = "zeros",
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "fast",
) -> Array:
    """A 1-D convolution along the last axis with one kernel, which keeps its size.

    Args:
      s: array ``(..., C)``.
      kernel: array ``(k, 1, 1)``, k odd.
      padding: what stands beyond the ends, ``"zeros"`` or ``"circular"`` (default:
        ``"zeros"``).
      precision: see ``jax.lax.Precision``.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    check_choice("padding", padding, PADDINGS)
    p = kernel.shape[0] // 2 if padding == "circular" else 0
    row = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(p, p)], mode="wrap")
    y = conv_spatial(
        row[..., None], kernel, precision=precision, implementation=implementation
    )
    return y[..., p : p + s.shape[-1], 0]


def _fold(x: Array, spatial_dims: int) -> Array:
    """The same elements as ``(..., H, W, C)``, whatever the number of spatial axes."""
    batch, spatial = x.shape[: -1 - spatial_dims], x.shape[-1 - spatial_dims : -1]
    return x.reshape(*batch, math.prod(spatial[:-1]), spatial[-1], x.shape[-1])


def _of_valid(y: Array, mask: Array, pool: Pool, spatial_dims: int) -> Array:
    """Mends what was squeezed over a whole map, of which only ``mask`` counts."""
    axes = tuple(range(-1 - spatial_dims, -1))
    valid = mask.sum(axes, keepdims=True)
    if pool == "max":
        return jnp.where(valid > 0, y, 0)
    size = math.prod(mask.shape[a] for a in axes)
    return y * (size / jnp.maximum(valid, 1).astype(y.dtype))


def _conv_1d(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    return _kernels.conv(maps[..., None, :, :], kernel[None], precision)[..., 0, :, :]


def _conv_3d(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    """Each slice of the kernel over H and W at once, then shifted sums along D."""
    kd, kh, kw, m, o = kernel.shape
    d, dtype = maps.shape[-4], _kernels.wide(maps)
    flat = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, m, kd * o)
    planes = _kernels.conv(maps.astype(dtype), flat.astype(dtype), precision)
    pads = [(0, 0)] * planes.ndim
    pads[-4] = (kd // 2, kd // 2)
    planes = jnp.pad(planes, pads)
    slices = [planes[..., i : i + d, :, :, i * o : (i + 1) * o] for i in range(kd)]
    return sum(slices[1:], slices[0]).astype(maps.dtype)


_CONVS: dict[int, Callable[..., Array]] = {
    1: _conv_1d,
    2: _kernels.conv,
    3: _conv_3d,
}


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    # A half-precision accumulator overflows (float16) or stalls (bfloat16).
    return jnp.mean(x, axes, dtype=_kernels.wide(x), keepdims=True)


def _is_fast(implementation: Any) -> bool:
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    return implementation == "fast"


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer of any kind, but no bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
