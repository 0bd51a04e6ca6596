"""Channel and spatial attention blocks (SE, ECA, CBAM) for Flax Linen.

Every block maps a feature map ``(..., H, W, C)`` to one of the same shape::

  >>> import flax_attn, jax, jax.numpy as jnp
  >>> x = jnp.ones((2, 8, 8, 64))
  >>> block = flax_attn.CBAM()
  >>> variables = block.init(jax.random.key(0), x)
  >>> block.apply(variables, x).shape
  (2, 8, 8, 64)
"""

from flax_attn.cbam import CBAM
from flax_attn.channel import ECA, SE, ChannelAttention
from flax_attn.functional import eca_kernel_size
from flax_attn.insertion import assert_active, insert, merge, parameter_labels, sites
from flax_attn.layout import ChannelsFirst
from flax_attn.spatial import SpatialAttention

__version__ = "0.1.0"

__all__ = [
    "CBAM",
    "ChannelAttention",
    "ChannelsFirst",
    "ECA",
    "SE",
    "SpatialAttention",
    "assert_active",
    "eca_kernel_size",
    "insert",
    "merge",
    "parameter_labels",
    "sites",
]
