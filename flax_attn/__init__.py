"""Channel and spatial attention blocks (SE, ECA, CBAM and more) for Flax Linen.

Every block maps a feature map ``(..., H, W, C)`` to one of the same shape::

  >>> import flax_attn, jax, jax.numpy as jnp
  >>> x = jnp.ones((2, 8, 8, 64))
  >>> block = flax_attn.CBAM()
  >>> variables = block.init(jax.random.key(0), x)
  >>> block.apply(variables, x).shape
  (2, 8, 8, 64)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from flax_attn import blocks, presets
from flax_attn import inspect as inspect
from flax_attn.blocks import *  # noqa: F403  (what its own list names)
from flax_attn.cost import Cost, cost
from flax_attn.functional import eca_kernel_size
from flax_attn.insertion import assert_active, insert, merge, parameter_labels, sites

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "assert_active",
    "cost",
    "eca_kernel_size",
    "insert",
    "merge",
    "parameter_labels",
    "presets",
    "sites",
]
__all__ += blocks.__all__

_LAZY = ("convert", "nnx", "resnet")

if TYPE_CHECKING:
    from flax_attn import convert as convert
    from flax_attn import nnx as nnx
    from flax_attn import resnet as resnet
else:
    # Imported on first use: `python -m flax_attn.convert` must not find its module
    # already imported, and importing Flax NNX takes time.
    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            return importlib.import_module(f"flax_attn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY})
