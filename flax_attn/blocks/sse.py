"""sSE: the spatial half of scSE."""

from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention
from flax_attn.functional import Array


class sSE(Attention, kw_only=True):
    """Channel squeeze and spatial excitation, https://arxiv.org/abs/1803.02579, eq. 2.

    ``y = x * gate(x @ kernel)``: one number per position, computed by a 1 x 1
    convolution C -> 1::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.sSE().init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'spatial': {'kernel': (64, 1)}}

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., H, W, 1)``, is sown as
    ``intermediates/spatial_gate``.

    All fields are keyword-only, and are those of ``Attention``, such as:

    Attributes:
      gate: function from logits to the gate (default: nn.sigmoid).

    Deviations: none from the paper.

    References: Roy, Navab, Wachinger. Concurrent Spatial and Channel Squeeze &
    Excitation in Fully Convolutional Networks. https://arxiv.org/abs/1803.02579, 2018.
    """

    gates = {"spatial_gate": "spatial_gate"}

    def setup(self) -> None:
        """Makes the layer."""
        self.spatial = self.make_layer(nn.Dense, is_last=True)(1)

    def spatial_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the spatial gate, ``(..., H, W, 1)``."""
        x, mask = self.validated(x, mask)
        gate = functional.apply_mask(self.gate_from(self.spatial(x)), mask)
        self.sow("intermediates", "spatial_gate", gate)
        return gate
