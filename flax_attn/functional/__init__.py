"""The arithmetic of attention, as pure functions of arrays ``(..., H, W, C)``.

A block squeezes the feature map to descriptors, excites them to logits, turns the
logits into a gate and multiplies the map by it. The squeezes, the two convolutions and
the product with a gate are defined only here; the modules add parameters, an activation
and a gate function.

Options are keyword-only. Two are shared by most functions. ``spatial_dims`` is 1 for
maps ``(..., L, C)``, 2 for ``(..., H, W, C)`` or 3 for ``(..., D, H, W, C)`` (default:
2). ``implementation`` is ``"plain"``, the straightforward definition with automatic
differentiation, or ``"fast"`` (default), which computes the same with fewer passes over
the map, forward and backward, but supports only reverse mode: ``jax.jvp``,
``jax.jacfwd`` and ``jax.hessian`` need ``"plain"``. In both, the gradient of a maximum
goes to the first maximal element, whose index is stored: see ``_maxima``.

An invalid ``pool``, ``padding`` or ``implementation`` raises ``ValueError``; arrays and
``spatial_dims`` are checked only by the modules, with ``checks``.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from flax_attn.functional import _convolution, _maxima, _plain, _reductions
from flax_attn.functional._kernel_size import eca_kernel_size as eca_kernel_size
from flax_attn.functional._meshes import on_auto_axes as on_auto_axes
from flax_attn.functional._meshes import replicated_along as replicated_along
from flax_attn.functional._meshes import varying_alike
from flax_attn.functional._sums import CHANNEL, SPATIAL
from flax_attn.functional._sums import accumulator as accumulator
from flax_attn.functional.checks import check_choice

Array = jax.Array
Pool = Literal["avg", "max"]
Excite = Literal["mlp", "conv"]
Padding = Literal["zeros", "circular"]
Implementation = Literal["fast", "plain"]

POOLS: tuple[Pool, ...] = ("avg", "max")
EXCITES: tuple[Excite, ...] = ("mlp", "conv")
PADDINGS: tuple[Padding, ...] = ("zeros", "circular")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("fast", "plain")


def apply_mask(x: Array, mask: Array | None) -> Array:
    """Returns ``x`` where ``mask`` is True, and zero elsewhere, even for NaN.

    Args:
      x: array ``(..., H, W, C)``.
      mask: boolean array ``(..., H, W, 1)``, or None for all of ``x``.
    """
    return x if mask is None else jnp.where(mask, x, 0)


def squeeze_spatial(
    x: Array,
    *,
    pool: Pool = "avg",
    mask: Array | None = None,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> Array:
    """Reduces H and W: ``(..., H, W, C)`` to ``(..., 1, 1, C)``.

    The mean is accumulated and *returned* in float32 or wider. The maximum keeps the
    dtype of ``x``, and its gradient goes to the first maximal element. Both are zero
    where ``mask`` has no valid position. With a mask, the maximum is at least the
    lowest finite number.

      >>> squeeze_spatial(jnp.full((2, 3, 4), 300.0, jnp.float16)).ravel().tolist()
      [300.0, 300.0, 300.0, 300.0]

    Args:
      x: floating-point array ``(..., H, W, C)``.
      pool: ``"avg"`` or ``"max"`` (default: ``"avg"``).
      mask: boolean array ``(..., H, W, 1)``, True where ``x`` counts (default: None,
        everywhere).
    """
    check_choice("pool", pool, POOLS)
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    squeeze = _squeeze_spatial
    if mask is not None:
        # Compiled as one, since `jax_debug_infs` looks at what a primitive returns, and
        # the sum of what is masked overflows.
        squeeze = _squeeze_spatial_jitted
    run = partial(
        squeeze, pool=pool, spatial_dims=spatial_dims, implementation=implementation
    )
    masks = () if mask is None else (mask,)
    return _run(run, lambda x, *_: reduced(x, spatial_dims, None), x, *masks)


def _squeeze_spatial(
    x: Array,
    mask: Array | None = None,
    *,
    pool: Pool,
    spatial_dims: int,
    implementation: Implementation,
) -> Array:
    if mask is not None:
        # For a maximum, the lowest finite number, which only -infinity is below; an
        # infinity here would be stored for the gradient.
        fill = 0 if pool == "avg" else jnp.finfo(x.dtype).min
        x = jnp.where(mask, x, jnp.asarray(fill, x.dtype))
    folded = _fold(x, spatial_dims)
    forms = _reductions if implementation == "fast" else _plain
    y = (forms.mean if pool == "avg" else forms.maximum)(folded, SPATIAL)
    y = y.reshape(reduced(x.shape, spatial_dims, 1))
    return y if mask is None else _over_valid(y, mask, pool, spatial_dims)


_squeeze_spatial_jitted = jax.jit(
    _squeeze_spatial, static_argnames=("pool", "spatial_dims", "implementation")
)


def squeeze_spatial_by_both(
    x: Array,
    *,
    mask: Array | None = None,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> tuple[Array, Array]:
    """Returns ``squeeze_spatial`` with ``"avg"`` and with ``"max"``.

    Without a mask, the fast implementation reads ``x`` only once on TPU and, unless a
    gradient is computed, on GPU.

      >>> mean, maximum = squeeze_spatial_by_both(jnp.array([[[1.0], [3.0]]]))
      >>> mean.ravel().tolist(), maximum.ravel().tolist()
      ([2.0], [3.0])
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if mask is not None or implementation == "plain":
        by = partial(
            squeeze_spatial,
            x,
            mask=mask,
            spatial_dims=spatial_dims,
            implementation=implementation,
        )
        return by(pool="avg"), by(pool="max")

    def run(x: Array) -> tuple[Array, Array]:
        mean, m = _reductions.mean_and_maximum(_fold(x, spatial_dims), SPATIAL)
        shape = reduced(x.shape, spatial_dims, 1)
        return mean.reshape(shape), m.reshape(shape)

    return _run(run, lambda x: (reduced(x, spatial_dims, None),) * 2, x)


