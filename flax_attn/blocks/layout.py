"""Array layouts other than NHWC."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_attn.functional import checks


class ChannelsFirst(nn.Module):
    """Runs a module written for ``(..., H, W, C)`` on arrays ``(..., C, H, W)``.

    It moves the channels last, calls ``module``, and moves them back. The parameters
    are those of ``module``, without an extra level, so both layouts use the same
    checkpoints::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 64, 8, 8))
      >>> block = flax_attn.ChannelsFirst(flax_attn.SE())
      >>> params = block.init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'expand': {'kernel': (4, 64)}, 'reduce': {'kernel': (64, 4)}}

    In a model, the parameters are stored under the name of ``module``, so set the name
    there: ``ChannelsFirst(SE(name="attention"))``. Values that ``module`` sows, such as
    gates, stay channels-last.

    Attributes:
      module: any module from ``(..., H, W, C)`` to ``(..., H', W', C')``.
      spatial_dims: number of spatial axes, at least 1; must equal that of ``module`` if
        it has this field (default: 2).

    Raises:
      ValueError: at the first call, if the input has too few axes or ``spatial_dims``
        differs from that of ``module``.
    """

    module: nn.Module
    spatial_dims: int = 2

    def setup(self) -> None:
        """Puts the parameters of ``module`` where they are without this wrapper."""
        nn.share_scope(self, self.module)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns ``module(x, *args, **kwargs)`` for ``x`` of shape (..., C, H, W)."""
        return self._channels_first(self.module, x, *args, **kwargs)

    def multiplier(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns the multiplier of the block ``module``, channels first.

        Shape ``(..., C, 1, 1)``, ``(..., 1, H, W)`` or ``(..., C, H, W)``; ``mask`` is
        ``(..., H, W)``.
        """
        return self._channels_first(self.module.multiplier, x, mask)

    def _channels_first(
        self, function: Callable[..., jax.Array], x: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        x = jnp.asarray(x)
        checks.check_positive("spatial_dims", self.spatial_dims)
        inner = getattr(self.module, "spatial_dims", self.spatial_dims)
        if inner != self.spatial_dims:
            raise ValueError(
                f"`spatial_dims` must be that of `module`, {inner!r}, got "
                f"{self.spatial_dims}; pass the same number to both."
            )
        channels = -1 - self.spatial_dims
        if x.ndim < -channels:
            spatial = checks.LAYOUTS.get(self.spatial_dims, "...")
            raise ValueError(
                f"`x` must have at least {-channels} axes (..., C, {spatial}), got "
                f"shape {x.shape}; add the missing axes, e.g. "
                f"x[:, :{', None' * self.spatial_dims}] for a batch of vectors."
            )
        y = function(jnp.moveaxis(x, channels, -1), *args, **kwargs)
        return jnp.moveaxis(y, -1, channels)
