"""Every attention block as a Flax NNX module, with the variables of its Linen block.

Like ``nnx.Conv``, a block is created with the number of channels. It is called with a
feature map and an optional mask::

  >>> from flax import nnx
  >>> import flax_attn.nnx
  >>> import jax, jax.numpy as jnp
  >>> block = flax_attn.nnx.CBAM(64, reduction=8, rngs=nnx.Rngs(0))
  >>> block(jnp.ones((2, 8, 8, 64))).shape
  (2, 8, 8, 64)
  >>> block.channel.reduce.kernel.shape
  (64, 8)

The keyword fields, their defaults and checks, and the arithmetic are those of the Linen
block, ``block.linen``. Only fields for norm layers take NNX classes: ``CBAM(64,
spatial_norm=nnx.BatchNorm, rngs=rngs)`` calls ``nnx.BatchNorm`` with the number of
channels and ``rngs=``. The norm is ``block.spatial.norm``, and ``train()`` and
``eval()`` apply to it.

The variables have the same names, shapes and collections in both APIs, so checkpoints
and variables from ``flax_attn.convert`` work unchanged::

  >>> linen = flax_attn.CBAM(reduction=8)
  >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
  >>> variables = linen.init(jax.random.key(1), x)
  >>> flax_attn.nnx.from_linen(block, variables)
  >>> bool((block(x) == linen.apply(variables, x)).all())
  True

Gates are sown as ``nnx.Intermediate`` under ``nnx.capture``; ``attention_maps`` works
with every supported version of Flax. A call uses no random numbers. ``insert`` adds
blocks to a third-party model, and ``assert_active`` finds gates that do not affect the
output.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flax_attn.blocks import BLOCKS as _LINEN
from flax_attn.nnx._active import assert_active
from flax_attn.nnx._blocks import Attention, Layer, native
from flax_attn.nnx._gates import attention_maps
from flax_attn.nnx._insertion import attention_params, insert
from flax_attn.nnx._variables import from_linen, to_linen

BLOCKS: Mapping[str, Any] = MappingProxyType(
    {name: native(make) for name, make in _LINEN.items()}
)
"""The constructor of each block, by its name in ``flax_attn.BLOCKS``."""

_CLASSES = {
    make.__name__: make
    for make in (getattr(make, "func", make) for make in BLOCKS.values())
}
globals().update(_CLASSES)

__all__ = [  # noqa: PLE0604 - The blocks are those of the registry.
    *_CLASSES,
    "Attention",
    "BLOCKS",
    "Layer",
    "assert_active",
    "attention_maps",
    "attention_params",
    "create",
    "from_linen",
    "insert",
    "native",
    "to_linen",
]

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Attention]: ...


def create(name: str, /, features: int, **fields: Any) -> Attention:
    """Creates the block registered in ``BLOCKS`` as ``name``, with these fields.

      >>> from flax import nnx
      >>> create("scse-max", 64, rngs=nnx.Rngs(0)).linen.combine
      'max'

    Args:
      name: a name in ``BLOCKS``.
      features: number of channels C.
      **fields: ``rngs`` and the block's fields.

    Raises:
      ValueError: there is no block with that name, or a field is out of its range.
    """
    if name not in BLOCKS:
        raise ValueError(f"`name` must be one of {', '.join(BLOCKS)}, got {name!r}.")
    return BLOCKS[name](features, **fields)
