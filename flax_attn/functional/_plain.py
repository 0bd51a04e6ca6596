"""The straightforward definitions, with automatic differentiation."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from flax_attn.functional._sums import CHANNEL, SPATIAL, Array, Axes, accumulator


def mean(x: Array, axes: Axes) -> Array:
    """The mean over ``axes``, in ``accumulator(x)``."""
    # A half-precision accumulator overflows (float16) or stalls (bfloat16).
    return jnp.mean(x, axes, dtype=accumulator(x), keepdims=True)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``; NaN where there is one."""
    # XLA's CPU backend may lose NaN in a maximum.
    has_nan = jnp.isnan(x).any(axes, keepdims=True)
    return jnp.where(has_nan, jnp.nan, x.max(axes, keepdims=True))


@maximum.defjvp
def maximum_jvp(
    axes: Axes, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # The derivative of `jnp.max` compares values; this one hands on an index.
    (x,), (t,) = primals, tangents
    m = maximum(x, axes)
    if axes == SPATIAL:
        x, t = (a.reshape(*a.shape[:-3], -1, a.shape[-1]) for a in (x, t))
    axis = -1 if axes == CHANNEL else -2
    index = jnp.argmax(x, axis, keepdims=True)
    return m, jnp.take_along_axis(t, index, axis).reshape(m.shape)


def mean_and_maximum(x: Array, axes: Axes) -> tuple[Array, Array]:
    """``mean`` and ``maximum``."""
    return mean(x, axes), maximum(x, axes)


def conv(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    """The convolution that keeps the size of its maps."""
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
