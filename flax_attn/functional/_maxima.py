"""Maxima over H and W or over C, and where they are.

The gradient of a maximum is never lost: one kernel determines the index of the maximum
from a single copy of the values, and the backward pass uses only this index. On CPU the
kernel is a branch of a conditional, across which XLA does not fuse; elsewhere it is one
reduction over values and indices.
"""

import functools
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_attn.functional import _sums
from flax_attn.functional._sums import (
    SPATIAL,
    Array,
    Axes,
    accumulator,
    itself,
    part_of,
    reduced_shape,
    rows_of,
    size_of,
    slicing,
    sum_of_gated,
    sum_over,
    widen,
)


def decide(
    function: Callable[..., Array], otherwise: Callable[..., Array], *arrays: Array
) -> Array:
    """``function(*arrays)``, computed once, from one copy of the arrays.

    ``otherwise`` is the same function in other operations, for arrays whose sum is NaN,
    so that the compiler cannot know which of the two will run.
    """

    @jax.custom_batching.custom_vmap
    def decision(*arrays: Array) -> Array:
        # Sums of all elements, since single ones can be constants, such as padding:
        # then the compiler would know the branch and fuse across it.
        sums = [a.sum(dtype=accumulator(a)) for a in arrays]
        ordered = reduce(jnp.logical_and, [total == total for total in sums])
        return lax.cond(ordered, function, otherwise, *arrays)

    @decision.def_vmap
    def batched(
        size: int, is_batched: list[bool], *arrays: Array
    ) -> tuple[Array, bool]:
        return decision(*_all_batched(size, is_batched, arrays)), True

    return decision(*map(lax.stop_gradient, arrays))


def _all_batched(
    size: int, is_batched: list[bool], arrays: tuple[Array, ...]
) -> list[Array]:
    return [
        a if batched else jnp.broadcast_to(a, (size, *a.shape))
        for a, batched in zip(arrays, is_batched, strict=True)
    ]


