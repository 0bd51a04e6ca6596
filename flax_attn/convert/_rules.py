"""The modules' names on either side, and how their arrays move."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from flax_attn.convert._arrays import Arrays

Naming = Literal["timm", "torchvision", "article"]
Side = Literal["torch", "flax"]
Shape = tuple[int | None, ...]
"""Of an array; None is any size."""
BlockIndex = tuple[int, int] | None
"""The stage of a residual block from 1, its place there from 0; None is outside."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a module holds, and how its weight moves from one side to the other."""

    shapes: dict[Side, Shape]
    """Of the weight."""
    moves: dict[Side, Callable[[np.ndarray], np.ndarray]]
    """Of the weight, to each side from the other one."""
    leaves: dict[str, str | None]
    """PyTorch's names of the arrays, the weight first, to ours; None is dropped."""
    whole: bool = False
    """Whether a module has all of the arrays. Otherwise it has the weight at least."""

    def targets(self, source: Side) -> Mapping[str, str | None]:
        """The names of the arrays on ``source`` to those on the other side."""
        if source == "torch":
            return self.leaves
        return {ours: theirs for theirs, ours in self.leaves.items() if ours}

    def needed(self, source: Side) -> list[str]:
        """The names on ``source`` of the arrays without which there is no module."""
        names = [name for name, other in self.targets(source).items() if other]
        return names if self.whole else names[:1]

    def shape(self, leaf: str, arrays: Arrays, source: Side) -> Shape:
        """Of the array ``leaf`` among those of its module."""
        weight = next(iter(self.targets(source)))
        if leaf == weight:
            return self.shapes[source]
        if weight not in arrays or not arrays[weight].ndim:
            return (None,)
        return (arrays[weight].shape[0 if source == "torch" else -1],)

    def move(self, array: np.ndarray, target: Side) -> np.ndarray:
        """A copy as it is on ``target``; arrays of one axis are alike everywhere."""
        moved = self.moves[target](array) if array.ndim > 1 else array
        return np.array(moved, order="C")


_WEIGHT: dict[str, str | None] = {"weight": "params/kernel"}
_BIASED: dict[str, str | None] = _WEIGHT | {"bias": "params/bias"}


def _transposed(
    torch: Shape,
    *axes: int,
    leaves: dict[str, str | None] = _BIASED,
    flip: bool = False,
) -> Kind:
    """A kind whose weight is transposed on the way to Flax, its inputs reversed."""
    back = tuple(axes.index(i) for i in range(len(axes)))
    order = slice(None, None, -1 if flip else 1)
    return Kind(
        {"torch": torch, "flax": tuple(torch[i] for i in axes)},
        {
            "flax": lambda w: w[:, order].transpose(axes),
            "torch": lambda k: k.transpose(back)[:, order],
        },
        leaves,
    )


