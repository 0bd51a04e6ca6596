"""Argument checks, with messages that say what to pass instead."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

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


def check_positive_number(field: str, value: Any, *, usual: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a number above 0, as ``usual`` is."""
    if not isinstance(value, numbers.Real) or not float(value) > 0:
        raise ValueError(
            f"`{field}` must be a positive number, got {value!r}; the usual one is "
            f"{usual}."
        )


def check_odd(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an odd integer of at least 1.

    Only an odd kernel has a center, so only an odd one keeps the size of the map.
    """
    if not is_int(value) or value < 1 or value % 2 == 0:
        near = f" such as {max(int(value), 0) + 1}" if is_int(value) else ""
        raise ValueError(
            f"`{field}` must be an odd integer of at least 1, got {value!r}; pass an "
            f"odd size{near}."
        )


def check_feature_map(x: Any, *, spatial_dims: int = 2) -> Array:
    """Returns ``x`` as an array, or raises ``ValueError`` if it is not a feature map.

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
            "of nothing are undefined; skip empty batches."
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


def check_callable(field: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(
            f"`{field}` must be a function of arrays, got {value!r}; pass the function "
            "itself, such as nn.relu or nn.sigmoid."
        )


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer of any type, but not a bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
