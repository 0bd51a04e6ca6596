"""The squeezes and the product with a gate in few passes, gradients stated by hand.

The blocks do almost no arithmetic: their time is the number of passes over the feature
map. Automatic differentiation would keep masks and products as large as the map, and
XLA's CPU backend emits slow loops for the reductions of a product. Each function here
equals its plain counterpart in ``functional``; reverse mode only.

Why no gradient of a maximum can be lost: one kernel decides which element it is, from
one copy of the values, and only the integer index travels to the backward pass. On CPU
that kernel is a branch of a conditional, whose operands lie in memory that no fusion
crosses; elsewhere it is one reduction of (value, index) pairs.
"""

import functools
import math
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Axes = tuple[int, ...]

SPATIAL: Axes = (-3, -2)
CHANNEL: Axes = (-1,)

# Slices that a reduction is cut into on CPU. From 15 on, XLA no longer computes an
# operand of theirs in the loop but stores it first.
SLICES = 8
# Channels that a slice has at least: a loop over fewer is not vectorized.
LANES = 8
# Elements that are added one after the other at most, which bounds the rounding.
CHAIN = 128
# Elements of a sample below which XLA's CPU backend sums faster than a product.
SMALL = 2**15
# Whether XLA's CPU backend reduces a stored map fast; before, it takes ten copies.
FAST_REDUCTIONS = jax.__version_info__ >= (0, 10, 2)


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or wider where an array is wider."""
    # By hand, since strict promotion refuses even this.
    is_double = any(a.dtype == jnp.float64 for a in arrays)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean(x: Array, axes: Axes) -> Array:
    """The mean over ``axes``, which stay with size 1, in ``accumulator(x)``."""
    return _sum(x, axes) / _size(x.shape, axes)


def _mean_fwd(x: Array, axes: Axes) -> tuple[Array, Array]:
    return mean(x, axes), x  # Only its shape and dtype are used.


def _mean_bwd(axes: Axes, x: Array, ct: Array) -> tuple[Array]:
    ct = (ct / _size(x.shape, axes)).astype(x.dtype)
    return (jnp.broadcast_to(ct, x.shape),)


mean.defvjp(_mean_fwd, _mean_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def maximum(x: Array, axes: Axes) -> Array:
    """The maximum over ``axes``, which stay with size 1.

    The first element that attains it takes the whole gradient.
    """
    return _max(_itself, axes, x)


def _maximum_fwd(x: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    m, index = peak(x, axes)
    return m, (x, index)


def _maximum_bwd(axes: Axes, res: tuple[Array, Array], ct: Array) -> tuple[Array]:
    x, index = res
    return (_at_peak(x.shape, axes, index, ct).astype(x.dtype),)


maximum.defvjp(_maximum_fwd, _maximum_bwd)


# With a rule of its own, so that derivatives of the gradient are defined too.
@partial(jax.custom_vjp, nondiff_argnums=(1,))
def peak(x: Array, axes: Axes) -> tuple[Array, Array]:
    """The maximum over ``axes`` and the position of the first element attaining it."""
    m, index = _peak(_itself, axes)(x)
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
    return ct * gate, _sum_of(_product, axes, x, ct).astype(gate.dtype)


scale.defvjp(_scale_fwd, _scale_bwd)


@jax.custom_vjp
def scale_and_squeeze(x: Array, gate: Array) -> tuple[Array, Array, Array]:
    """``y = x * gate`` for a channel gate, and the maximum and mean of ``y`` over C.

    The two come in ``accumulator(x)``, with a last axis of size 1.
    """
    # Another product than `y` to XLA's CPU backend, which else stores it for both.
    m = _max(_product, CHANNEL, x, lax.optimization_barrier(gate))
    return x * gate, m, _mean_of_gated(x, gate)


def _scale_and_squeeze_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    m, index = _peak_of_gated(x, gate)
    return (x * gate, m, _mean_of_gated(x, gate)), (x, gate, index)


def _scale_and_squeeze_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    x, gate, index = res
    ct_y, ct_m, ct_mean = cts
    ct_mean = ct_mean / x.shape[-1]
    index, ct_m = _found(index, x.shape[-1], ct_m)
    channel = _positions(x.shape, CHANNEL)

    def d_y(channel: Array, index: Array, ct_y: Array, *cts: Array) -> Array:
        ct_m, ct_mean = cts
        return _widen(ct_y) + ct_mean + jnp.where(channel == index, ct_m, 0)

    maps = (channel, index, ct_y, ct_m, ct_mean)
    d_gate = _sum_of(lambda x, *maps: _widen(x) * d_y(*maps), SPATIAL, x, *maps)
    d_x = d_y(*maps) * _widen(gate)
    return d_x.astype(x.dtype), d_gate.astype(gate.dtype)


scale_and_squeeze.defvjp(_scale_and_squeeze_fwd, _scale_and_squeeze_bwd)


@jax.custom_vjp
def _peak_of_gated(x: Array, gate: Array) -> tuple[Array, Array]:
    return _peak(_product, CHANNEL)(x, gate)


def _peak_of_gated_fwd(
    x: Array, gate: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    m, index = _peak_of_gated(x, gate)
    return (m, index), (x, gate, index)


def _peak_of_gated_bwd(
    res: tuple[Array, Array, Array], cts: tuple[Array, Array]
) -> tuple[Array, Array]:
    x, gate, index = res
    d_y = _at_peak(x.shape, CHANNEL, index, cts[0])
    d_gate = _sum_of(_product, SPATIAL, x, d_y)
    return (d_y * _widen(gate)).astype(x.dtype), d_gate.astype(gate.dtype)


_peak_of_gated.defvjp(_peak_of_gated_fwd, _peak_of_gated_bwd)


def decide(
    function: Callable[..., Array], otherwise: Callable[..., Array], *arrays: Array
) -> Array:
    """``function(*arrays)``, computed once, from one copy of the arrays.

    ``otherwise`` is the same function in other operations, for arrays whose sum is NaN:
    to the compiler, which of the two runs is open until the program does.
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
def _peak(
    function: Callable[..., Array], axes: Axes
) -> Callable[..., tuple[Array, Array]]:
    """Maps ``(..., H, W, C)`` to ``function``'s maximum over ``axes`` and its position.

    The axes stay with size 1. Positions count rows of pixels, or channels. Under
    ``vmap`` the new axis is one more leading axis: a branch must not become a select.
    """

    @jax.custom_batching.custom_vmap
    def peak(*maps: Array) -> tuple[Array, Array]:
        return lax.platform_dependent(
            *maps,
            cpu=partial(_peak_by_branch, function, axes),
            default=partial(_peak_of_pairs, function, axes),
        )

    @peak.def_vmap
    def batched(
        size: int, is_batched: list[bool], *maps: Array
    ) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        return peak(*_all_batched(size, is_batched, maps)), (True, True)

    return peak


