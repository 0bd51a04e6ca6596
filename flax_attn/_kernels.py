"""Fast forms of what ``functional`` defines, with their gradients stated by hand.

The blocks do almost no arithmetic: their time is the number of passes over the feature
map. Left to automatic differentiation, a maximum keeps a mask as large as the map, the
product of map and gate is stored, and XLA emits slow loops on CPU for the reductions
of a product and for convolutions of one or two channels. Here the backward pass keeps
the map and the small arrays and recomputes the rest.

Each function is equivalent to its plain counterpart in ``functional`` and is tested as
that counterpart is. ``jax.custom_vjp`` rules out forward-mode differentiation of these;
the plain ones have it.

Two rules keep the recomputed masks true. What is compared is a float32 or wider value
on which all programs agree: XLA may leave out the rounding to a half-precision dtype
here and not there, so ``_exact`` states it, and the product of two such is exact in
float32. And the mask multiplies ``cotangent / count``: should it ever miss its maximum,
the gradient is NaN, which is seen, and not zero, which is not. It can miss where the
compiler computes the map twice, once for the maximum and once for the mask, and rounds
it differently: seen on CPU with ``--xla_backend_optimization_level=0`` alone, and with
``jnp.max`` just so.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Axes = tuple[int, ...]

SPATIAL: Axes = (-3, -2)
CHANNEL: Axes = (-1,)

# Columns that a window of the banded product makes: it does (TILE + k - 1) / k times
# the convolution's arithmetic, at the speed of a product.
TILE = 16


def wide(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or wider where an array is wider."""
    return jnp.result_type(jnp.float32, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean(x: Array, axes: Axes) -> Array:
    """The mean over ``axes``, which stay with size 1, in ``wide(x)``."""
    return _sum(x.astype(wide(x)), axes) / _size(x, axes)


def _mean_fwd(x: Array, axes: Axes) -> tuple[Array, Array]:
    return mean(x, axes), x  # Only its shape and dtype are used.


def _mean_bwd(axes: Axes, x: Array, ct: Array) -> tuple[Array]:
    return (jnp.broadcast_to((ct / _size(x, axes)).astype(x.dtype), x.shape),)


mean.defvjp(_mean_fwd, _mean_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``, which stay with size 1; ties share the gradient."""
    return _exact(x).max(axes, keepdims=True).astype(x.dtype)


def _maximum_fwd(x: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    m = _exact(x).max(axes, keepdims=True)
    return m.astype(x.dtype), (x, m)


def _maximum_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array]:
    x, m = res
    return (_to_ties(_exact(x), m, ct.astype(m.dtype), axes).astype(x.dtype),)


maximum.defvjp(_maximum_fwd, _maximum_bwd)


@jax.custom_vjp
def scale(x: Array, gate: Array) -> Array:
    """``x * gate`` for a spatial gate, ``(..., H, W, 1)``."""
    return x * gate


def _scale_fwd(x: Array, gate: Array) -> tuple[Array, tuple[Array, Array]]:
    return x * gate, (x, gate)


def _scale_bwd(res: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    x, gate = res
    d_gate = _sum_of_product(x.astype(wide(x)), ct.astype(wide(x)))
    return ct * gate, d_gate.astype(gate.dtype)


scale.defvjp(_scale_fwd, _scale_bwd)


@jax.custom_vjp
def scale_and_squeeze(x: Array, gate: Array) -> tuple[Array, Array, Array]:
    """``y = x * gate`` for a channel gate, and the maximum and mean of ``y`` over C.

    The two come in ``wide(x)``, with a last axis of size 1.
    """
    return x * gate, _product(x, gate).max(-1, keepdims=True), _mean_of_gated(x, gate)


def _scale_and_squeeze_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    y, m, mean = scale_and_squeeze(x, gate)
    return (y, m, mean), (x, gate, m)


def _scale_and_squeeze_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    x, gate, m = res
    ct_y, ct_m, ct_mean = cts
    d_y = ct_y.astype(m.dtype) + ct_mean / x.shape[-1]
    d_y += _to_ties(_product(x, gate), m, ct_m, CHANNEL)
    d_gate = _sum(x.astype(m.dtype) * d_y, SPATIAL)
    return (d_y * gate.astype(m.dtype)).astype(x.dtype), d_gate.astype(gate.dtype)


scale_and_squeeze.defvjp(_scale_and_squeeze_fwd, _scale_and_squeeze_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    """A convolution that keeps H and W, for very few channels: a banded product.

    ``maps`` is ``(..., H, W, M)``, ``kernel`` ``(kh, kw, M, O)`` of odd sizes and the
    result ``(..., H, W, O)``. The taps along W are one product of all windows of a row
    with a matrix that holds each row of the kernel at every offset; those along H are
    kh shifted additions. Windows come from tiles, so a pixel of a wide map costs no
    more than one of a narrow map.
    """
    *batch, h, w, _ = maps.shape
    kh, kw, _, o = kernel.shape
    windows, tile = _windows(maps, kw)
    matrix = _einsum("ijmo,jvt->vmito", kernel, _band(kw, tile, kernel.dtype))
    matrix = matrix.reshape(windows.shape[-1], kh * tile * o)
    rows = _matmul(windows, matrix, precision)
    rows = rows.reshape(*batch, h, -1, kh, tile * o)
    rows = _pad(rows, -4, kh // 2, kh // 2)
    out = reduce(jnp.add, [rows[..., i : i + h, :, i, :] for i in range(kh)])
    return out.reshape(*batch, h, -1, o)[..., :w, :].astype(maps.dtype)


def _conv_fwd(
    maps: Array, kernel: Array, precision: lax.PrecisionLike
) -> tuple[Array, tuple[Array, Array]]:
    return conv(maps, kernel, precision), (maps, kernel)


def _conv_bwd(
    precision: lax.PrecisionLike, res: tuple[Array, Array], ct: Array
) -> tuple[Array, Array]:
    maps, kernel = res
    h, w = maps.shape[-3:-1]
    kh, kw, m, o = kernel.shape
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    d_maps = conv(ct, flipped, precision)
    # The gradient of `rows` is `ct` at kh offsets along H, and that of `matrix` one
    # product with the windows, whose band is then summed along its diagonals.
    windows, tile = _windows(maps, kw)
    ct = _pad(_pad(ct, -3, kh // 2, kh // 2), -2, 0, -w % tile)
    d_rows = jnp.stack([ct[..., i : i + h, :, :] for i in reversed(range(kh))], -4)
    d_rows = d_rows.reshape(*ct.shape[:-3], kh, h, -1, tile * o)
    d_rows = jnp.moveaxis(d_rows, -4, -2).reshape(-1, kh * tile * o)
    windows = windows.reshape(-1, windows.shape[-1])
    d_matrix = _matmul(windows.T, d_rows, precision).reshape(-1, m, kh, tile, o)
    d_kernel = _einsum("vmito,jvt->ijmo", d_matrix, _band(kw, tile, d_matrix.dtype))
    return d_maps, d_kernel.astype(kernel.dtype)


conv.defvjp(_conv_fwd, _conv_bwd)


def _matmul(x: Array, y: Array, precision: lax.PrecisionLike) -> Array:
    return jnp.matmul(x, y, precision=precision, preferred_element_type=wide(x))


def _windows(maps: Array, k: int) -> tuple[Array, int]:
    """Windows of ``tile + k - 1`` columns, one every ``tile`` columns, and ``tile``.

    ``(..., H, W, M)`` becomes ``(..., H, tiles, (tile + k - 1) * M)``.
    """
    *batch, w, m = maps.shape
    # A window's last k - 1 columns lie in the next tile. Tiles of about equal width
    # leave little to fill up.
    # A width that export leaves open gets whole tiles.
    tile = max(-(-w // -(-w // TILE)) if isinstance(w, int) else TILE, k - 1)
    tiles = -(-w // tile)
    padded = _pad(maps, -2, k // 2, (tiles + 1) * tile - w - k // 2)
    padded = padded.reshape(*batch, tiles + 1, tile * m)
    heads = padded[..., 1:, : (k - 1) * m]
    return jnp.concatenate([padded[..., :-1, :], heads], axis=-1), tile


def _band(k: int, tile: int, dtype: jnp.dtype) -> Array:
    """``[j, v, t]``: whether tap j of column t falls on column v of the window."""
    offsets = np.arange(tile + k - 1)[:, None] - np.arange(tile)
    return jnp.asarray(offsets == np.arange(k)[:, None, None], dtype)


def _size(x: Array, axes: Axes) -> int:
    return math.prod(x.shape[a] for a in axes)


def _pad(x: Array, axis: int, before: int, after: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return jnp.pad(x, pads)


def _exact(x: Array) -> Array:
    """``x`` in ``wide(x)``, rounded to what its own dtype can hold."""
    info = jnp.finfo(x.dtype)
    if info.bits >= 32:
        return x
    return lax.reduce_precision(x.astype(wide(x)), info.nexp, info.nmant)


def _product(x: Array, gate: Array) -> Array:
    return _exact(x) * _exact(gate)


def _to_ties(y: Array, m: Array, ct: Array, axes: Axes) -> Array:
    """Shares ``ct`` evenly between the elements of ``y`` that equal ``m``."""
    mask = (y == m).astype(ct.dtype)
    return mask * (ct / _sum(mask, axes))


# XLA's CPU backend emits slow loops for most sums of a computed operand, where it has
# fast products; elsewhere a sum fuses what it sums. So each sum has two forms. The
# products are over maps of shape (N, HW, C): with H and W apart, they would transpose.


def _sum(x: Array, axes: Axes) -> Array:
    """The sum over ``axes``, which stay with size 1."""

    def by_product(x: Array) -> Array:
        rows = _rows(x)
        if axes == SPATIAL:
            y = _einsum("nkc,nk->nc", rows, jnp.ones(rows.shape[:2], x.dtype))
        else:
            y = _einsum("nkc,c->nk", rows, jnp.ones(x.shape[-1], x.dtype))
        return y.reshape(_reduced(x, axes))

    return lax.platform_dependent(
        x, cpu=by_product, default=lambda x: x.sum(axes, keepdims=True)
    )


def _sum_of_product(x: Array, y: Array) -> Array:
    """``(x * y).sum(-1, keepdims=True)`` for two feature maps."""

    def by_product(x: Array, y: Array) -> Array:
        z = _einsum("nkc,nkc->nk", _rows(x), _rows(y))
        return z.reshape(_reduced(x, CHANNEL))

    return lax.platform_dependent(
        x, y, cpu=by_product, default=lambda x, y: (x * y).sum(-1, keepdims=True)
    )


def _mean_of_gated(x: Array, gate: Array) -> Array:
    """``(x * gate).mean(-1, keepdims=True)`` for a map and a channel gate."""
    x, gate = x.astype(wide(x)), gate.astype(wide(x)) / x.shape[-1]

    def by_product(x: Array, gate: Array) -> Array:
        y = _einsum("nkc,nc->nk", _rows(x), gate.reshape(-1, x.shape[-1]))
        return y.reshape(_reduced(x, CHANNEL))

    return lax.platform_dependent(
        x,
        gate,
        cpu=by_product,
        default=lambda x, gate: (x * gate).sum(-1, keepdims=True),
    )


def _rows(x: Array) -> Array:
    return x.reshape(-1, math.prod(x.shape[-3:-1]), x.shape[-1])


def _reduced(x: Array, axes: Axes) -> tuple[int, ...]:
    return tuple(1 if i - x.ndim in axes else n for i, n in enumerate(x.shape))


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision="highest")
