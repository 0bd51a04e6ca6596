"""Means, convolutions and resizing around every position, as Gather-Excite has them.

All functions take maps ``(..., H, W, C)``, or other axes as ``spatial_dims`` says, and
treat each channel on its own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from flax_attn.functional import Array, accumulator, reduced, spatial_axes
from flax_attn.functional._meshes import on_auto_axes


def local_mean(
    x: Array, extent: int, *, mask: Array | None = None, spatial_dims: int = 2
) -> Array:
    """Means of valid positions less than ``extent`` away, at every ``extent``-th one.

    Returns ``(..., ceil(H / extent), ceil(W / extent), C)`` in float32 or wider, zero
    where no position is valid. What the mask excludes must be zero in ``x``.
    """
    dtype, dims, lead = accumulator(x), spatial_dims, x.ndim - spatial_dims - 1

    def per_axis(of_batch: Any, of_space: Any) -> list[Any]:
        return [of_batch] * lead + [of_space] * dims + [of_batch]

    def sums(x: Array) -> Array:
        return lax.reduce_window(
            x.astype(dtype),
            0.0,
            lax.add,
            per_axis(1, 2 * extent - 1),
            per_axis(1, extent),
            per_axis((0, 0), (extent - 1, extent - 1)),
        )

    def mean(x: Array, *masks: Array) -> Array:
        (valid,) = masks or (jnp.ones_like(x[..., :1], bool),)
        return sums(x) / sums(valid).clip(1)

    masks = () if mask is None else (mask,)
    return on_auto_axes(mean, lambda x, *_: reduced(x, dims, None), x, *masks)


def align(x: Array, mask: Array, *, spatial_dims: int = 2) -> tuple[Array, Array]:
    """``x`` and ``mask`` with the valid part at the start of each spatial axis."""

    def aligned(x: Array, mask: Array) -> tuple[Array, Array]:
        for axis in spatial_axes(spatial_dims):
            start, _ = _valid_range(mask, axis, spatial_dims)
            at = (_positions(x, axis) + start) % x.shape[axis]
            x, mask = (jnp.take_along_axis(a, at, axis, mode="clip") for a in (x, mask))
        return x, mask

    return on_auto_axes(aligned, lambda x, mask: ([*x], [*mask]), x, mask)


def resize_nearest(
    y: Array, like: Array, extent: int, *, mask: Array | None = None, spatial_dims: int
) -> Array:
    """``y``, one of every ``extent`` positions, at every position of ``like``.

    With a mask, ``y`` is of the map that ``align`` returns, and is resized to the valid
    part alone, without the padding.
    """

    def resized(y: Array, like: Array, *masks: Array) -> Array:
        for axis in spatial_axes(spatial_dims):
            at = _positions(like, axis)
            if masks:
                start, size = _valid_range(masks[0], axis, spatial_dims)
                # In front of the valid part, which `start` may be the end of, there
                # is no position.
                at = (at - start).clip(0) * ((size + extent - 1) // extent) // size
            else:
                at = at * y.shape[axis] // like.shape[axis]
            y = jnp.take_along_axis(y, at, axis, mode="clip")
        return y

    masks = () if mask is None else (mask,)
    return on_auto_axes(resized, lambda y, like, *_: [*like], y, like, *masks)


def every_second(mask: Array, spatial_dims: int) -> Array:
    """The mask of a map of which ``conv_depthwise`` keeps every second position."""

    def halved(mask: Array) -> Array:
        for axis in spatial_axes(spatial_dims):
            # Not `mask[::2]`: an equal size, but not in an export's symbols.
            mask = lax.slice_in_dim(mask, 0, mask.shape[axis], 2, axis)
        return mask

    return on_auto_axes(halved, lambda mask: reduced(mask, spatial_dims, None), mask)


def _positions(x: Array, axis: int) -> Array:
    """0, 1, 2, … along ``axis``, of size 1 along the others."""
    along = [1] * x.ndim
    along[axis] = x.shape[axis]
    return jnp.arange(x.shape[axis]).reshape(along)


def _valid_range(mask: Array, axis: int, spatial_dims: int) -> tuple[Array, Array]:
    """Where the valid part starts along ``axis``, and its size, at least 1."""
    others = tuple(a for a in spatial_axes(spatial_dims) if a != axis)
    valid, to = mask.any(others, keepdims=True), _positions(mask, axis)
    start = jnp.where(valid, to, mask.shape[axis] - 1).min(axis, keepdims=True)
    end = jnp.where(valid, to + 1, 0).max(axis, keepdims=True)
    return start, (end - start).clip(1)


def conv_depthwise(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **_: Any,
) -> Array:
    """A convolution of each channel alone, as a product with stacked slices.

    Called as ``lax.conv_general_dilated`` is. XLA's own is slow on CPU, and with a
    stride its gradient cannot be exported for any size.
    """
    dims = len(strides)

    def conv(x: Array, kernel: Array) -> Array:
        dtype, *sizes, features = accumulator(x), *x.shape[1:]
        windows = jnp.pad(x, [(0, 0), *padding, (0, 0)]).astype(dtype)
        for axis, (taps, n, stride) in enumerate(
            zip(kernel.shape, sizes, strides, strict=False), -dims - 1
        ):
            cut = partial(lax.slice_in_dim, windows, stride=stride, axis=axis)
            windows = jnp.stack([cut(t, t + n) for t in range(taps)])
        # The taps of the last axis stand first.
        weights = kernel.astype(dtype).T.reshape(features, *kernel.shape[-3::-1])
        weights = jnp.moveaxis(weights, 0, -1)
        axes = tuple(range(dims))
        weights = jnp.expand_dims(weights, tuple(range(dims, windows.ndim - 1)))
        return (windows * weights).sum(axes).astype(x.dtype)

    return on_auto_axes(conv, lambda x, _: reduced(x, dims, None), x, kernel)