_CONV = _transposed((None,) * 4, 2, 3, 1, 0, leaves=_WEIGHT)
_DENSE = _transposed((None, None), 1, 0)
_ALONG_CHANNELS = _transposed((1, 1, None), 2, 1, 0)
_MAX_MEAN = _transposed((1, 2, None, None), 2, 3, 1, 0)
_MEAN_MAX = _transposed((1, 2, None, None), 2, 3, 1, 0, flip=True)
_DENSE_AS_CONV = Kind(
    {"torch": (None, None, 1, 1), "flax": (None, None)},
    {"flax": lambda w: w[:, :, 0, 0].T, "torch": lambda k: k.T[:, :, None, None]},
    _BIASED,
)
_NORM = Kind(
    {"torch": (None,), "flax": (None,)},
    {},
    {
        "weight": "params/scale",
        "bias": "params/bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
        "num_batches_tracked": None,
    },
    whole=True,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The name of a module on either side, and what it is."""

    torch: str
    flax: str
    kind: Kind

    def under(self, torch: str, flax: str) -> "Rule":
        return Rule(torch + self.torch, flax + self.flax, self.kind)


_SE = (
    Rule("fc1", "reduce", _DENSE_AS_CONV),
    Rule("fc2", "expand", _DENSE_AS_CONV),
)
_ECA = (Rule("conv", "conv", _ALONG_CHANNELS),)
_TIMM_SPATIAL = (
    Rule("conv.conv", "conv", _MEAN_MAX),
    Rule("conv.bn", "norm", _NORM),
)
_ARTICLE_CHANNEL = (
    Rule("fc_layers.0", "reduce", _DENSE),
    Rule("fc_layers.2", "expand", _DENSE),
    *_ECA,
)
_ARTICLE_SPATIAL = (Rule("conv", "conv", _MAX_MEAN),)
BLOCK_RULES: dict[Naming, tuple[Rule, ...]] = {
    "timm": (
        *_SE,
        *_ECA,
        *_TIMM_SPATIAL,
        *(rule.under("channel.", "channel/") for rule in _SE),
        *(rule.under("spatial.", "spatial/") for rule in _TIMM_SPATIAL),
    ),
    "torchvision": _SE,
    "article": (
        *_ARTICLE_CHANNEL,
        *_ARTICLE_SPATIAL,
        *(r.under("channel_attention_block.", "channel/") for r in _ARTICLE_CHANNEL),
        *(r.under("spatial_attention_block.", "spatial/") for r in _ARTICLE_SPATIAL),
    ),
}
# Where a residual block has its attention. torchvision's have none.
_ATTENTION: dict[Naming, str] = {"timm": "se.", "article": "attention."}
_STEM_AND_HEAD = (
    Rule("conv1", "conv_stem", _CONV),
    Rule("bn1", "norm_stem", _NORM),
    Rule("fc", "head", _DENSE),
)
_RESIDUAL = (
    *(Rule(f"conv{i}", f"conv{i}", _CONV) for i in (1, 2, 3)),
    *(Rule(f"bn{i}", f"norm{i}", _NORM) for i in (1, 2, 3)),
    Rule("downsample.0", "conv_shortcut", _CONV),
    Rule("downsample.1", "norm_shortcut", _NORM),
)
_TIMM_DEEP_STEM = (
    Rule("conv1.0", "conv_stem1", _CONV),
    Rule("conv1.1", "norm_stem1", _NORM),
    Rule("conv1.3", "conv_stem2", _CONV),
    Rule("conv1.4", "norm_stem2", _NORM),
    Rule("conv1.6", "conv_stem3", _CONV),
)
_TIMM_POOLED_SHORTCUT = (
    Rule("downsample.1", "conv_pooled_shortcut", _CONV),
    Rule("downsample.2", "norm_pooled_shortcut", _NORM),
)
# Known when they are read; written, they have the names above.
_HEAD_ALIASES = (Rule("linear", "head", _DENSE),)
_RESIDUAL_ALIASES = (
    Rule("shortcut.0", "conv_shortcut", _CONV),
    Rule("shortcut.1", "norm_shortcut", _NORM),
)
_TORCH_BLOCK = re.compile(r"layer([1-9][0-9]*)\.(0|[1-9][0-9]*)\.(.+)")
_FLAX_BLOCK = re.compile(r"stage([1-9][0-9]*)_block([1-9][0-9]*)/(.+)")


def top_rules(source: Side, naming: Naming) -> list[Rule]:
    rules = [*BLOCK_RULES[naming], *_STEM_AND_HEAD]
    if naming == "timm":
        rules += _TIMM_DEEP_STEM
    return rules + (list(_HEAD_ALIASES) if source == "torch" else [])


def residual_rules(source: Side, naming: Naming) -> list[Rule]:
    rules = list(_RESIDUAL)
    if naming == "timm":
        rules += _TIMM_POOLED_SHORTCUT
    if naming in _ATTENTION:
        under = _ATTENTION[naming], "attention/"
        rules += [rule.under(*under) for rule in BLOCK_RULES[naming]]
    return rules + (list(_RESIDUAL_ALIASES) if source == "torch" else [])


def split_key(side: Side, key: str) -> tuple[BlockIndex, str, str] | None:
    """The residual block, the module in it and the array in that, or None."""
    if side == "torch":
        path, _, leaf = key.rpartition(".")
        match, first = _TORCH_BLOCK.fullmatch(path), 0
    else:
        collection, _, rest = key.partition("/")
        path, _, leaf = rest.rpartition("/")
        leaf = f"{collection}/{leaf}"
        match, first = _FLAX_BLOCK.fullmatch(path), 1
    if match:
        return (int(match[1]), int(match[2]) - first), match[3], leaf
    return (None, path, leaf) if path else None


def join_key(side: Side, block: BlockIndex, module: str, leaf: str) -> str:
    """The key that ``split_key`` splits."""
    if side == "torch":
        path = f"layer{block[0]}.{block[1]}.{module}" if block else module
        return f"{path}.{leaf}"
    path = f"stage{block[0]}_block{block[1] + 1}/{module}" if block else module
    collection, leaf = leaf.split("/")
    return f"{collection}/{path}/{leaf}"


def fits(shape: tuple[int, ...], pattern: Shape) -> bool:
    return len(shape) == len(pattern) and all(
        want in (None, size) for size, want in zip(shape, pattern, strict=True)
    )


def shape_text(pattern: Shape) -> str:
    sizes = ["*" if size is None else str(size) for size in pattern]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