def squeeze_channels(x: Array, *, implementation: Implementation = "fast") -> Array:
    """Reduces C by maximum and mean: ``(..., H, W, C)`` to ``(..., H, W, 2)``.

    The order is ``[max, mean]``, as in the official code and in the article that
    ``flax_attn.presets`` names (timm uses the reverse). Computed and returned in
    float32 or wider.

      >>> squeeze_channels(jnp.array([[[1.0, 2.0, 6.0]]])).tolist()
      [[[6.0, 3.0]]]

    Args:
      x: floating-point array ``(..., H, W, C)``.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    forms = _reductions if implementation == "fast" else _plain

    def run(x: Array) -> Array:
        rows = x.reshape(*(1,) * (3 - x.ndim), *x.shape)  # A lone signal has one row.
        mean, maximum = forms.mean_and_maximum(rows, CHANNEL)
        maps = jnp.concatenate([maximum.astype(mean.dtype), mean], axis=-1)
        return maps.reshape(*x.shape[:-1], 2)

    return _run(run, lambda x: [*x[:-1], None], x)


def scale(
    x: Array,
    gate: Array,
    *,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> Array:
    """Multiplies a feature map by a gate: ``x * gate``.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., 1, 1, C)``, ``(..., H, W, 1)`` or any other shape that
        broadcasts to that of ``x``, of the same dtype.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    of_channels = gate.shape == tuple(reduced(x.shape, spatial_dims, 1))
    of_positions = gate.shape == (*x.shape[:-1], 1)
    if implementation == "plain" or not (of_channels or of_positions):
        return jnp.multiply(x, gate)

    def run(x: Array, gate: Array) -> Array:
        folded = _fold(x, spatial_dims), _fold(gate, spatial_dims)
        y = _reductions.scale(*folded, SPATIAL if of_channels else CHANNEL)
        return y.reshape(x.shape)

    return _run(run, lambda x, gate: list(x), *varying_alike(x, gate))


