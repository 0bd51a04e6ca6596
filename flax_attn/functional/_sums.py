"""Sums over H and W or over C, in few passes and with small rounding errors.

XLA's CPU backend materializes the operand of a sum, or emits slow loops, but it is fast
at matrix products and elementwise loops. So each sum has two forms. The products use
maps of shape (N, HW, C), since separate H and W axes would cause a transpose.
"""

import math
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Axes = tuple[int, ...]

SPATIAL: Axes = (-3, -2)
CHANNEL: Axes = (-1,)

# Slices that a reduction is cut into on CPU. From 15 on, XLA stores their operand first
# instead of computing it in the loop.
SLICES = 8
# Channels that a slice has at least: a loop over fewer is not vectorized.
LANES = 8
# Elements that are added one after the other at most, which bounds the rounding.
CHAIN = 128
# Elements of a sample below which XLA's CPU backend sums faster than a product.
SMALL = 2**15
# Whether XLA's CPU backend reduces a stored map fast; older ones take as long as ten
# copies.
FAST_REDUCTIONS = jax.__version_info__ >= (0, 10, 2)


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or wider where an array is wider."""
    # By hand, since strict promotion refuses even this.
    is_double = any(a.dtype == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def sum_over(x: Array, axes: Axes) -> Array:
    """The sum of ``x`` in ``accumulator(x)`` over ``axes``, which stay with size 1."""
    size = math.prod(x.shape[-3:])
    if x.dtype == accumulator(x) and isinstance(size, int):
        # A product begins anew with each sample, which small ones do not make up for.
        if axes == SPATIAL and FAST_REDUCTIONS and size < SMALL:
            return x.sum(axes, keepdims=True)
        if axes == CHANNEL and x.shape[-1] <= CHAIN:
            return sum_of(widen, axes, x, slices=1)
        if axes == SPATIAL and _chain(size_of(x.shape, axes)) >= LANES:
            return _sum_of_stored(x)
    return sum_of(widen, axes, x)


def _sum_of_stored(x: Array) -> Array:
    """The sum over H and W of what lies in memory, which a product reads in place.

    A product sums equally spaced pixels; the sums that it leaves are summed likewise.
    """

    def by_products(x: Array) -> Array:
        rows, c = rows_of(x), x.shape[-1]
        while rows.shape[1] > 1:
            n = rows.shape[1]
            chain = _chain(n)
            if chain < LANES:
                rows = _sum_of_rows(itself, 1, min(SLICES, n), n, rows)
                break
            rows = _contract(rows.reshape(-1, chain, n // chain * c), 1)
            rows = rows.reshape(-1, n // chain, c)
        return rows.reshape(reduced_shape(x.shape, SPATIAL))

    def whole(x: Array) -> Array:
        return x.sum(SPATIAL, keepdims=True)

    return lax.platform_dependent(x, cpu=by_products, default=whole)


def _chain(size: int) -> int:
    """The largest divisor of ``size`` that is at most half of ``CHAIN``."""
    # Half, since the roundings of up to four such sums add up: 1e-6 at 1024 x 1024.
    return max(n for n in range(1, min(size, CHAIN // 2) + 1) if size % n == 0)


def sum_of(
    function: Callable[..., Array], axes: Axes, *maps: Array, slices: int = 0
) -> Array:
    """The sum of ``function(*maps)`` over ``axes``, which stay with size 1.

    ``function`` is elementwise, and ``maps`` broadcast to ``(..., H, W, C)``.
    """
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = size_of(shape, axes)

    def whole(*maps: Array) -> Array:
        return function(*maps).sum(axes, keepdims=True)

    if not isinstance(size, int):  # Left open by export.
        return whole(*maps)
    axis, default = slicing(axes, size)
    slices = slices or default

    def by_slices(*maps: Array) -> Array:
        y = _sum_of_rows(function, axis, slices, size, *(rows_of(a) for a in maps))
        return y.reshape(reduced_shape(shape, axes))

    return lax.platform_dependent(*maps, cpu=by_slices, default=whole)


def _sum_of_rows(
    function: Callable[..., Array], axis: int, slices: int, size: int, *rows: Array
) -> Array:
    # One loop computes and adds the slices. What is left is cut up again until a
    # product, which adds one element after the other, sums the little that remains.
    step = size // slices
    parts = [
        function(*part_of(rows, axis, i * step, (i + 1) * step)) for i in range(slices)
    ]
    total = reduce(jnp.add, parts)
    y = (
        _contract(total, axis)
        if step <= CHAIN
        else _sum_of_rows(itself, axis, SLICES, step, total)
    )
    if slices * step != size:
        y += _contract(function(*part_of(rows, axis, slices * step, size)), axis)
    return y


def sum_of_gated(x: Array, gate: Array) -> Array:
    """``(x * gate).sum(-1, keepdims=True)`` for a map and a channel gate."""
    x, gate = widen(x), widen(gate)

    def by_product(x: Array, gate: Array) -> Array:
        y = einsum_exactly("nkc,nc->nk", rows_of(x), gate.reshape(-1, x.shape[-1]))
        return y.reshape(reduced_shape(x.shape, CHANNEL))

    def whole(x: Array, gate: Array) -> Array:
        return (x * gate).sum(-1, keepdims=True)

    return lax.platform_dependent(x, gate, cpu=by_product, default=whole)


def size_of(shape: tuple[int, ...], axes: Axes) -> int:
    return math.prod(shape[a] for a in axes)


def itself(x: Array) -> Array:
    return x


def widen(x: Array) -> Array:
    return jnp.asarray(x, accumulator(x))


def product(x: Array, gate: Array) -> Array:
    return widen(x) * widen(gate)


def slicing(axes: Axes, size: int) -> tuple[int, int]:
    """The axis of (N, HW, C), and the number of slices it is cut into."""
    axis = 1 if axes == SPATIAL else 2
    if not isinstance(size, int):  # Left open by export: one piece.
        return axis, 1
    return axis, min(SLICES, size if axis == 1 else max(size // LANES, 1))


def part_of(rows: tuple[Array, ...], axis: int, start: int, stop: int) -> list[Array]:
    return [
        a if a.shape[axis] == 1 else lax.slice_in_dim(a, start, stop, axis=axis)
        for a in rows
    ]


def _contract(rows: Array, axis: int) -> Array:
    ones = jnp.ones(rows.shape[:2] if axis == 1 else rows.shape[2:], rows.dtype)
    equation = "nkc,nk->nc" if axis == 1 else "nkc,c->nk"
    return jnp.expand_dims(einsum_exactly(equation, rows, ones), axis)


def rows_of(x: Array) -> Array:
    return x.reshape(-1, math.prod(x.shape[-3:-1]), x.shape[-1])


def reduced_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))


def einsum_exactly(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision="highest")
