"""Convolutions with very few channels, with gradients.

XLA on CPU uses slow loops for convolutions with one or two channels, and their weight
gradient takes minutes to compile for a TPU. There they are banded matrix products. The
matrix has zeros that multiply values of other windows, so a product is exact only where
all values are finite; otherwise the convolution is a sum over the taps.

On a GPU the host would wait for the answer and launch nothing meanwhile, an eighth of
the time of a ResNet-20's step. There one kernel sums over the taps in any case.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_attn.functional._sums import Array, accumulator, einsum_exactly, widen

# Columns that a window of the banded product makes: it does (TILE + k - 1) / k times
# the convolution's arithmetic, at the speed of a product.
TILE = 16


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    """A convolution that keeps H and W, for very few channels.

    ``maps`` is ``(..., H, W, M)``, ``kernel`` ``(kh, kw, M, O)`` of odd sizes and the
    result ``(..., H, W, O)``.
    """
    gpu = partial(_by_taps, unroll=True)  # One function: one branch for both.
    product = partial(_if_finite, partial(_banded, precision), _by_taps)
    return lax.platform_dependent(maps, kernel, cuda=gpu, rocm=gpu, default=product)


def _banded(precision: lax.PrecisionLike, maps: Array, kernel: Array) -> Array:
    """By a banded product, for finite maps.

    The taps along W are one product of all windows of a row with a matrix that holds
    each row of the kernel at every offset; those along H are kh shifted additions.
    Windows come from tiles, so a pixel of a wide map costs no more than one of a narrow
    map.
    """
    *batch, h, w, _ = maps.shape
    kh, kw, _, o = kernel.shape
    windows, tile = _windows(maps, kh, kw)
    matrix = einsum_exactly("ijmo,jvt->vmito", kernel, _band(kw, tile, kernel.dtype))
    matrix = matrix.reshape(windows.shape[-1], kh * tile * o)
    rows = _matmul(windows, matrix, precision)
    n = windows.shape[-2]
    rows = rows.reshape(*batch, h + kh - 1, n, kh, tile * o)
    out = reduce(jnp.add, [rows[..., i : i + h, :, i, :] for i in range(kh)])
    return out.reshape(*batch, h, n * tile, o)[..., :w, :].astype(maps.dtype)


def _conv_fwd(
    maps: Array, kernel: Array, precision: lax.PrecisionLike
) -> tuple[Array, tuple[Array, Array]]:
    return conv(maps, kernel, precision), (maps, kernel)


def _conv_bwd(
    precision: lax.PrecisionLike, res: tuple[Array, Array], ct: Array
) -> tuple[Array, Array]:
    windows, rows, taps = (
        partial(f, precision) for f in (_bwd_by_windows, _bwd_by_rows, _bwd_by_taps)
    )
    d_maps, d_kernel = lax.platform_dependent(
        *res,
        ct,
        cpu=partial(_if_finite, windows, taps),
        cuda=_bwd_in_kernels,
        rocm=_bwd_in_kernels,
        default=partial(_if_finite, rows, taps),
    )
    return d_maps.astype(res[0].dtype), d_kernel.astype(res[1].dtype)


def _bwd_by_windows(
    precision: lax.PrecisionLike, maps: Array, kernel: Array, ct: Array
) -> tuple[Array, Array]:
    """With the taps along H in the windows of ``ct`` too, which both gradients share.

    On CPU this takes fewer passes; a TPU would pad the windows to its tiles.
    """
    h, w, m = maps.shape[-3:]
    kh, kw, _, o = kernel.shape
    windows, tile = _windows(ct, kh, kw)
    n = windows.shape[-2]
    windows = jnp.stack([windows[..., i : i + h, :, :] for i in range(kh)], -2)
    windows = windows.reshape(math.prod(ct.shape[:-2]) * n, kh * windows.shape[-1])
    # A convolution of `ct` with the flipped kernel. The gradient of its matrix is the
    # product of the windows with `maps`.
    band = _band(kw, tile, kernel.dtype)
    matrix = einsum_exactly("ijmo,jvt->ivotm", kernel[::-1, ::-1], band)
    d_maps = _matmul(windows, matrix.reshape(-1, tile * m), precision)
    d_maps = d_maps.reshape(*maps.shape[:-2], n * tile, m)[..., :w, :]
    tiles = _pad(maps, -2, 0, n * tile - w)
    tiles = tiles.reshape(windows.shape[0], tile * m)
    d_matrix = _matmul(windows.T, tiles, precision).reshape(kh, -1, o, tile, m)
    d_kernel = _sums_of_diagonals(jnp.moveaxis(d_matrix, (1, 3), (0, 1)), kw)
    return d_maps, d_kernel[::-1, ::-1].transpose(1, 0, 3, 2)


def _bwd_by_rows(
    precision: lax.PrecisionLike, maps: Array, kernel: Array, ct: Array
) -> tuple[Array, Array]:
    h, w, m = maps.shape[-3:]
    kh, kw, _, o = kernel.shape
    d_maps = _banded(precision, widen(ct), _transposed(kernel))
    # The gradient of `rows` is `ct` at kh offsets along H, and that of `matrix` one
    # product with the windows, whose band is then summed along its diagonals.
    windows, tile = _windows(maps, 1, kw)
    n = windows.shape[-2]
    ct = _pad(_pad(ct, -3, kh // 2, kh // 2), -2, 0, n * tile - w)
    d_rows = jnp.stack([ct[..., i : i + h, :, :] for i in reversed(range(kh))], -4)
    d_rows = d_rows.reshape(*ct.shape[:-3], kh, h, n, tile * o)
    d_rows = jnp.moveaxis(d_rows, -4, -2).reshape(-1, kh * tile * o)
    windows = windows.reshape(-1, windows.shape[-1])
    d_matrix = _matmul(windows.T, d_rows, precision).reshape(-1, m, kh, tile, o)
    d_kernel = _sums_of_diagonals(jnp.moveaxis(d_matrix, 3, 1), kw)
    return d_maps, d_kernel.transpose(2, 0, 1, 3)


def _sums_of_diagonals(d_matrix: Array, k: int) -> Array:
    """``[j, ...]``, the sum of ``[t + j, t, ...]`` over all t.

    By selection, since elsewhere the product of two large values may be infinite.
    """
    tile = d_matrix.shape[1]
    band = _band(k, tile, jnp.dtype(bool)).reshape(k, -1, tile, *(1,) * 3)
    return jnp.where(band, d_matrix[None], 0).sum((1, 2))


def _bwd_in_kernels(maps: Array, kernel: Array, ct: Array) -> tuple[Array, Array]:
    """Each gradient in one kernel of a GPU, which stores no windows."""
    d_maps = _by_taps(widen(ct), _transposed(kernel), unroll=True)
    h, w = maps.shape[-3:-1]
    kh, kw = kernel.shape[:2]
    rows = jnp.arange(h)[:, None, None, None] + jnp.arange(kh)[None, None, :, None]
    columns = jnp.arange(w)[None, :, None, None] + jnp.arange(kw)[None, None, None]
    # Read by index, which XLA fuses into the sum; slices or a convolution it stores.
    windows = _padded(widen(maps), kh, kw).at[..., rows, columns, :]
    products = windows.get(mode="promise_in_bounds")[..., None] * widen(
        ct[..., None, None, None, :]
    )
    return d_maps, products.sum(tuple(range(products.ndim - 4)))


conv.defvjp(_conv_fwd, _conv_bwd)


def _conv_1d(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    return conv(maps[..., None, :, :], kernel[None], precision)[..., 0, :, :]


def _conv_3d(maps: Array, kernel: Array, precision: lax.PrecisionLike) -> Array:
    """Each slice of the kernel over H and W at once, then shifted sums along D."""
    kd, kh, kw, m, o = kernel.shape
    d, dtype = maps.shape[-4], accumulator(maps)
    flat = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, m, kd * o)
    planes = conv(maps.astype(dtype), flat.astype(dtype), precision)
    pads = [(0, 0)] * planes.ndim
    pads[-4] = (kd // 2, kd // 2)
    planes = jnp.pad(planes, pads)
    slices = [planes[..., i : i + d, :, :, i * o : (i + 1) * o] for i in range(kd)]
    return sum(slices[1:], slices[0]).astype(maps.dtype)


# By the number of spatial axes.
CONVS: dict[int, Callable[..., Array]] = {1: _conv_1d, 2: conv, 3: _conv_3d}


@jax.custom_batching.custom_vmap
def _are_finite(*arrays: Array) -> Array:
    """Whether all values, under ``vmap`` of all samples, are finite.

    A sum of sizes is small only if each of them is. By half, since a product in a lower
    precision with the same exponents may round the largest numbers to infinity.
    """
    sizes = [jnp.abs(widen(a)).sum() for a in arrays]
    return reduce(jnp.logical_and, [s < jnp.finfo(s.dtype).max / 2 for s in sizes])


@_are_finite.def_vmap
def _are_finite_in_batches(
    size: int, is_batched: list[bool], *arrays: Array
) -> tuple[Array, bool]:
    return _are_finite(*arrays), False


def _if_finite(
    banded: Callable[..., Any], by_taps: Callable[..., Any], *arrays: Array
) -> Any:
    # Infinity and NaN times a zero of the band would be NaN in all of a window.
    finite = _are_finite(*lax.stop_gradient(arrays))
    return lax.cond(finite, banded, by_taps, *arrays)


def _taps(maps: Array, kernel: Array) -> Callable[[Array], tuple[Array, Array]]:
    """Maps a tap's number to the part of ``maps`` that it sees and its weights."""
    h, w = maps.shape[-3:-1]
    kh, kw = kernel.shape[:2]
    padded = _padded(maps, kh, kw)

    def tap(t: Array) -> tuple[Array, Array]:
        i, j = t // kw, t % kw
        rows = lax.dynamic_slice_in_dim(padded, i, h, axis=maps.ndim - 3)
        part = lax.dynamic_slice_in_dim(rows, j, w, axis=maps.ndim - 2)
        return part, kernel[i, j]

    return tap


