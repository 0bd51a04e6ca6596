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
from collections.abc import Callable
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

# Slices that a reduction of something computed is cut into on CPU. From 15 on, XLA no
# longer computes an operand of theirs in the loop but stores it first. And the channels
# that one has at least: a loop over fewer is not vectorized.
SLICES = 8
LANES = 8

# Whether XLA's CPU backend reduces a stored map fast. Before, a maximum takes the time
# of ten copies and more.
FAST_REDUCTIONS = jax.__version_info__ >= (0, 10, 2)

# Elements of a sample below which it then sums faster than a product.
SMALL = 2**15


def wide(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or wider where an array is wider."""
    return jnp.result_type(jnp.float32, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean(x: Array, axes: Axes) -> Array:
    """The mean over ``axes``, which stay with size 1, in ``wide(x)``."""
    return _sum(x, axes) / _size(x, axes)


def _mean_fwd(x: Array, axes: Axes) -> tuple[Array, Array]:
    return mean(x, axes), x  # Only its shape and dtype are used.


def _mean_bwd(axes: Axes, x: Array, ct: Array) -> tuple[Array]:
    return (jnp.broadcast_to((ct / _size(x, axes)).astype(x.dtype), x.shape),)


mean.defvjp(_mean_fwd, _mean_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``, which stay with size 1; ties share the gradient."""
    return _max_of(_exact, axes, x).astype(x.dtype)


def _maximum_fwd(x: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    m = _max_of(_exact, axes, x)
    return m.astype(x.dtype), (x, m)


def _maximum_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array]:
    x, m = res
    ct = ct.astype(m.dtype) / _sum_of(_ties, axes, x, m)
    return ((_ties(x, m) * ct).astype(x.dtype),)


maximum.defvjp(_maximum_fwd, _maximum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale(x: Array, gate: Array, axes: Axes) -> Array:
    """``x * gate`` for a gate that has size 1 along ``axes``."""
    return x * gate


def _scale_fwd(x: Array, gate: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    return x * gate, (x, gate)


def _scale_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    x, gate = res
    d_gate = _sum_of(lambda x, ct: _widen(x) * _widen(ct), axes, x, ct)
    return ct * gate, d_gate.astype(gate.dtype)


scale.defvjp(_scale_fwd, _scale_bwd)


@jax.custom_vjp
def scale_and_squeeze(x: Array, gate: Array) -> tuple[Array, Array, Array]:
    """``y = x * gate`` for a channel gate, and the maximum and mean of ``y`` over C.

    The two come in ``wide(x)``, with a last axis of size 1.
    """
    # Another product than `y` to XLA's CPU backend, which else stores it for both.
    maximum = _max_of(_product, CHANNEL, x, lax.optimization_barrier(gate))
    return x * gate, maximum, _mean_of_gated(x, gate)


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
    ct_m = ct_m / _sum_of(_ties_of_gated, CHANNEL, x, gate, m)
    ct_mean = ct_mean / x.shape[-1]

    def d_y(x: Array, gate: Array, m: Array, *cts: Array) -> Array:
        ct_y, ct_m, ct_mean = cts
        return ct_y.astype(m.dtype) + ct_mean + _ties_of_gated(x, gate, m) * ct_m

    maps = (x, gate, m, ct_y, ct_m, ct_mean)
    d_gate = _sum_of(lambda x, *rest: _widen(x) * d_y(x, *rest), SPATIAL, *maps)
    d_x = d_y(*maps) * gate.astype(m.dtype)
    return d_x.astype(x.dtype), d_gate.astype(gate.dtype)


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
    windows, tile = _windows(maps, kh, kw)
    matrix = _einsum("ijmo,jvt->vmito", kernel, _band(kw, tile, kernel.dtype))
    matrix = matrix.reshape(windows.shape[-1], kh * tile * o)
    rows = _matmul(windows, matrix, precision)
    rows = rows.reshape(*batch, h + kh - 1, -1, kh, tile * o)
    out = reduce(jnp.add, [rows[..., i : i + h, :, i, :] for i in range(kh)])
    return out.reshape(*batch, h, -1, o)[..., :w, :].astype(maps.dtype)


def _conv_fwd(
    maps: Array, kernel: Array, precision: lax.PrecisionLike
) -> tuple[Array, tuple[Array, Array]]:
    return conv(maps, kernel, precision), (maps, kernel)


def _conv_bwd(
    precision: lax.PrecisionLike, res: tuple[Array, Array], ct: Array
) -> tuple[Array, Array]:
    d_maps, d_kernel = lax.platform_dependent(
        *res,
        ct,
        cpu=partial(_conv_bwd_by_windows, precision),
        default=partial(_conv_bwd_by_rows, precision),
    )
    return d_maps.astype(res[0].dtype), d_kernel.astype(res[1].dtype)


def _conv_bwd_by_windows(
    precision: lax.PrecisionLike, maps: Array, kernel: Array, ct: Array
) -> tuple[Array, Array]:
    """With the taps along H in the windows of ``ct`` too, which both gradients share.

    A CPU makes fewer passes so; a TPU would pad the windows to its tiles.
    """
    h, w, m = maps.shape[-3:]
    kh, kw, _, o = kernel.shape
    windows, tile = _windows(ct, kh, kw)
    windows = jnp.stack([windows[..., i : i + h, :, :] for i in range(kh)], -2)
    windows = windows.reshape(-1, kh * windows.shape[-1])
    # A convolution of `ct` with the flipped kernel. The gradient of its matrix is the
    # product of the windows with `maps`.
    band = _band(kw, tile, kernel.dtype)
    matrix = _einsum("ijmo,jvt->ivotm", kernel[::-1, ::-1], band)
    d_maps = _matmul(windows, matrix.reshape(-1, tile * m), precision)
    d_maps = d_maps.reshape(*maps.shape[:-2], -1, m)[..., :w, :]
    tiles = _pad(maps, -2, 0, -w % tile).reshape(-1, tile * m)
    d_matrix = _matmul(windows.T, tiles, precision).reshape(kh, -1, o, tile, m)
    d_kernel = _einsum("ivotm,jvt->ijmo", d_matrix, band.astype(d_matrix.dtype))
    return d_maps, d_kernel[::-1, ::-1]


def _conv_bwd_by_rows(
    precision: lax.PrecisionLike, maps: Array, kernel: Array, ct: Array
) -> tuple[Array, Array]:
    h, w, m = maps.shape[-3:]
    kh, kw, _, o = kernel.shape
    d_maps = conv(ct, kernel[::-1, ::-1].swapaxes(2, 3), precision)
    # The gradient of `rows` is `ct` at kh offsets along H, and that of `matrix` one
    # product with the windows, whose band is then summed along its diagonals.
    windows, tile = _windows(maps, 1, kw)
    ct = _pad(_pad(ct, -3, kh // 2, kh // 2), -2, 0, -w % tile)
    d_rows = jnp.stack([ct[..., i : i + h, :, :] for i in reversed(range(kh))], -4)
    d_rows = d_rows.reshape(*ct.shape[:-3], kh, h, -1, tile * o)
    d_rows = jnp.moveaxis(d_rows, -4, -2).reshape(-1, kh * tile * o)
    windows = windows.reshape(-1, windows.shape[-1])
    d_matrix = _matmul(windows.T, d_rows, precision).reshape(-1, m, kh, tile, o)
    d_kernel = _einsum("vmito,jvt->ijmo", d_matrix, _band(kw, tile, d_matrix.dtype))
    # The other form comes in this dtype too.
    return d_maps.astype(wide(maps)), d_kernel


conv.defvjp(_conv_fwd, _conv_bwd)


def _matmul(x: Array, y: Array, precision: lax.PrecisionLike) -> Array:
    return jnp.matmul(x, y, precision=precision, preferred_element_type=wide(x))


def _windows(maps: Array, kh: int, kw: int) -> tuple[Array, int]:
    """Windows of ``tile + kw - 1`` columns, one every ``tile`` columns, and ``tile``.

    ``(..., H, W, M)`` becomes ``(..., H + kh - 1, tiles, (tile + kw - 1) * M)``.
    """
    *batch, h, w, m = maps.shape
    # A window's last kw - 1 columns lie in the next tile. Tiles of about equal width
    # leave little to fill up.
    # A width that export leaves open gets whole tiles.
    tile = max(-(-w // -(-w // TILE)) if isinstance(w, int) else TILE, kw - 1)
    tiles = -(-w // tile)
    padded = _pad(maps, -3, kh // 2, kh // 2)
    padded = _pad(padded, -2, kw // 2, (tiles + 1) * tile - w - kw // 2)
    padded = padded.reshape(*batch, h + kh - 1, tiles + 1, tile * m)
    heads = padded[..., 1:, : (kw - 1) * m]
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


def _widen(x: Array) -> Array:
    return x.astype(wide(x))


def _exact(x: Array) -> Array:
    """``x`` in ``wide(x)``, rounded to what its own dtype can hold."""
    info = jnp.finfo(x.dtype)
    if info.bits >= 32:
        return x
    return lax.reduce_precision(x.astype(wide(x)), info.nexp, info.nmant)


def _product(x: Array, gate: Array) -> Array:
    return _exact(x) * _exact(gate)


def _ties(y: Array, m: Array) -> Array:
    """1 where an element of ``y`` equals the maximum ``m``, and 0 elsewhere."""
    return (_exact(y) == m).astype(m.dtype)


def _ties_of_gated(x: Array, gate: Array, m: Array) -> Array:
    return (_product(x, gate) == m).astype(m.dtype)


# XLA's CPU backend writes out what a sum computes before it sums it, or emits slow
# loops. It has fast products and fast elementwise loops. So each sum has two forms. The
# products are over maps of shape (N, HW, C): with H and W apart, they would transpose.


def _sum(x: Array, axes: Axes) -> Array:
    """The sum of ``x`` in ``wide(x)`` over ``axes``, which stay with size 1."""
    if x.dtype != wide(x):
        return _sum_of(_widen, axes, x)

    def whole(x: Array) -> Array:
        return x.sum(axes, keepdims=True)

    def by_product(x: Array) -> Array:
        return _contract(_rows(x), axes).reshape(_reduced(x.shape, axes))

    # A product begins anew with each sample, which small ones do not make up for.
    size = math.prod(x.shape[-3:])
    if FAST_REDUCTIONS and axes == SPATIAL and isinstance(size, int) and size < SMALL:
        return whole(x)
    return lax.platform_dependent(x, cpu=by_product, default=whole)


def _sum_of(function: Callable[..., Array], axes: Axes, *maps: Array) -> Array:
    """The sum of ``function(*maps)`` over ``axes``, which stay with size 1.

    ``function`` is elementwise, and ``maps`` broadcast to ``(..., H, W, C)``.
    """
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = math.prod(shape[a] for a in axes)
    axis, slices = _slicing(axes, size)
    step = size // slices

    def by_slices(*maps: Array) -> Array:
        # One loop computes and adds the slices; a product sums the little that is left.
        rows = [_rows(a) for a in maps]
        ends = [(i * step, (i + 1) * step) for i in range(slices)]
        parts = [function(*_slice(rows, axis, *pair)) for pair in ends]
        y = _contract(reduce(jnp.add, parts), axes)
        if slices * step != size:
            rest = function(*_slice(rows, axis, slices * step, size))
            y += _contract(rest, axes)
        return y.reshape(_reduced(shape, axes))

    return lax.platform_dependent(
        *maps,
        cpu=by_slices,
        default=lambda *maps: function(*maps).sum(axes, keepdims=True),
    )


def _max_of(function: Callable[..., Array], axes: Axes, *maps: Array) -> Array:
    """The maximum of ``function(*maps)``, as ``_sum_of`` is the sum."""

    def whole(*maps: Array) -> Array:
        return function(*maps).max(axes, keepdims=True)

    if FAST_REDUCTIONS:
        return whole(*maps)
    return lax.platform_dependent(
        *maps, cpu=partial(_max_by_slices, function, axes), default=whole
    )


def _max_by_slices(function: Callable[..., Array], axes: Axes, *maps: Array) -> Array:
    """For CPU, without ``FAST_REDUCTIONS``."""
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = math.prod(shape[a] for a in axes)
    axis, slices = _slicing(axes, size)
    step = -(-size // slices)
    rows = [_rows(a) for a in maps]
    # The last slice overlaps the one before where they do not divide the axis.
    starts = [min(i * step, size - step) for i in range(slices)]
    parts = [function(*_slice(rows, axis, i, i + step)) for i in starts]
    return reduce(jnp.maximum, parts).max(axis).reshape(_reduced(shape, axes))


def _slicing(axes: Axes, size: int) -> tuple[int, int]:
    """The axis of (N, HW, C), and the number of slices it is cut into."""
    axis = 1 if axes == SPATIAL else 2
    if not isinstance(size, int):  # Left open by export: one piece.
        return axis, 1
    return axis, min(SLICES, size if axis == 1 else max(size // LANES, 1))


def _slice(rows: list[Array], axis: int, start: int, stop: int) -> list[Array]:
    return [
        a if a.shape[axis] == 1 else lax.slice_in_dim(a, start, stop, axis=axis)
        for a in rows
    ]


def _contract(rows: Array, axes: Axes) -> Array:
    if axes == SPATIAL:
        return _einsum("nkc,nk->nc", rows, jnp.ones(rows.shape[:2], rows.dtype))
    return _einsum("nkc,c->nk", rows, jnp.ones(rows.shape[-1], rows.dtype))


def _mean_of_gated(x: Array, gate: Array) -> Array:
    """``(x * gate).mean(-1, keepdims=True)`` for a map and a channel gate."""
    x, gate = _widen(x), gate.astype(wide(x)) / x.shape[-1]

    def by_product(x: Array, gate: Array) -> Array:
        y = _einsum("nkc,nc->nk", _rows(x), gate.reshape(-1, x.shape[-1]))
        return y.reshape(_reduced(x.shape, CHANNEL))

    return lax.platform_dependent(
        x,
        gate,
        cpu=by_product,
        default=lambda x, gate: (x * gate).sum(-1, keepdims=True),
    )


def _rows(x: Array) -> Array:
    return x.reshape(-1, math.prod(x.shape[-3:-1]), x.shape[-1])


def _reduced(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision="highest")
