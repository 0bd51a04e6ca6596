"""Every attention block as a Flax NNX module, with the variables of its Linen block.

A block is made for a number of channels, as ``nnx.Conv`` is, and called with a map and
an optional mask::

  >>> from flax import nnx
  >>> import flax_attn.nnx
  >>> import jax, jax.numpy as jnp
  >>> block = flax_attn.nnx.CBAM(64, reduction=8, rngs=nnx.Rngs(0))
  >>> block(jnp.ones((2, 8, 8, 64))).shape
  (2, 8, 8, 64)
  >>> block.channel.reduce.kernel.shape
  (64, 8)

The keyword fields, their defaults and checks, and the arithmetic are those of the
Linen block, which is ``block.linen``. Only a field that makes a norm takes NNX's:
``CBAM(64, spatial_norm=nnx.BatchNorm, rngs=rngs)`` calls it with the channels and
``rngs=``, and ``train()`` and ``eval()`` reach it as ``block.spatial.norm``.

The variables have the same names, shapes and collections in both APIs, so that
checkpoints and what ``flax_attn.convert`` reads go in as they are::

  >>> linen = flax_attn.CBAM(reduction=8)
  >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
  >>> variables = linen.init(jax.random.key(1), x)
  >>> flax_attn.nnx.from_linen(block, variables)
  >>> bool((block(x) == linen.apply(variables, x)).all())
  True

Gates are sown as ``nnx.Intermediate`` where ``nnx.capture`` asks for them;
``attention_maps`` reads them in every version of Flax. A call draws no random numbers.
``insert`` puts blocks into a model that somebody else wrote, and ``assert_active``
finds gates that do not act.
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
"""What makes each block, by its name in ``flax_attn.BLOCKS``."""

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
    """Returns the block that ``BLOCKS`` knows as ``name``, with these fields.

      >>> from flax import nnx
      >>> create("scse-max", 64, rngs=nnx.Rngs(0)).linen.combine
      'max'

    Args:
      name: a name in ``BLOCKS``.
      features: number of channels C.
      **fields: ``rngs`` and the block's fields.

    Raises:
      ValueError: there is no such block, or a field is out of its range.
    """
    if name not in BLOCKS:
        raise ValueError(f"`name` must be one of {', '.join(BLOCKS)}, got {name!r}.")
    return BLOCKS[name](features, **fields)
