"""The squeezes and the product with a gate in few passes, gradients stated by hand.

The blocks do almost no arithmetic: their time is the number of passes over the feature
map. Automatic differentiation would keep masks and products as large as the map, and
XLA's CPU backend emits slow loops for the reductions of a product. Each function here
equals its plain counterpart in ``_plain``; reverse mode only. No gradient of a maximum
can be lost: see ``_maxima``.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flax_attn.functional._maxima import at_peak, found, peak_of, positions
from flax_attn.functional._sums import (
    CHANNEL,
    SPATIAL,
    Array,
    Axes,
    itself,
    mean_of_gated,
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


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``, which stay with size 1.

    The first element that attains it takes the whole gradient.
    """
    return peak_of(itself, axes, with_index=False)(x)[0]


def _maximum_fwd(x: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    m, index = peak(x, axes)
    return m, (x, index)


def _maximum_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array]:
    x, index = res
    return (at_peak(x.shape, axes, index, ct).astype(x.dtype),)


maximum.defvjp(_maximum_fwd, _maximum_bwd)


# With a rule of its own, so that derivatives of the gradient are defined too.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def peak(x: Array, axes: Axes) -> tuple[Array, Array]:
    """The maximum over ``axes`` and the position of the first element attaining it."""
    m, index = peak_of(itself, axes, with_index=True)(x)
    return m.astype(x.dtype), index


def _peak_fwd(x: Array, axes: Axes) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    m, index = peak(x, axes)
    return (m, index), (x, index)


def _peak_bwd(
    axes: Axes, res: tuple[Array, Array], cts: tuple[Array, Array]
) -> tuple[Array]:
    return _maximum_bwd(axes, res, cts[0])


peak.defvjp(_peak_fwd, _peak_bwd)


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
    (m,) = peak_of(product, CHANNEL, with_index=False)(x, gate)
    return x * gate, m, mean_of_gated(x, gate)


def _scale_and_squeeze_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    m, index = _peak_of_gated(x, gate)
    return (x * gate, m, mean_of_gated(x, gate)), (x, gate, index)


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
def _peak_of_gated(x: Array, gate: Array) -> tuple[Array, Array]:
    m, index = peak_of(product, CHANNEL, with_index=True)(x, gate)
    return m, index


def _peak_of_gated_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    m, index = _peak_of_gated(x, gate)
    return (m, index), (x, gate, index)


def _peak_of_gated_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array]
) -> tuple[Array, Array]:
    x, gate, index = res
    d_y = at_peak(x.shape, CHANNEL, index, cts[0])
    d_gate = sum_of(product, SPATIAL, x, d_y)
    return (d_y * widen(gate)).astype(x.dtype), d_gate.astype(gate.dtype)


_peak_of_gated.defvjp(_peak_of_gated_fwd, _peak_of_gated_bwd)
