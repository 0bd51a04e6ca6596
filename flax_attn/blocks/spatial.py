"""Spatial attention: the second half of CBAM."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention, Conv, ModuleDef
from flax_attn.blocks.channel import BOTH_POOLS, Pools
from flax_attn.functional import Array, checks


class SpatialAttention(Attention, kw_only=True):
    """The spatial half of CBAM, https://arxiv.org/abs/1807.06521, eq. 3.

    Scales position ``(h, w)`` of ``x`` by ``gate(conv([max_c(x), mean_c(x)]))[h, w]``,
    where ``conv`` has a k x k kernel and pads with zeros::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.SpatialAttention().init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'conv': {'kernel': (7, 7, 2, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., H, W, 1)``, is sown as
    ``intermediates/spatial_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      kernel_size: k, any odd size (default: 7).
      pool: ``"both"`` for two maps, as in the paper, or ``"avg+max"`` for one map,
        (mean + maximum) / 2, with a kernel ``(k, k, 1, 1)`` (default: "both").
      norm: module between the convolution and the gate, such as ``partial(nn.BatchNorm,
        use_running_average=not train, momentum=0.99)`` for the official code; called
        like Flax's norm layers, with ``mask=`` if the block gets a mask (default:
        None).

    Deviations: the article (see ``flax_attn.presets``) allows only the sizes 3, 5 and
    7. timm stacks [mean, max]. If elements tie for the maximum, the first one gets the
    gradient, as with ``torch.max(x, dim)``; ``torch.amax`` splits it evenly.

    References: Woo, Park, Lee, Kweon. CBAM: Convolutional Block Attention Module.
    https://arxiv.org/abs/1807.06521, 2018.
    """

    gates: ClassVar[Mapping[str, str]] = {"gate_of": "spatial_gate"}

    kernel_size: int = 7
    pool: Pools = "both"
    norm: ModuleDef | None = None

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``, its gate."""
        return self.spatial_gate(x, mask)

    def spatial_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., H, W, 1)``."""
        x, _ = self.validated(x, mask)
        maps = functional.squeeze_channels(x, implementation=self.implementation)
        return self.gate_of(maps.astype(self.dtype or x.dtype), mask)

    @nn.compact
    def gate_of(self, maps: Array, mask: Array | None = None) -> Array:
        """Returns the gate for squeezed maps [max, mean], ``(..., H, W, 2)``.

        They must be zero where ``mask`` is False, like the convolution's padding.
        """
        checks.check_odd("kernel_size", self.kernel_size)
        checks.check_choice("pool", self.pool, BOTH_POOLS)
        if self.pool == "avg+max":
            maps = maps.mean(-1, keepdims=True)
        logits = self.make_layer(Conv, is_last=True)(
            partial(functional.conv_spatial, implementation=self.implementation),
            kernel_shape=(*(self.kernel_size,) * self.spatial_dims, maps.shape[-1], 1),
            name="conv",
        )(maps)
        mask = checks.check_mask(mask, maps)
        logits = self.normalized("norm", logits, mask, name="norm")
        gate = functional.apply_mask(self.gate_from(logits), mask)
        self.sow("intermediates", "spatial_gate", gate)
        return gate

    def scale(self, x: Array, gate: Array) -> Array:
        """Returns ``x`` times a spatial gate."""
        return self.scaled(x, gate)
