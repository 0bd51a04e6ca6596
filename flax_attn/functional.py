"""The blocks as pure array functions: what is computed, without any parameters' home.

Each block squeezes a feature map ``x`` of shape ``(..., H, W, C)`` to descriptors,
excites them to logits, turns the logits into a gate and multiplies. The squeezes, the
two convolutions and the product with a spatial gate are defined here and nowhere else;
the modules add parameters, an activation and a gate function.

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
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from flax_attn import _kernels
from flax_attn._kernels import CHANNEL, SPATIAL

Array = jax.Array
Pool = Literal["avg", "max"]
Excite = Literal["mlp", "conv"]
Padding = Literal["zeros", "circular"]
Implementation = Literal["fast", "plain"]

POOLS: tuple[Pool, ...] = ("avg", "max")
EXCITES: tuple[Excite, ...] = ("mlp", "conv")
PADDINGS: tuple[Padding, ...] = ("zeros", "circular")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("fast", "plain")


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


def check_feature_map(x: Any) -> Array:
    """Returns ``x`` as an array, or raises ``ValueError`` where no block is defined.

    Args:
      x: floating-point array ``(..., H, W, C)`` without empty axes.
    """
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(
            f"`x` must have at least 3 axes (..., H, W, C), got shape {x.shape}; add "
            "the missing axes, e.g. x[:, None, None, :] for a batch of vectors."
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
    x: Array, *, pool: Pool = "avg", implementation: Implementation = "fast"
) -> Array:
    """Reduces H and W: ``(..., H, W, C)`` to ``(..., 1, 1, C)``.

    The mean is accumulated in float32 or wider and *returned* so; the maximum keeps the
    dtype of ``x``. Elements that tie for the maximum share its gradient evenly.

      >>> squeeze_spatial(jnp.full((2, 3, 4), 300.0, jnp.float16)).ravel().tolist()
      [300.0, 300.0, 300.0, 300.0]

    Args:
      x: floating-point array ``(..., H, W, C)``.
      pool: ``"avg"`` or ``"max"`` (default: ``"avg"``).
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    check_choice("pool", pool, POOLS)
    if _is_fast(implementation):
        squeeze = _kernels.mean if pool == "avg" else _kernels.maximum
        return squeeze(x, SPATIAL)
    return _mean(x, SPATIAL) if pool == "avg" else x.max(SPATIAL, keepdims=True)


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


def scale(x: Array, gate: Array, *, implementation: Implementation = "fast") -> Array:
    """Multiplies a feature map by a spatial gate: ``x * gate``.

    For a channel gate the plain product is the fast one.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., H, W, 1)`` of the same dtype.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).
    """
    return _kernels.scale(x, gate) if _is_fast(implementation) else x * gate


def scale_and_squeeze(
    x: Array, gate: Array, *, implementation: Implementation = "fast"
) -> tuple[Array, Array]:
    """``y = x * gate`` for a channel gate, and ``squeeze_channels(y)``.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., 1, 1, C)`` of the same dtype.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``). The fast form
        squeezes the product before it is rounded to a half-precision dtype.
    """
    if _is_fast(implementation):
        y, maximum, mean = _kernels.scale_and_squeeze(x, gate)
        return y, jnp.concatenate([maximum, mean], axis=-1)
    y = x * gate
    return y, squeeze_channels(y, implementation=implementation)


def conv_spatial(
    maps: Array,
    kernel: Array,
    *,
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "fast",
) -> Array:
    """A convolution that keeps H and W, with zeros outside.

    Args:
      maps: array ``(..., H, W, M)`` of few channels.
      kernel: array ``(kh, kw, M, O)`` of odd sizes.
      precision: see ``jax.lax.Precision``.
      implementation: ``"fast"`` or ``"plain"`` (default: ``"fast"``).

    Returns:
      Array ``(..., H, W, O)``.
    """
    if _is_fast(implementation):
        return _kernels.conv(maps, kernel, precision)
    flat = maps.reshape(-1, *maps.shape[-3:])
    y = lax.conv_general_dilated(
        flat,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
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
        row[..., None, :, None],
        kernel[None],
        precision=precision,
        implementation=implementation,
    )
    return y[..., 0, p : p + s.shape[-1], 0]


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