@functools.cache
def squeezes_of(
    function: Callable[..., Array], axes: Axes, with_index: bool
) -> Callable[..., tuple[Array, ...]]:
    """Maps ``(..., H, W, C)`` to ``function``'s sum over ``axes`` and its maximum.

    Both are in the dtype of ``accumulator``, and ``axes`` stay with size 1. With
    ``with_index``, the position of the maximum follows: that of a pixel, counted row by
    row, or of a channel. Under ``vmap`` the new axis is one more leading axis, since a
    branch must not become a select.
    """

    @jax.custom_batching.custom_vmap
    def squeezes(*maps: Array) -> tuple[Array, ...]:
        forms = (_squeezes_by_branch, squeezes_on_gpu, squeezes_by_reduction)
        cpu, gpu, default = (partial(f, function, axes, with_index) for f in forms)
        return lax.platform_dependent(
            *maps, cpu=cpu, cuda=gpu, rocm=gpu, default=default
        )

    @squeezes.def_vmap
    def batched(
        size: int, is_batched: list[bool], *maps: Array
    ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        results = squeezes(*_all_batched(size, is_batched, maps))
        return results, (True,) * len(results)

    return squeezes


def squeezes_by_reduction(
    function: Callable[..., Array], axes: Axes, with_index: bool, *maps: Array
) -> tuple[Array, ...]:
    """By one reduction, which reads the maps once."""
    y = widen(function(*maps))  # All of one reduction has one precision on TPU.
    zero, lowest = jnp.zeros((), y.dtype), jnp.asarray(-jnp.inf, y.dtype)
    if not with_index:
        return _reduce((y, y), (zero, lowest), _add_and_larger, axes)
    index, last = _indices(y, axes)
    starts = zero, lowest, last
    return _reduce((y, y, index), starts, _add_and_first_of_largest, axes)


def squeezes_on_gpu(
    function: Callable[..., Array], axes: Axes, with_index: bool, *maps: Array
) -> tuple[Array, ...]:
    """As ``squeezes_by_reduction``, but the sum over H and W on its own.

    On GPU one reduction of three arrays over H and W takes longer than two and one.
    """
    if axes != SPATIAL or not with_index:
        return squeezes_by_reduction(function, axes, with_index, *maps)
    y = widen(function(*maps))
    index, last = _indices(y, axes)
    starts = jnp.asarray(-jnp.inf, y.dtype), last
    peaks = _reduce((y, index), starts, _first_of_largest, axes)
    return y.sum(axes, keepdims=True), *peaks


def _indices(y: Array, axes: Axes) -> tuple[Array, Array]:
    """The position of each element, and the one after the last."""
    index = jnp.broadcast_to(positions(y.shape, axes), y.shape)
    # Of the array's own type, whatever mesh it is on.
    return index, jnp.asarray(size_of(y.shape, axes), jnp.int32)


def _reduce(
    operands: tuple[Array, ...],
    starts: tuple[Array, ...],
    combine: Callable[..., Any],
    axes: Axes,
) -> tuple[Array, ...]:
    shape = operands[0].shape
    results = lax.reduce(operands, starts, combine, tuple(a % len(shape) for a in axes))
    return tuple(a.reshape(reduced_shape(shape, axes)) for a in results)


def _add_and_larger(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return a[0] + b[0], jnp.maximum(a[1], b[1])


def _add_and_first_of_largest(
    a: tuple[Array, ...], b: tuple[Array, ...]
) -> tuple[Array, ...]:
    return a[0] + b[0], *_first_of_largest(a[1:], b[1:])


def _first_of_largest(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    (v, i), (w, j) = a, b
    # NaN is the largest, and of equals the first one wins.
    wins = (w > v) | ((w != w) & (v == v))
    wins |= ((w == v) | ((w != w) & (v != v))) & (j < i)
    return jnp.where(wins, w, v), jnp.where(wins, j, i)


def _squeezes_by_branch(
    function: Callable[..., Array], axes: Axes, with_index: bool, *maps: Array
) -> tuple[Array, ...]:
    """The sum, the maximum, then the first element equal to it, from stored maps.

    ``function`` is the identity or one product, which is rounded the same wherever it
    is computed. XLA's CPU backend is slow at a maximum of values that it computes, may
    lose NaN in it, and may fail to compile a reduction of several arrays (jax 0.12.0.1:
    results of different layouts).
    """
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = size_of(shape, axes)
    axis, slices = slicing(axes, size)

    def by_comparison(*rows: Array) -> tuple[Array, ...]:
        m = _max_of_rows(function, axis, slices, size, *rows)
        if not with_index:
            return (m,)
        step = -(-size // slices)
        keys = []
        for start in _starts(size, slices, step):
            part = function(*part_of(rows, axis, start, start + step))
            along = (1, step, 1) if axis == 1 else (1, 1, step)
            i = start + lax.broadcasted_iota(jnp.int32, along, axis)
            keys.append(jnp.where(part == m, i, size))
        return m, _min_of_rows(reduce(jnp.minimum, keys), axis)

    def with_nan(*rows: Array) -> tuple[Array, ...]:
        y = function(*rows)
        has_nan = (y != y).any(axis, keepdims=True)
        m = jnp.where(has_nan, jnp.nan, y.max(axis, keepdims=True))
        i = lax.broadcasted_iota(jnp.int32, y.shape, axis)
        keys = jnp.where(jnp.where(has_nan, y != y, y == m), i, size)
        return (m, keys.min(axis, keepdims=True))[: 1 + with_index]

    sums = sum_over(maps[0], axes) if function is itself else sum_of_gated(*maps)
    total = sums.sum()
    rows = [rows_of(a) for a in maps]
    results = lax.cond(total == total, by_comparison, with_nan, *rows)
    m, *index = (a.reshape(reduced_shape(shape, axes)) for a in results)
    return sums, widen(m), *index


def _max_of_rows(
    function: Callable[..., Array], axis: int, slices: int, size: int, *rows: Array
) -> Array:
    if _sums.FAST_REDUCTIONS:
        return function(*rows).max(axis, keepdims=True)
    # The last slice overlaps the one before where they do not divide the axis.
    step = -(-size // slices)
    parts = [
        function(*part_of(rows, axis, start, start + step))
        for start in _starts(size, slices, step)
    ]
    return reduce(jnp.maximum, parts).max(axis, keepdims=True)


def _min_of_rows(rows: Array, axis: int) -> Array:
    # XLA's CPU backend may compute the operand of a reduction over rows in a slow loop,
    # at a few of many shapes. Slices are always one fast loop.
    while axis == 1 and isinstance(rows.shape[1], int) and rows.shape[1] > 1:
        size = rows.shape[1]
        slices = min(size, 4)
        step = -(-size // slices)
        parts = [rows[:, i : i + step] for i in _starts(size, slices, step)]
        rows = reduce(jnp.minimum, parts)
    return rows.min(axis, keepdims=True)


def _starts(size: int, slices: int, step: int) -> list[int]:
    return [min(i * step, size - step) for i in range(slices)] if slices > 1 else [0]


def at_peak(shape: tuple[int, ...], axes: Axes, index: Array, ct: Array) -> Array:
    """``ct`` at the positions ``index``, and zero elsewhere."""
    index, ct = found(index, size_of(shape, axes), ct)
    return jnp.where(positions(shape, axes) == index, ct, 0)


def found(index: Array, size: int, ct: Array) -> tuple[Array, Array]:
    """``index`` and ``ct``; for an index beyond the end, the last one, and NaN."""
    return jnp.minimum(index, size - 1), jnp.where(index < size, ct, jnp.nan)


def positions(shape: tuple[int, ...], axes: Axes) -> Array:
    """Where an element is along ``axes``, broadcasting to ``shape``."""
    position = jnp.zeros((1, 1, 1), jnp.int32)
    for axis in axes:
        along = tuple(shape[i] if i == axis else 1 for i in (-3, -2, -1))
        iota = lax.broadcasted_iota(jnp.int32, along, 3 + axis)
        position = position * shape[axis] + iota
    return position.reshape((1,) * (len(shape) - 3) + position.shape)