def _peak_of_pairs(
    function: Callable[..., Array], axes: Axes, *maps: Array
) -> tuple[Array, Array]:
    """By one reduction; fast on GPU and TPU."""
    y = function(*maps)

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (v, i), (w, j) = a, b
        # NaN is the largest, and of equals the first one wins.
        wins = (w > v) | ((w != w) & (v == v))
        wins |= ((w == v) | ((w != w) & (v != v))) & (j < i)
        return jnp.where(wins, w, v), jnp.where(wins, j, i)

    index = jnp.broadcast_to(_positions(y.shape, axes), y.shape)
    # Of the array's own type, whatever mesh it is on.
    last = jnp.asarray(_size(y.shape, axes), jnp.int32)
    dims = tuple(a % y.ndim for a in axes)
    pair = lax.reduce((y, index), (jnp.asarray(-jnp.inf, y.dtype), last), larger, dims)
    m, index = (a.reshape(_reduced(y.shape, axes)) for a in pair)
    return m, index


def _peak_by_branch(
    function: Callable[..., Array], axes: Axes, *maps: Array
) -> tuple[Array, Array]:
    """The maximum, then the first element that equals it, both from stored maps.

    ``function`` is a copy or one product: rounded alike wherever it is computed.
    """
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = _size(shape, axes)
    axis, slices = _slicing(axes, size)

    def by_comparison(*rows: Array) -> tuple[Array, Array]:
        m = _max_of_rows(function, axis, slices, size, *rows)
        step = -(-size // slices)
        keys = []
        for start in _starts(size, slices, step):
            part = function(*_slice(rows, axis, start, start + step))
            along = (1, step, 1) if axis == 1 else (1, 1, step)
            i = start + lax.broadcasted_iota(jnp.int32, along, axis)
            keys.append(jnp.where(part == m, i, size))
        return m, _min_of_rows(reduce(jnp.minimum, keys), axis)

    def by_pairs(*rows: Array) -> tuple[Array, Array]:
        rows = tuple(a[..., None, :] for a in rows)  # (N, H * W, 1, C)
        m, index = _peak_of_pairs(function, axes, *rows)
        return m[..., 0, :], index[..., 0, :]

    rows = [_rows(a) for a in maps]
    total = _total(function, axes, *maps)
    m, index = lax.cond(total == total, by_comparison, by_pairs, *rows)
    reduced = _reduced(shape, axes)
    return m.reshape(reduced), index.reshape(reduced)


def _total(function: Callable[..., Array], axes: Axes, *maps: Array) -> Array:
    """The sum of all elements; from the mean, which most blocks compute as well."""
    if function is _itself:
        (x,) = maps
        return _sum(x, axes).sum()
    x, gate = maps
    return _mean_of_gated(x, gate).sum()


def _max(function: Callable[..., Array], axes: Axes, *maps: Array) -> Array:
    """The maximum of ``function(*maps)`` over ``axes``, without a gradient."""
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))

    def by_slices(*maps: Array) -> Array:
        size = _size(shape, axes)
        axis, slices = _slicing(axes, size)
        rows = [_rows(a) for a in maps]
        m = _max_of_rows(function, axis, slices, size, *rows)
        return m.reshape(_reduced(shape, axes))

    def whole(*maps: Array) -> Array:
        return function(*maps).max(axes, keepdims=True)

    return lax.platform_dependent(*maps, cpu=by_slices, default=whole)


