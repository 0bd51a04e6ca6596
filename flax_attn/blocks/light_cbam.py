"""LightCBAM: CBAM with one squeeze in each half."""

from flax_attn.blocks.cbam import CBAM
from flax_attn.blocks.channel import Pools


class LightCBAM(CBAM, kw_only=True):
    """CBAM with half the sum of mean and maximum in the place of both.

    As timm's ``lcbam``: ``y = x * gate(mlp(s))`` where ``s`` is half the sum over H and
    W, then ``y * gate(conv(t))`` where ``t`` is half the sum over C, one map::

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

    All fields are keyword-only and those of ``CBAM``, but for one default.

    Attributes:
      pool: squeeze of both halves, see ``CBAM.pool`` (default: "avg+max").

    Deviations: timm's gates are sigmoids whatever ``gate_layer`` is; here both are
    ``gate``. For timm's widths, norm and start see ``flax_attn.presets.timm_lcbam``.

    References: Wightman. PyTorch Image Models, ``timm.layers.LightCbamModule``.
    https://github.com/huggingface/pytorch-image-models, 2020.
    """

    pool: Pools = "avg+max"
