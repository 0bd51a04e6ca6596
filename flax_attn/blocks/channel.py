"""Channel attention: SE, ECA and the channel half of CBAM.

They differ only in how they squeeze (one pool or two) and how they excite (an MLP or a
1-D convolution), so one function computes all of their gates.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import (
    Attention,
    Conv,
    ModuleDef,
    Width,
    check_norm,
    width_of,
)
from flax_attn.functional import Array, Excite, Padding, checks

PoolDef = Literal["avg", "max", "avg+max"] | Callable[..., Array]
"""A squeeze over H and W: a name, or a function with the signature of ``jnp.std``."""
Pools = Literal["both", "avg+max"]
"""Whether mean and maximum are used separately, or as (mean + maximum) / 2."""

POOLS = (*functional.POOLS, "avg+max")
BOTH_POOLS: tuple[Pools, ...] = ("both", "avg+max")


class ChannelBlock(Attention, kw_only=True):
    """A block with one gate for each channel, ``channel_gate``."""

    gates: ClassVar[Mapping[str, str]] = {"channel_gate": "channel_gate"}

    def sown_gate(
        self,
        x: Array,
        mask: Array | None,
        *,
        pools: tuple[PoolDef, ...],
        excite: Callable[..., Any],
    ) -> Array:
        """The gate, sown, of ``x`` squeezed by ``pools`` and excited by ``excite``."""
        gate = self.gate_from(channel_logits(self, x, mask, pools=pools, excite=excite))
        self.sow("intermediates", "channel_gate", gate)
        return gate


class SE(ChannelBlock, kw_only=True):
    """Squeeze-and-Excitation, https://arxiv.org/abs/1709.01507, eqs. 2-4.

    Scales channel ``c`` of ``x`` by ``gate(expand(act(reduce(mean_hw(x)))))[c]``::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.SE(reduction=16).init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., 1, 1, C)``, is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: divisor r, for a hidden width of ``max(C // r, 1)``; or a ratio below
        1, for a width of ``ratio * C``, rounded (default: 16).
      divisor: round the hidden width to the nearest multiple of this, at least
        ``divisor``, like timm's ``rd_divisor`` (default: None, no rounding).
      hidden_features: the hidden width itself, at least 1, or a function from C to it;
        it overrides ``reduction`` (default: None).
      pool: squeeze over H and W: ``"avg"``, ``"max"``, ``"avg+max"`` for (mean +
        maximum) / 2, or a function called like
        ``jnp.std(x, axis=axes, keepdims=True)``, with ``where=`` if the block gets a
        mask (default: "avg").
      hidden_norm: module between ``reduce`` and ``act``, such as
        ``partial(nn.BatchNorm, use_running_average=not train)``; called like Flax's
        norm layers, with ``mask=`` if the block gets a mask (default: None).
      act: activation between the two layers (default: nn.relu).

    Deviations: none from the paper's equations, which have no biases. The released code
    has biases; set ``use_bias=True`` for it.

    References: Hu, Shen, Albanie, Sun, Wu. Squeeze-and-Excitation Networks.
    https://arxiv.org/abs/1709.01507, 2017.
    """

    reduction: int | float = 16
    divisor: int | None = None
    hidden_features: Width | None = None
    pool: PoolDef = "avg"
    hidden_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., 1, 1, C)``."""
        excite = normalized_mlp(self, x, mask)
        return self.sown_gate(x, mask, pools=(self.pool,), excite=excite)


class ECA(ChannelBlock, kw_only=True):
    """Efficient Channel Attention, https://arxiv.org/abs/1910.03151, eqs. 7 and 12.

    Scales channel ``c`` of ``x`` by ``gate(conv(mean_hw(x)))[c]``, where ``conv`` is a
    1-D convolution along the channels with a kernel of size k::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 128))
      >>> params = flax_attn.ECA().init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'conv': {'kernel': (5, 1, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., 1, 1, C)``, is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      kernel_size: k, odd, or a function from C to k (default: None, which means
        ``eca_kernel_size(C, gamma=gamma, b=b)``). The released ECA-Net weights have
        fixed sizes: 3, 5, 5, 7 in the four stages of ResNet-50.
      gamma: slope divisor in the formula for k, not 0 (default: 2).
      b: offset in the formula for k (default: 1).
      pool: squeeze over H and W, see ``SE.pool`` (default: "avg").
      padding: padding at the first and last channel, ``"zeros"`` or ``"circular"``
        (default: "zeros").

    Deviations: none from the paper.

    References: Wang, Wu, Zhu, Li, Zuo, Hu. ECA-Net: Efficient Channel Attention for
    Deep Convolutional Neural Networks. https://arxiv.org/abs/1910.03151, 2019.
    """

    kernel_size: Width | None = None
    gamma: float = 2
    b: float = 1
    pool: PoolDef = "avg"
    padding: Padding = "zeros"

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., 1, 1, C)``."""
        return self.sown_gate(x, mask, pools=(self.pool,), excite=_conv)


class ChannelAttention(ChannelBlock, kw_only=True):
    """The channel half of CBAM, https://arxiv.org/abs/1807.06521, eq. 2.

    Scales channel ``c`` of ``x`` by ``gate(f(mean_hw(x)) + f(max_hw(x)))[c]``, where
    ``f`` is an MLP or a 1-D convolution shared by both squeezes::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> mlp = flax_attn.ChannelAttention(reduction=16)
      >>> jax.tree.map(jnp.shape, mlp.init(jax.random.key(0), x)["params"])
      {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}
      >>> conv = flax_attn.ChannelAttention(excite="conv")
      >>> jax.tree.map(jnp.shape, conv.init(jax.random.key(0), x)["params"])
      {'conv': {'kernel': (3, 1, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., 1, 1, C)``, is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: of the MLP, see ``SE.reduction`` (default: 16).
      divisor: of the hidden width, see ``SE.divisor`` (default: None).
      pool: ``"both"`` as in the paper, or ``"avg+max"``, which excites (mean + maximum)
        / 2 instead (default: "both").
      excite: ``"mlp"`` as in the paper or ``"conv"`` as in ECA (default: "mlp").
      hidden_features: the hidden width itself, see ``SE.hidden_features`` (default:
        None).
      kernel_size: k of the convolution, see ``ECA.kernel_size`` (default: None).
      gamma: slope divisor in the formula for k, not 0 (default: 2).
      b: offset in the formula for k (default: 1).
      padding: of the convolution, see ``ECA.padding`` (default: "zeros").
      hidden_norm: module between the MLP's layers, see ``SE.hidden_norm``; each squeeze
        is normalized separately (default: None).
      act: activation between the MLP's layers (default: nn.relu).

    Deviations: the official code's MLP has biases; set ``use_bias=True`` for it. If
    elements tie for a maximum, the first one gets the gradient, as in PyTorch's max
    pooling; ``jnp.max`` and ``torch.amax`` split it evenly.

    References: Woo, Park, Lee, Kweon. CBAM: Convolutional Block Attention Module.
    https://arxiv.org/abs/1807.06521, 2018.
    """

    reduction: int | float = 16
    divisor: int | None = None
    pool: Pools = "both"
    excite: Excite = "mlp"
    hidden_features: Width | None = None
    kernel_size: Width | None = None
    gamma: float = 2
    b: float = 1
    padding: Padding = "zeros"
    hidden_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., 1, 1, C)``."""
        checks.check_choice("excite", self.excite, functional.EXCITES)
        checks.check_choice("pool", self.pool, BOTH_POOLS)
        pools: tuple[PoolDef, ...] = ("avg+max",)
        if self.pool == "both":
            pools = functional.POOLS
        if self.excite == "conv" and self.hidden_norm is not None:
            raise ValueError(
                "`hidden_norm` goes between the layers of the MLP, so `excite` must be "
                '"mlp", got "conv"; leave `hidden_norm` out.'
            )
        excite = _conv if self.excite == "conv" else normalized_mlp(self, x, mask)
        return self.sown_gate(x, mask, pools=pools, excite=excite)


def channel_logits(
    module: Attention,
    x: Array,
    mask: Array | None,
    *,
    pools: tuple[PoolDef, ...],
    excite: Callable[..., Any],
) -> Array:
    """Squeezes with each of ``pools``, excites each result, and sums the logits."""
    x = checks.check_feature_map(x, spatial_dims=module.spatial_dims)
    mask = checks.check_mask(mask, x)
    logits_of = excite(module, x.shape[-1])
    # The mean comes in float32; Linen's promotion starts from the dtype of the input.
    dtype = module.dtype or x.dtype
    if pools == functional.POOLS:
        squeezed = [
            *functional.squeeze_spatial_by_both(x, mask=mask, **module.map_options)
        ]
    else:
        squeezed = [squeeze(module, x, mask, pool) for pool in pools]
    # A sum over the first axis is slow in XLA's CPU backend of jax 0.10.2.
    return reduce(jnp.add, logits_of(jnp.stack([s.astype(dtype) for s in squeezed])))


def squeeze(module: Attention, x: Array, mask: Array | None, pool: PoolDef) -> Array:
    """``x`` reduced over H and W to size 1; ``mask`` is ``(..., H, W, 1)``."""
    if callable(pool):
        return _squeeze_by(pool, x, mask, module.spatial_axes)
    checks.check_choice("pool", pool, POOLS)
    options = {"mask": mask, **module.map_options}
    if pool != "avg+max":
        return functional.squeeze_spatial(x, pool=pool, **options)
    mean, maximum = functional.squeeze_spatial_by_both(x, **options)
    return mean / 2 + maximum.astype(mean.dtype) / 2


def _squeeze_by(
    pool: Callable[..., Array], x: Array, mask: Array | None, axes: tuple[int, ...]
) -> Array:
    where = {}
    if mask is not None:
        # A map without valid positions is squeezed as it is, all zeros.
        where["where"] = mask | ~mask.any(axes, keepdims=True)
    y = pool(functional.apply_mask(x, mask), axis=axes, keepdims=True, **where)
    expected = (*x.shape[: axes[0]], *(1 for _ in axes), x.shape[-1])
    if jnp.shape(y) != expected:
        raise ValueError(
            "`pool` is a function and must reduce `axis` to size 1, got shape "
            f"{jnp.shape(y)} instead of {expected}; return an array of that shape, as "
            "jnp.std does with keepdims=True."
        )
    return y


def hidden_width(module: Attention, features: int) -> int:
    """The hidden width that ``module`` asks for at ``features`` channels."""
    hidden = module.hidden_features
    if hidden is None:
        divisor = getattr(module, "divisor", None)
        hidden = _reduced(features, module.reduction, divisor)
    hidden = width_of("hidden_features", hidden, features)
    checks.check_positive("hidden_features", hidden)
    return hidden


def _reduced(features: int, reduction: int | float, divisor: int | None) -> int:
    is_ratio = isinstance(reduction, float) and 0 < reduction < 1
    if not is_ratio and (not checks.is_int(reduction) or reduction < 1):
        raise ValueError(
            "`reduction` must be an integer of at least 1, or a ratio between 0 and 1, "
            f"got {reduction!r}; pass e.g. 16 or 1 / 16."
        )
    if divisor is None and not is_ratio:
        return max(int(features // reduction), 1)
    divisor = 1 if divisor is None else divisor
    checks.check_positive("divisor", divisor)
    width = features * reduction if is_ratio else features / reduction
    return max(int(width + divisor / 2) // divisor * divisor, divisor)


def mlp(
    module: Attention, features: int, act: Callable[[Array], Array] | None = None
) -> Callable[[Array], Array]:
    """The two layers C -> h -> C, as a function of descriptors ``(..., C)``.

    ``act`` replaces the module's activation between them.
    """
    hidden = hidden_width(module, features)
    reduce = module.make_layer(nn.Dense)(hidden, name="reduce")
    expand = module.make_layer(nn.Dense, is_last=True)(features, name="expand")
    checks.check_callable("act", module.act)
    act = act or module.act
    return lambda s: expand(act(reduce(s)))


def normalized_mlp(
    module: Attention, x: Array, mask: Array | None
) -> Callable[..., Any]:
    """``mlp`` with the norm of ``module``, if any, before its activation."""
    if module.hidden_norm is None:
        return mlp
    x, valid = module.validated(x, mask)
    rows = None if valid is None else valid.any(module.spatial_axes, keepdims=True)
    check_norm("hidden_norm", module.hidden_norm)
    norm = module._make_norm(
        module.hidden_norm, "reduce_norm", is_last=False, field="hidden_norm"
    )

    def act(s: Array) -> Array:
        # Of one pool at a time, as if the MLP were called once for each.
        return module.act(jnp.stack([module.over_valid(norm, row, rows) for row in s]))

    return partial(mlp, act=act)


def _conv(module: Attention, features: int) -> Callable[[Array], Array]:
    """The convolution along C, as a function of descriptors ``(..., C)``."""
    checks.check_choice("padding", module.padding, functional.PADDINGS)
    width = module.kernel_size
    if width is None:
        width = functional.eca_kernel_size(features, gamma=module.gamma, b=module.b)
    width = width_of("kernel_size", width, features)
    checks.check_odd("kernel_size", width)
    compute = partial(
        functional.conv_channels,
        padding=module.padding,
        implementation=module.implementation,
    )
    layer = module.make_layer(Conv, is_last=True)
    conv: Conv = layer(compute, kernel_shape=(width, 1, 1), name="conv")
    return conv
