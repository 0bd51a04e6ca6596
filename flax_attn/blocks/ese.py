"""The one-layer gate of VoVNetV2."""

from collections.abc import Callable

from flax import linen as nn

from flax_attn.blocks.base import Attention
from flax_attn.blocks.channel import ChannelBlock, PoolDef
from flax_attn.functional import Array


class ESE(ChannelBlock, kw_only=True):
    """Effective Squeeze-Excitation, https://arxiv.org/abs/1911.06667, eq. 3.

    Scales channel ``c`` of ``x`` by ``gate(excite(mean_hw(x)))[c]``, where ``excite``
    is a single layer C -> C, without SE's bottleneck::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.ESE().init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'excite': {'kernel': (64, 64)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., 1, 1, C)``, is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      pool: squeeze over H and W, see ``SE.pool`` (default: "avg").

    Deviations: none from the paper. The released code and timm use a bias and the gate
    ``nn.hard_sigmoid``: see ``flax_attn.presets.timm_ese``.

    References: Lee, Park. CenterMask: Real-Time Anchor-Free Instance Segmentation.
    https://arxiv.org/abs/1911.06667, 2019.
    """

    pool: PoolDef = "avg"

    @nn.compact
    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate alone, ``(..., 1, 1, C)``."""
        return self.sown_gate(x, mask, pools=(self.pool,), excite=_layer)


def _layer(module: Attention, features: int) -> Callable[[Array], Array]:
    layer: nn.Dense = module.make_layer(nn.Dense, is_last=True)(features, name="excite")
    return layer
