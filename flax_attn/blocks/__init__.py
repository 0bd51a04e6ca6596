"""The attention blocks and their registry."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from flax import linen as nn

from flax_attn.blocks.bam import BAM
from flax_attn.blocks.base import Attention
from flax_attn.blocks.cbam import CBAM
from flax_attn.blocks.channel import ECA, SE, ChannelAttention
from flax_attn.blocks.coordinate import CoordinateAttention
from flax_attn.blocks.ese import ESE
from flax_attn.blocks.gather_excite import GatherExcite
from flax_attn.blocks.global_context import GlobalContext
from flax_attn.blocks.layout import ChannelsFirst
from flax_attn.blocks.light_cbam import LightCBAM
from flax_attn.blocks.scse import scSE
from flax_attn.blocks.simam import SimAM
from flax_attn.blocks.spatial import SpatialAttention
from flax_attn.blocks.sse import sSE

__all__ = [
    "Attention",
    "BAM",
    "BLOCKS",
    "CBAM",
    "ChannelAttention",
    "ChannelsFirst",
    "CoordinateAttention",
    "ECA",
    "ESE",
    "GatherExcite",
    "GlobalContext",
    "LightCBAM",
    "SE",
    "SimAM",
    "SpatialAttention",
    "create",
    "sSE",
    "scSE",
]

_blocks: dict[str, Callable[..., nn.Module]] = {
    "se": SE,
    "se-max": partial(SE, pool="max"),
    "eca": ECA,
    "ese": ESE,
    "channel": ChannelAttention,
    "channel-conv": partial(ChannelAttention, excite="conv"),
    "spatial": SpatialAttention,
    "cbam": CBAM,
    "cbam-conv": partial(CBAM, excite="conv"),
    "lcbam": LightCBAM,
    "bam": BAM,
    "sse": sSE,
    "scse": scSE,
    "scse-max": partial(scSE, combine="max"),
    "simam": SimAM,
    "coordinate": CoordinateAttention,
    "gc": GlobalContext,
    "ge": GatherExcite,
    "ge-plus": partial(GatherExcite, extent=4, extra_params=True, use_mlp=True),
}

BLOCKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(_blocks)
"""The constructor of each block, by its name in commands and in ``create``."""


def create(name: str, /, **fields: Any) -> nn.Module:
    """Creates the block registered in ``BLOCKS`` as ``name``, with these fields.

      >>> create("cbam", reduction=8).reduction
      8

    Raises:
      ValueError: there is no block with that name.
    """
    if name not in BLOCKS:
        raise ValueError(f"`name` must be one of {', '.join(BLOCKS)}, got {name!r}.")
    return BLOCKS[name](**fields)
