"""LightCBAM: CBAM with one squeeze in each half."""

from flax_attn.blocks.cbam import CBAM
from flax_attn.blocks.channel import Pools


class LightCBAM(CBAM, kw_only=True):
    """CBAM that squeezes with (mean + maximum) / 2.

    Like timm's ``lcbam``: ``y = x * gate(mlp(s))`` where ``s = (mean_hw(x) +
    max_hw(x)) / 2``, then ``y * gate(conv(t))`` where ``t = (mean_c(y) + max_c(y)) /
    2``, one map::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.LightCBAM().init(jax.random.key(0), x)["params"]
      >>> shapes = jax.tree.map(jnp.shape, params)
      >>> shapes["channel"]
      {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}
      >>> shapes["spatial"]
      {'conv': {'kernel': (7, 7, 1, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gates are sown as
    ``intermediates/channel/channel_gate`` and ``intermediates/spatial/spatial_gate``.

    All fields are keyword-only, and are those of ``CBAM`` with one different default:

    Attributes:
      pool: squeeze of both halves, see ``CBAM.pool`` (default: "avg+max").

    Deviations: timm always uses sigmoids and ignores ``gate_layer``; here both gates
    use ``gate``. For timm's widths, norm and initializers, see
    ``flax_attn.presets.timm_lcbam``.

    References: Wightman. PyTorch Image Models, ``timm.layers.cbam.LightCbamModule``.
    https://github.com/huggingface/pytorch-image-models, 2020.
    """

    pool: Pools = "avg+max"