def _max_of_rows(
    function: Callable[..., Array], axis: int, slices: int, size: int, *rows: Array
) -> Array:
    if FAST_REDUCTIONS:
        return function(*rows).max(axis, keepdims=True)
    # The last slice overlaps the one before where they do not divide the axis.
    step = -(-size // slices)
    parts = [
        function(*_slice(rows, axis, start, start + step))
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


# XLA's CPU backend writes out what a sum computes before it sums it, or emits slow
# loops. It has fast products and fast elementwise loops. So each sum has two forms. The
# products are over maps of shape (N, HW, C): with H and W apart, they would transpose.


def _sum(x: Array, axes: Axes) -> Array:
    """The sum of ``x`` in ``accumulator(x)`` over ``axes``, which stay with size 1."""
    size = math.prod(x.shape[-3:])
    if x.dtype == accumulator(x) and isinstance(size, int):
        # A product begins anew with each sample, which small ones do not make up for.
        if axes == SPATIAL and FAST_REDUCTIONS and size < SMALL:
            return x.sum(axes, keepdims=True)
        if axes == CHANNEL and x.shape[-1] <= CHAIN:
            return _sum_of(_widen, axes, x, slices=1)
    return _sum_of(_widen, axes, x)


def _sum_of(
    function: Callable[..., Array], axes: Axes, *maps: Array, slices: int = 0
) -> Array:
    """The sum of ``function(*maps)`` over ``axes``, which stay with size 1.

    ``function`` is elementwise, and ``maps`` broadcast to ``(..., H, W, C)``.
    """
    shape = jnp.broadcast_shapes(*(a.shape for a in maps))
    size = _size(shape, axes)

    def whole(*maps: Array) -> Array:
        return function(*maps).sum(axes, keepdims=True)

    if not isinstance(size, int):  # Left open by export.
        return whole(*maps)
    axis, default = _slicing(axes, size)
    slices = slices or default

    def by_slices(*maps: Array) -> Array:
        y = _sum_of_rows(function, axis, slices, size, *(_rows(a) for a in maps))
        return y.reshape(_reduced(shape, axes))

    return lax.platform_dependent(*maps, cpu=by_slices, default=whole)


def _sum_of_rows(
    function: Callable[..., Array], axis: int, slices: int, size: int, *rows: Array
) -> Array:
    # One loop computes and adds the slices. What is left is cut up again until a
    # product, which adds one element after the other, sums the little that remains.
    step = size // slices
    parts = [
        function(*_slice(rows, axis, i * step, (i + 1) * step)) for i in range(slices)
    ]
    total = reduce(jnp.add, parts)
    y = (
        _contract(total, axis)
        if step <= CHAIN
        else _sum_of_rows(_itself, axis, SLICES, step, total)
    )
    if slices * step != size:
        y += _contract(function(*_slice(rows, axis, slices * step, size)), axis)
    return y


def _mean_of_gated(x: Array, gate: Array) -> Array:
    """``(x * gate).mean(-1, keepdims=True)`` for a map and a channel gate."""
    x, gate = _widen(x), gate.astype(accumulator(x)) / x.shape[-1]

    def by_product(x: Array, gate: Array) -> Array:
        y = _einsum("nkc,nc->nk", _rows(x), gate.reshape(-1, x.shape[-1]))
        return y.reshape(_reduced(x.shape, CHANNEL))

    def whole(x: Array, gate: Array) -> Array:
        return (x * gate).sum(-1, keepdims=True)

    return lax.platform_dependent(x, gate, cpu=by_product, default=whole)


def _at_peak(shape: tuple[int, ...], axes: Axes, index: Array, ct: Array) -> Array:
    """``ct`` at the positions ``index``, and zero elsewhere."""
    index, ct = _found(index, _size(shape, axes), ct)
    return jnp.where(_positions(shape, axes) == index, ct, 0)


def _found(index: Array, size: int, ct: Array) -> tuple[Array, Array]:
    """``index`` and ``ct``; should an index be beyond the end, then one seen as NaN."""
    return jnp.minimum(index, size - 1), jnp.where(index < size, ct, jnp.nan)


def _positions(shape: tuple[int, ...], axes: Axes) -> Array:
    """Where an element is along ``axes``, broadcasting to ``shape``."""
    position = jnp.zeros((1, 1, 1), jnp.int32)
    for axis in axes:
        along = tuple(shape[i] if i == axis else 1 for i in (-3, -2, -1))
        iota = lax.broadcasted_iota(jnp.int32, along, 3 + axis)
        position = position * shape[axis] + iota
    return position.reshape((1,) * (len(shape) - 3) + position.shape)


def _size(shape: tuple[int, ...], axes: Axes) -> int:
    return math.prod(shape[a] for a in axes)


def _itself(x: Array) -> Array:
    return x


def _widen(x: Array) -> Array:
    return x.astype(accumulator(x))


def _product(x: Array, gate: Array) -> Array:
    return _widen(x) * _widen(gate)


def _slicing(axes: Axes, size: int) -> tuple[int, int]:
    """The axis of (N, HW, C), and the number of slices it is cut into."""
    axis = 1 if axes == SPATIAL else 2
    if not isinstance(size, int):  # Left open by export: one piece.
        return axis, 1
    return axis, min(SLICES, size if axis == 1 else max(size // LANES, 1))


def _slice(rows: tuple[Array, ...], axis: int, start: int, stop: int) -> list[Array]:
    return [
        a if a.shape[axis] == 1 else lax.slice_in_dim(a, start, stop, axis=axis)
        for a in rows
    ]


def _contract(rows: Array, axis: int) -> Array:
    ones = jnp.ones(rows.shape[:2] if axis == 1 else rows.shape[2:], rows.dtype)
    equation = "nkc,nk->nc" if axis == 1 else "nkc,c->nk"
    return jnp.expand_dims(_einsum(equation, rows, ones), axis)


def _rows(x: Array) -> Array:
    return x.reshape(-1, math.prod(x.shape[-3:-1]), x.shape[-1])


def _reduced(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision="highest")
