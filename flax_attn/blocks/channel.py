"""Channel attention: SE, ECA and the channel half of CBAM.

The three differ in two words only, how they squeeze (one pool or two) and how they
excite (an MLP or a 1-D convolution), so one function builds all of their gates.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention, Conv, Width, width_of
from flax_attn.functional import Array, Excite, Padding, Pool, checks


class ChannelBlock(Attention, kw_only=True):
    """A block with one gate for each channel, ``channel_gate``."""

    gates = {"channel_gate": "channel_gate"}

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns ``x`` of shape ``(..., H, W, C)`` times its gate.

        With ``mask``, boolean and ``(..., H, W)``, the rest of a padded map counts for
        nothing and comes out as zero.
        """
        x, _ = self.validated(x, mask)
        return self.scaled(x, self.channel_gate(x, mask))

    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate alone, ``(..., 1, 1, C)``."""
        raise NotImplementedError(f"{type(self).__name__} must define channel_gate.")

    def sown_gate(
        self,
        x: Array,
        mask: Array | None,
        *,
        pools: tuple[Pool, ...],
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

    All fields are keyword-only; beside those of ``Attention`` it has these.

    Attributes:
      reduction: divisor r; the hidden width is ``max(C // r, 1)`` (default: 16).
      hidden_features: the hidden width itself, at least 1, or a function from C to it;
        it overrides ``reduction`` (default: None).
      pool: squeeze, ``"avg"`` or ``"max"`` over H and W (default: "avg").
      act: activation between the two layers (default: nn.relu).

    Raises:
      ValueError: at the first call, for a field or an input out of its range.

    Deviations: the article's text has no biases and its released code has; set
    ``use_bias=True`` for the latter.

    References: Hu, Shen, Albanie, Sun, Wu. Squeeze-and-Excitation Networks.
    https://arxiv.org/abs/1709.01507, 2017.
    """

    reduction: int = 16
    hidden_features: Width | None = None
    pool: Pool = "avg"
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate alone, ``(..., 1, 1, C)``."""
        return self.sown_gate(x, mask, pools=(self.pool,), excite=mlp)


class ECA(ChannelBlock, kw_only=True):
    """Efficient Channel Attention, https://arxiv.org/abs/1910.03151, eqs. 7 and 12.

    Scales channel ``c`` of ``x`` by ``gate(conv(mean_hw(x)))[c]``, where ``conv`` runs
    along the channels with one kernel of width k for all of them::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 128))
      >>> params = flax_attn.ECA().init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'conv': {'kernel': (5, 1, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., 1, 1, C)``, is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only; beside those of ``Attention`` it has these.

    Attributes:
      kernel_size: width k, odd, or a function from C to it (default: None, which means
        ``eca_kernel_size(C, gamma=gamma, b=b)``). Released ECA-Net weights have fixed
        widths: 3, 5, 5, 7 in the four stages of a ResNet-50.
      gamma: slope divisor of the rule for k, not 0 (default: 2).
      b: offset of the rule for k (default: 1).
      pool: squeeze, ``"avg"`` or ``"max"`` over H and W (default: "avg").
      padding: what stands beyond the first and last channel, ``"zeros"`` or
        ``"circular"`` (default: "zeros").

    Raises:
      ValueError: at the first call, for a field or an input out of its range.

    Deviations: none from the article.

    References: Wang, Wu, Zhu, Li, Zuo, Hu. ECA-Net: Efficient Channel Attention for
    Deep Convolutional Neural Networks. https://arxiv.org/abs/1910.03151, 2019.
    """

    kernel_size: Width | None = None
    gamma: float = 2
    b: float = 1
    pool: Pool = "avg"
    padding: Padding = "zeros"

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate alone, ``(..., 1, 1, C)``."""
        return self.sown_gate(x, mask, pools=(self.pool,), excite=_conv)


class ChannelAttention(ChannelBlock, kw_only=True):
    """The channel half of CBAM, https://arxiv.org/abs/1807.06521, eq. 2.

    Scales channel ``c`` of ``x`` by ``gate(f(mean_hw(x)) + f(max_hw(x)))[c]``, where
    ``f`` is *one* MLP or *one* 1-D convolution, applied to both squeezes::

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

    All fields are keyword-only; beside those of ``Attention`` it has these.

    Attributes:
      reduction: divisor r of the MLP; the hidden width is ``max(C // r, 1)``
        (default: 16).
      excite: ``"mlp"`` as in the paper or ``"conv"`` as in ECA (default: "mlp").
      hidden_features: the MLP's hidden width itself, at least 1, or a function from C
        to it; it overrides ``reduction`` (default: None).
      kernel_size: width k of the convolution, odd, or a function from C to it
        (default: None, which means ``eca_kernel_size(C, gamma=gamma, b=b)``).
      gamma: slope divisor of the rule for k, not 0 (default: 2).
      b: offset of the rule for k (default: 1).
      padding: what the convolution finds beyond the first and last channel,
        ``"zeros"`` or ``"circular"`` (default: "zeros").
      act: activation between the MLP's layers (default: nn.relu).

    Raises:
      ValueError: at the first call, for a field or an input out of its range.

    Deviations: the official code's MLP has biases; set ``use_bias=True`` for it.
    Of elements that tie for a maximum the first one takes its gradient, as in PyTorch's
    max pooling; ``jnp.max`` and ``torch.amax`` share it evenly.

    References: Woo, Park, Lee, Kweon. CBAM: Convolutional Block Attention Module.
    https://arxiv.org/abs/1807.06521, 2018.
    """

    reduction: int = 16
    excite: Excite = "mlp"
    hidden_features: Width | None = None
    kernel_size: Width | None = None
    gamma: float = 2
    b: float = 1
    padding: Padding = "zeros"
    act: Callable[[Array], Array] = nn.relu

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate alone, ``(..., 1, 1, C)``."""
        checks.check_choice("excite", self.excite, functional.EXCITES)
        excite = mlp if self.excite == "mlp" else _conv
        return self.sown_gate(x, mask, pools=functional.POOLS, excite=excite)


def channel_logits(
    module: Attention,
    x: Array,
    mask: Array | None,
    *,
    pools: tuple[Pool, ...],
    excite: Callable[..., Any],
) -> Array:
    """Squeezes by each of ``pools``, excites all alike, and sums the logits."""
    x = checks.check_feature_map(x, spatial_dims=module.spatial_dims)
    logits_of = excite(module, x.shape[-1])
    squeeze = partial(
        functional.squeeze_spatial,
        x,
        mask=checks.check_mask(mask, x),
        spatial_dims=module.spatial_dims,
        implementation=module.implementation,
    )
    # The mean comes in float32; Linen's promotion starts from the dtype of the input.
    squeezed = [squeeze(pool=p).astype(module.dtype or x.dtype) for p in pools]
    # A sum over the first axis is slow in XLA's CPU backend of jax 0.10.2.
    return reduce(jnp.add, logits_of(jnp.stack(squeezed)))


def hidden_width(module: Attention, features: int) -> int:
    """The hidden width that ``module`` asks for at ``features`` channels."""
    hidden = module.hidden_features
    if hidden is None:
        checks.check_positive("reduction", module.reduction)
        hidden = max(features // module.reduction, 1)
    hidden = width_of("hidden_features", hidden, features)
    checks.check_positive("hidden_features", hidden)
    return hidden


def mlp(
    module: Attention, features: int, act: Callable[[Array], Array] | None = None
) -> Callable[[Array], Array]:
    """The two layers C -> h -> C, as a function of descriptors ``(..., C)``.

    ``act`` stands between them in the place of the module's.
    """
    layer = partial(
        nn.Dense,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
    )
    reduce = layer(
        hidden_width(module, features), **module.first_layer(), name="reduce"
    )
    expand = layer(features, **module.last_layer(), name="expand")
    checks.check_callable("act", module.act)
    act = act or module.act
    return lambda s: expand(act(reduce(s)))


def _conv(module: Attention, features: int) -> Callable[[Array], Array]:
    """The convolution along C, as a function of descriptors ``(..., C)``."""
    checks.check_choice("padding", module.padding, functional.PADDINGS)
    width = module.kernel_size
    if width is None:
        width = functional.eca_kernel_size(features, gamma=module.gamma, b=module.b)
    width = width_of("kernel_size", width, features)
    checks.check_odd("kernel_size", width)
    return Conv(
        partial(
            functional.conv_channels,
            padding=module.padding,
            precision=module.precision,
            implementation=module.implementation,
        ),
        kernel_shape=(width, 1, 1),
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        **module.last_layer(),
        name="conv",
    )