def _by_taps(maps: Array, kernel: Array, *, unroll: bool = False) -> Array:
    """As a sum over the taps, one after the other."""
    kh, kw, m, o = kernel.shape
    tap = _taps(widen(maps), widen(kernel))

    def term(t: Array) -> Array:
        part, weights = tap(t)
        weights = weights.reshape(m, *(1,) * (part.ndim - 1), o)
        return reduce(jnp.add, [part[..., c, None] * weights[c] for c in range(m)])

    y = lax.fori_loop(
        1, kh * kw, lambda t, y: y + term(t), term(jnp.int32(0)), unroll=unroll
    )
    return y.astype(maps.dtype)


def _bwd_by_taps(
    precision: lax.PrecisionLike, maps: Array, kernel: Array, ct: Array
) -> tuple[Array, Array]:
    tap = _taps(maps, kernel)

    def slope(t: Array) -> Array:
        part, _ = tap(t)
        rows = part.reshape(-1, part.shape[-1])
        return _matmul(rows.T, ct.reshape(-1, ct.shape[-1]), precision)

    d_kernel = lax.map(slope, jnp.arange(kernel.shape[0] * kernel.shape[1]))
    return _by_taps(widen(ct), _transposed(kernel)), d_kernel.reshape(kernel.shape)


def _transposed(kernel: Array) -> Array:
    """The kernel of the gradient of the maps."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _matmul(x: Array, y: Array, precision: lax.PrecisionLike) -> Array:
    return jnp.matmul(x, y, precision=precision, preferred_element_type=accumulator(x))


def _windows(maps: Array, kh: int, kw: int) -> tuple[Array, int]:
    """Windows of ``tile + kw - 1`` columns, one every ``tile`` columns, and ``tile``.

    ``(..., H, W, M)`` becomes ``(..., H + kh - 1, tiles, (tile + kw - 1) * M)``.
    """
    *batch, h, w, m = maps.shape
    # A window's last kw - 1 columns lie in the next tile. Tiles of about equal width
    # leave little to fill up. A width that export leaves open gets whole tiles.
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


def _padded(maps: Array, kh: int, kw: int) -> Array:
    return _pad(_pad(maps, -3, kh // 2, kh // 2), -2, kw // 2, kw // 2)


def _pad(x: Array, axis: int, before: int, after: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return jnp.pad(x, pads)
