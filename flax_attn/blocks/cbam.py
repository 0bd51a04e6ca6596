"""CBAM: channel attention, then spatial attention on the result."""

from collections.abc import Callable

from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flax_attn import functional
from flax_attn.blocks.base import Attention, ModuleDef, Width, check_norm
from flax_attn.blocks.channel import ChannelAttention, Pools
from flax_attn.blocks.spatial import SpatialAttention
from flax_attn.functional import Array, Excite, checks


class CBAM(Attention, kw_only=True):
    """Convolutional Block Attention Module, https://arxiv.org/abs/1807.06521, eq. 1.

    ``y = x * channel_gate(x)``, then ``y * spatial_gate(y)``::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.CBAM().init(jax.random.key(0), x)["params"]
      >>> shapes = jax.tree.map(jnp.shape, params)
      >>> shapes["channel"]
      {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}
      >>> shapes["spatial"]
      {'conv': {'kernel': (7, 7, 2, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gates are sown as
    ``intermediates/channel/channel_gate`` and ``intermediates/spatial/spatial_gate``.

    The official code corresponds to ``use_bias=True`` and
    ``spatial_norm=partial(nn.BatchNorm, use_running_average=not train,
    momentum=0.99)``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: of the channel MLP, see ``SE.reduction`` (default: 16).
      divisor: of the hidden width, see ``SE.divisor`` (default: None).
      pool: ``"both"`` as in the paper, or ``"avg+max"`` for (mean + maximum) / 2 in
        both halves (default: "both").
      spatial_kernel_size: k of the spatial convolution, any odd size (default: 7).
      excite: the channel half's ``"mlp"`` or ``"conv"`` (default: "mlp").
      hidden_features: the hidden width itself, see ``SE.hidden_features`` (default:
        None).
      kernel_size: of the channel convolution, see ``ECA.kernel_size`` (default: None).
      gamma: slope divisor in the formula for that size, not 0 (default: 2).
      b: offset in the formula for that size (default: 1).
      spatial_norm: module between the spatial convolution, which then has no bias, and
        its gate, see ``SpatialAttention.norm`` (default: None).
      act: activation between the MLP's layers (default: nn.relu).

    Deviations: see ``ChannelAttention`` and ``SpatialAttention``.

    References: Woo, Park, Lee, Kweon. CBAM: Convolutional Block Attention Module.
    https://arxiv.org/abs/1807.06521, 2018.
    """

    reduction: int | float = 16
    divisor: int | None = None
    pool: Pools = "both"
    spatial_kernel_size: int = 7
    excite: Excite = "mlp"
    hidden_features: Width | None = None
    kernel_size: Width | None = None
    gamma: float = 2
    b: float = 1
    spatial_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.relu

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """As ``Attention``: ``x`` times its two gates."""
        y, _, spatial = self._halves(x, mask)
        return self.scaled(y, spatial)

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``, both its gates."""
        _, channel, spatial = self._halves(x, mask)
        return channel * spatial

    @nn.compact
    def _halves(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        """``x`` times its channel gate, that gate, and the spatial gate."""
        # Also checked here, so that a message has this block's field name.
        checks.check_odd("spatial_kernel_size", self.spatial_kernel_size)
        if self.spatial_norm is not None:
            check_norm("spatial_norm", self.spatial_norm)
        channel = ChannelAttention(
            **self.shared_fields(ChannelAttention), name="channel"
        )
        of_spatial = self.shared_fields(SpatialAttention) | {
            "kernel_size": self.spatial_kernel_size,
            "norm": self.spatial_norm,
            "use_bias": self.use_bias and self.spatial_norm is None,
        }
        spatial = SpatialAttention(**of_spatial, name="spatial")
        # Equals spatial(channel(x)), with the first product and the squeeze fused.
        x, _ = self.validated(x, mask)
        x, gate = promote_dtype(x, channel.channel_gate(x, mask), dtype=self.dtype)
        y, maps = functional.scale_and_squeeze(x, gate, **self.map_options)
        return y, gate, spatial.gate_of(maps.astype(y.dtype), mask)
