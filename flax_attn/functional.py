"""The blocks as pure array functions: what is computed, without any parameters' home.

Each block squeezes a feature map ``x`` of shape ``(..., H, W, C)`` to descriptors,
excites them to logits, turns the logits into a gate and multiplies. The squeezes, the
two convolutions and the multiplication are defined here and nowhere else; the modules
add parameters, an activation and a gate function.

Options are keyword-only. Bad arguments raise ``ValueError``.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Pool = Literal["avg", "max"]
Excite = Literal["mlp", "conv"]
Padding = Literal["zeros", "circular"]

POOLS: tuple[Pool, ...] = ("avg", "max")
EXCITES: tuple[Excite, ...] = ("mlp", "conv")
PADDINGS: tuple[Padding, ...] = ("zeros", "circular")


def check_choice(field: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if not (isinstance(value, str) and value in choices):
        names = " or ".join(f'"{c}"' for c in choices)
        raise ValueError(f"`{field}` must be {names}, got {value!r}.")


def check_positive(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an integer of at least 1."""
    if not _is_int(value) or value < 1:
        raise ValueError(
            f"`{field}` must be an integer of at least 1, got {value!r}; pass a "
            "positive int."
        )


def check_odd(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an odd integer of at least 1.

    Only an odd kernel has a centre, so only an odd one keeps the size of the map.
    """
    if not _is_int(value) or value < 1 or value % 2 == 0:
        near = f" such as {max(int(value), 0) + 1}" if _is_int(value) else ""
        raise ValueError(
            f"`{field}` must be an odd integer of at least 1, got {value!r}; pass an "
            f"odd size{near}."
        )


def check_feature_map(x: Any, *, axes: str = "H, W, C") -> Array:
    """Returns ``x`` as an array, or raises ``ValueError`` where no block is defined.

    Args:
      x: floating-point array ``(..., H, W, C)`` without empty axes.
      axes: the names of the last three axes, for the message.
    """
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(
            f"`x` must have at least 3 axes (..., {axes}), got shape {x.shape}; add "
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
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"`{field}` must be a finite number, got {value!r}.")
    if gamma == 0:
        raise ValueError("`gamma` must not be 0: it divides; the article has 2.")
    # math.log2 is exact for powers of two, which math.log(features, 2) is not.
    t = int(abs((math.log2(features) + b) / gamma))
    return t if t % 2 else t + 1


def squeeze_spatial(x: Array, *, pool: Pool = "avg") -> Array:
    """Reduces H and W: ``(..., H, W, C)`` to ``(..., 1, 1, C)``.

    The mean is accumulated in float32 or wider and *returned* so; the maximum keeps the
    dtype of ``x``. Elements that tie for the maximum share its gradient evenly.

      >>> squeeze_spatial(jnp.full((2, 3, 4), 300.0, jnp.float16)).ravel().tolist()
      [300.0, 300.0, 300.0, 300.0]

    Args:
      x: floating-point array ``(..., H, W, C)``.
      pool: ``"avg"`` or ``"max"`` (default: ``"avg"``).
    """
    check_choice("pool", pool, POOLS)
    return _mean(x, (-3, -2)) if pool == "avg" else x.max((-3, -2), keepdims=True)


def squeeze_channels(x: Array) -> Array:
    """Reduces C by maximum and mean: ``(..., H, W, C)`` to ``(..., H, W, 2)``.

    The order is ``[max, mean]``, as in the article and the official code (timm has it
    the other way round). Computed in float32 or wider, and returned so.

      >>> squeeze_channels(jnp.array([[[1.0, 2.0, 6.0]]])).tolist()
      [[[6.0, 3.0]]]
    """
    mean = _mean(x, -1)
    return jnp.concatenate([x.max(-1, keepdims=True).astype(mean.dtype), mean], axis=-1)


def scale(x: Array, gate: Array) -> Array:
    """Multiplies a feature map by a gate that broadcasts against it."""
    return x * gate


def _mean(x: Array, axis: int | tuple[int, ...]) -> Array:
    # A half-precision accumulator overflows (float16) or stalls (bfloat16).
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.mean(x, axis, dtype=wide, keepdims=True)


def _is_int(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