def scale_and_squeeze(
    x: Array,
    gate: Array,
    *,
    spatial_dims: int = 2,
    implementation: Implementation = "fast",
) -> tuple[Array, Array]:
    """``y = x * gate`` for a channel gate, and ``squeeze_channels(y)``.

    The fast implementation squeezes the product before rounding it to a half-precision
    dtype.

    Args:
      x: array ``(..., H, W, C)``.
      gate: array ``(..., 1, 1, C)`` of the same dtype.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "plain":
        y = jnp.multiply(x, gate)
        return y, squeeze_channels(y, implementation=implementation)

    def run(x: Array, gate: Array) -> tuple[Array, Array]:
        folded = _fold(x, spatial_dims), _fold(gate, spatial_dims)
        y, maximum, mean = _reductions.scale_and_squeeze(*folded)
        maps = jnp.concatenate([maximum, mean], axis=-1)
        return y.reshape(x.shape), maps.reshape(*x.shape[:-1], 2)

    return _run(
        run, lambda x, gate: (list(x), [*x[:-1], None]), *varying_alike(x, gate)
    )


def larger(a: Array, b: Array) -> Array:
    """Returns the elementwise maximum of two maps.

    The gradient goes to the larger element, and half to each if they are equal. The
    choice is stored and not recomputed by comparing values, which the compiler might
    compute twice with different rounding.

    Args:
      a: array of any shape.
      b: array of the same shape and dtype.
    """

    return _run(_larger, lambda a, b: list(a), *varying_alike(a, b))


@jax.custom_jvp
def _larger(a: Array, b: Array) -> Array:
    return jnp.maximum(a, b)


@_larger.defjvp
def _larger_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    a, b = primals

    def share(a: Array, b: Array) -> Array:
        return jnp.where(a > b, 1, jnp.where(a == b, 0.5, 0)).astype(a.dtype)

    def share_of_nan(a: Array, b: Array) -> Array:
        return jnp.where(a < b, 0, jnp.where(a == b, 0.5, 1)).astype(a.dtype)

    of_a = _maxima.decide(share, share_of_nan, a, b)
    return _larger(a, b), of_a * tangents[0] + (1 - of_a) * tangents[1]


def conv_spatial(
    maps: Array,
    kernel: Array,
    *,
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "fast",
) -> Array:
    """A convolution with zero padding that keeps the size of its maps.

    The kernel has the same number of spatial axes as the maps, one to three.

    Args:
      maps: array ``(..., H, W, M)`` with few channels.
      kernel: array ``(kh, kw, M, O)`` of odd sizes.
      precision: see ``jax.lax.Precision``; the fast implementation has the highest on
        GPU.

    Returns:
      Array ``(..., H, W, O)``.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    is_plain = implementation == "plain"
    conv = _plain.conv if is_plain else _convolution.CONVS[kernel.ndim - 2]

    def run(maps: Array, kernel: Array) -> Array:
        return conv(maps, kernel, precision)

    return _run(
        run, lambda maps, kernel: [*maps[:-1], None], *varying_alike(maps, kernel)
    )


def conv_channels(
    s: Array,
    kernel: Array,
    *,
    padding: Padding = "zeros",
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "fast",
) -> Array:
    """A 1-D convolution along the last axis that keeps its size.

    Args:
      s: array ``(..., C)``.
      kernel: array ``(k, 1, 1)``, k odd.
      padding: ``"zeros"`` or ``"circular"`` (default: ``"zeros"``).
      precision: see ``conv_spatial``.
    """
    check_choice("padding", padding, PADDINGS)
    p = kernel.shape[0] // 2 if padding == "circular" else 0

    def run(s: Array, kernel: Array) -> Array:
        row = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(p, p)], mode="wrap")
        y = conv_spatial(
            row[..., None], kernel, precision=precision, implementation=implementation
        )
        return y[..., p : p + s.shape[-1], 0]

    s = replicated_along(s, -1)
    return _run(run, lambda s, kernel: list(s), *varying_alike(s, kernel))


def _run(
    function: Callable[..., Any], specs: Callable[..., Any], *arrays: Array
) -> Any:
    try:
        # Of NumPy arrays too, the results are JAX's.
        return jax.tree.map(jnp.asarray, on_auto_axes(function, specs, *arrays))
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "The fast implementation supports only reverse-mode gradients (it is a "
            "custom_vjp); for jax.jvp, jax.jacfwd and jax.hessian pass "
            '`implementation="plain"` to the block.'
        ) from error


def _fold(x: Array, spatial_dims: int) -> Array:
    """The same elements as ``(..., H, W, C)``, whatever the number of spatial axes."""
    batch, spatial = x.shape[: -1 - spatial_dims], x.shape[-1 - spatial_dims : -1]
    return x.reshape(*batch, math.prod(spatial[:-1]), spatial[-1], x.shape[-1])


def spatial_axes(spatial_dims: int) -> tuple[int, ...]:
    """The spatial axes of a map, counted from its last.

      >>> spatial_axes(2)
      (-3, -2)

    Args:
      spatial_dims: 1, 2 or 3.
    """
    return tuple(range(-1 - spatial_dims, -1))


def reduced(dims: Sequence[Any], spatial_dims: int, fill: Any) -> list[Any]:
    """``dims`` with ``fill`` instead of the spatial dimensions.

      >>> reduced((8, 32, 32, 64), 2, 1)
      [8, 1, 1, 64]

    Args:
      dims: a shape, or the axes of a ``PartitionSpec``, for each dimension of a map.
      spatial_dims: 1, 2 or 3.
      fill: the size or axis of the squeezed dimensions.
    """
    return [*dims[: -1 - spatial_dims], *(fill,) * spatial_dims, dims[-1]]


def _over_valid(y: Array, mask: Array, pool: Pool, spatial_dims: int) -> Array:
    """Corrects a squeeze over the whole map, of which only ``mask`` counts."""
    axes = spatial_axes(spatial_dims)
    valid = mask.sum(axes, keepdims=True)
    if pool == "max":
        return jnp.where(valid > 0, y, 0)
    size = math.prod(mask.shape[a] for a in axes)
    return y * (size / jnp.maximum(valid, 1).astype(y.dtype))
