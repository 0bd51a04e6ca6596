"""The squeezes and the product with a gate in few passes, with hand-written gradients.

The blocks are memory-bound: their time depends on the number of passes over the feature
map. Automatic differentiation would store masks and products as large as the map, and
XLA's CPU backend emits slow loops for reductions of a product. Each function here
equals its plain form, but supports only reverse mode. For maxima see
``_maxima``.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flax_attn.functional._maxima import at_peak, found, positions, squeezes_of
from flax_attn.functional._sums import (
    CHANNEL,
    SPATIAL,
    Array,
    Axes,
    itself,
    product,
    size_of,
    sum_of,
    sum_over,
    widen,
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean(x: Array, axes: Axes) -> Array:
    """The mean over ``axes``, which stay with size 1, in ``accumulator(x)``."""
    return sum_over(x, axes) / size_of(x.shape, axes)


def _mean_fwd(x: Array, axes: Axes) -> tuple[Array, Array]:
    return mean(x, axes), x  # Only its shape and dtype are used.


def _mean_bwd(axes: Axes, x: Array, ct: Array) -> tuple[Array]:
    ct = (ct / size_of(x.shape, axes)).astype(x.dtype)
    return (jnp.broadcast_to(ct, x.shape),)


mean.defvjp(_mean_fwd, _mean_bwd)


def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``, which stay with size 1.

    The first element that attains it takes the whole gradient.
    """
    return mean_and_maximum(x, axes)[1]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean_and_maximum(x: Array, axes: Axes) -> tuple[Array, Array]:
    """``mean`` and ``maximum``; see ``squeezes_of``."""
    total, m = squeezes_of(itself, axes, with_index=False)(x)
    return total / size_of(x.shape, axes), m.astype(x.dtype)


# With a rule of its own, so that derivatives of the gradient are defined too.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mean_and_peak(x: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """The mean, the maximum and the position of the first element attaining it."""
    total, m, index = squeezes_of(itself, axes, with_index=True)(x)
    return total / size_of(x.shape, axes), m.astype(x.dtype), index


def _mean_and_peak_fwd(
    x: Array, axes: Axes
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    mean, m, index = _mean_and_peak(x, axes)
    return (mean, m, index), (x, index)


def _mean_and_maximum_fwd(
    x: Array, axes: Axes
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (mean, m, _), res = _mean_and_peak_fwd(x, axes)
    return (mean, m), res


def _mean_and_maximum_bwd(
    axes: Axes, res: tuple[Array, Array], cts: tuple[Array, ...]
) -> tuple[Array]:
    x, index = res
    ct_mean, ct_m = cts[:2]
    d_x = ct_mean / size_of(x.shape, axes) + at_peak(x.shape, axes, index, widen(ct_m))
    return (d_x.astype(x.dtype),)


mean_and_maximum.defvjp(_mean_and_maximum_fwd, _mean_and_maximum_bwd)
_mean_and_peak.defvjp(_mean_and_peak_fwd, _mean_and_maximum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale(x: Array, gate: Array, axes: Axes) -> Array:
    """``x * gate`` for a gate that has size 1 along ``axes``."""
    return x * gate


def _scale_fwd(x: Array, gate: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    return x * gate, (x, gate)


def _scale_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    x, gate = res
    return ct * gate, sum_of(product, axes, x, ct).astype(gate.dtype)


scale.defvjp(_scale_fwd, _scale_bwd)


@jax.custom_vjp
def scale_and_squeeze(x: Array, gate: Array) -> tuple[Array, Array, Array]:
    """``y = x * gate`` for a channel gate, and the maximum and mean of ``y`` over C.

    The two come in ``accumulator(x)``, with a last axis of size 1.
    """
    total, m = squeezes_of(product, CHANNEL, with_index=False)(x, gate)
    return x * gate, m, total / x.shape[-1]


def _scale_and_squeeze_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    mean, m, index = _squeeze_gated(x, gate)
    return (x * gate, m, mean), (x, gate, index)


def _scale_and_squeeze_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    x, gate, index = res
    ct_y, ct_m, ct_mean = cts
    ct_mean = ct_mean / x.shape[-1]
    index, ct_m = found(index, x.shape[-1], ct_m)
    channel = positions(x.shape, CHANNEL)

    def d_y(channel: Array, index: Array, ct_y: Array, *cts: Array) -> Array:
        ct_m, ct_mean = cts
        return widen(ct_y) + ct_mean + jnp.where(channel == index, ct_m, 0)

    maps = (channel, index, ct_y, ct_m, ct_mean)
    d_gate = sum_of(lambda x, *maps: widen(x) * d_y(*maps), SPATIAL, x, *maps)
    d_x = d_y(*maps) * widen(gate)
    return d_x.astype(x.dtype), d_gate.astype(gate.dtype)


scale_and_squeeze.defvjp(_scale_and_squeeze_fwd, _scale_and_squeeze_bwd)


@jax.custom_vjp
def _squeeze_gated(x: Array, gate: Array) -> tuple[Array, Array, Array]:
    total, m, index = squeezes_of(product, CHANNEL, with_index=True)(x, gate)
    return total / x.shape[-1], m, index


def _squeeze_gated_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    mean, m, index = _squeeze_gated(x, gate)
    return (mean, m, index), (x, gate, index)


def _squeeze_gated_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    x, gate, index = res
    ct_mean, ct_m, _ = cts
    d_y = ct_mean / x.shape[-1] + at_peak(x.shape, CHANNEL, index, ct_m)
    d_gate = sum_of(product, SPATIAL, x, d_y)
    return (d_y * widen(gate)).astype(x.dtype), d_gate.astype(gate.dtype)


_squeeze_gated.defvjp(_squeeze_gated_fwd, _squeeze_gated_bwd)
