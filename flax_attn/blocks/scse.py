"""scSE: two recalibrations of one map, by channel and by position, combined."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flax_attn import functional
from flax_attn.blocks.base import Width
from flax_attn.blocks.channel import SE
from flax_attn.blocks.sse import sSE
from flax_attn.functional import Array, checks

Combine = Literal["add", "max"]

COMBINATIONS: tuple[Combine, ...] = ("add", "max")


class scSE(sSE, kw_only=True):
    """Concurrent spatial and channel SE, https://arxiv.org/abs/1803.02579, eqs. 1-3.

    ``y = x * channel_gate(x) + x * spatial_gate(x)``, where the first is SE's gate and
    the second is ``gate(x @ kernel)``, one number per position::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.scSE().init(jax.random.key(0), x)["params"]
      >>> shapes = jax.tree.map(jnp.shape, params)
      >>> shapes["channel"]
      {'expand': {'kernel': (32, 64)}, 'reduce': {'kernel': (64, 32)}}
      >>> shapes["spatial"]
      {'kernel': (64, 1)}

    Maps ``(..., H, W, C)`` to the same shape. The gates are sown as
    ``intermediates/channel/channel_gate`` and ``intermediates/spatial_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: of the channel half, see ``SE.reduction`` (default: 2).
      combine: how to combine the two maps elementwise, ``"add"`` as in the paper or
        ``"max"`` as in the follow-up paper (default: "add").
      hidden_features: see ``SE.hidden_features`` (default: None).
      act: activation between the two layers of the channel half (default: nn.relu).

    Deviations: none from the paper.

    References: Roy, Navab, Wachinger. Concurrent Spatial and Channel Squeeze &
    Excitation in Fully Convolutional Networks. https://arxiv.org/abs/1803.02579, 2018.
    The maximum: Recalibrating Fully Convolutional Networks with Spatial and
    Channel 'Squeeze & Excitation' Blocks. https://arxiv.org/abs/1808.08127, 2018.
    """

    reduction: int | float = 2
    combine: Combine = "add"
    hidden_features: Width | None = None
    act: Callable[[Array], Array] = nn.relu

    def setup(self) -> None:
        """Makes the two halves."""
        super().setup()
        checks.check_choice("combine", self.combine, COMBINATIONS)
        self.channel: SE = SE(**self.shared_fields(SE))

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """As ``Attention``: the two recalibrations of ``x``, combined."""
        x, channel, spatial = self._promoted(x, mask)
        by_channel, by_position = self.scaled(x, channel), self.scaled(x, spatial)
        if self.combine == "max":
            return functional.larger(by_channel, by_position)
        if self.identity_init:  # Halved before they are added: twice x may overflow.
            return by_channel / 2 + by_position / 2
        return by_channel + by_position

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``, ``(..., H, W, C)``.

        It is the sum of the gates, or with ``identity_init`` their mean. With
        ``combine="max"`` it is the larger gate where ``x`` is positive and the smaller
        one where ``x`` is negative, so that its product with ``x`` is the larger of the
        two products.
        """
        x, channel, spatial = self._promoted(x, mask)
        if self.combine == "add":
            return (channel + spatial) / 2 if self.identity_init else channel + spatial
        sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
        return sign * functional.larger(sign * channel, sign * spatial)

    def _promoted(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        """The map and its two gates in the block's dtype."""
        x, _ = self.validated(x, mask)
        channel = self.channel.channel_gate(x, mask)
        spatial = self.spatial_gate(x, mask)
        x, channel, spatial = promote_dtype(x, channel, spatial, dtype=self.dtype)
        return x, channel, spatial
