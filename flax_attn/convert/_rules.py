"""The naming rules: the modules' names on either side, and their arrays' layouts."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from flax_attn.convert._arrays import Arrays

Naming = Literal[
    "timm",
    "torchvision",
    "article",
    "official",
    "official_bam",
    "efficientnet",
    "monai",
    "smp",
    "ca_sa",
]
Side = Literal["torch", "flax"]
Shape = tuple[int | None, ...]
"""Of an array; None is any size."""
BlockIndex = tuple[int, int] | None
"""The stage of a residual block from 1, its place there from 0; None is outside."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """The arrays of a module, and how the layout of its weight changes."""

    shapes: dict[Side, Shape]
    """Shape of the weight on each side."""
    moves: dict[Side, Callable[[np.ndarray], np.ndarray]]
    """From the weight of the other side to that of each side."""
    leaves: dict[str, str | None]
    """From PyTorch's names of the arrays, the weight first, to Flax's or None."""
    whole: bool = False
    """Whether all of the arrays are required, and not the weight alone."""
    zero_bias: bool = False
    """Whether PyTorch alone has a bias, without effect, which is written as zeros."""

    def targets(self, source: Side) -> Mapping[str, str | None]:
        """From the names of the arrays on ``source`` to those on the other side."""
        if source == "torch":
            return self.leaves
        return {flax: torch for torch, flax in self.leaves.items() if flax}

    def needed(self, source: Side) -> list[str]:
        """The names on ``source`` of the required arrays."""
        names = [name for name, other in self.targets(source).items() if other]
        return names if self.whole else names[:1]

    def shape(self, leaf: str, arrays: Arrays, source: Side) -> Shape:
        """The expected shape of the array ``leaf`` among ``arrays``, its module's."""
        weight = next(iter(self.targets(source)))
        if leaf == weight:
            return self.shapes[source]
        if weight not in arrays or not arrays[weight].ndim:
            return (None,)
        return (arrays[weight].shape[0 if source == "torch" else -1],)

    def move(self, array: np.ndarray, target: Side) -> np.ndarray:
        """A copy laid out for ``target``; 1-D arrays are the same on both sides."""
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
    """A kind whose weight is transposed for Flax; ``flip`` reverses its inputs."""
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
_BIASED_CONV = _transposed((None,) * 4, 2, 3, 1, 0)
_DENSE = _transposed((None, None), 1, 0)
_ALONG_CHANNELS = _transposed((1, 1, None), 2, 1, 0)
_MAX_MEAN = _transposed((1, 2, None, None), 2, 3, 1, 0)
_MEAN_MAX = _transposed((1, 2, None, None), 2, 3, 1, 0, flip=True)
_ONE_MAP = _transposed((1, 1, None, None), 2, 3, 1, 0)
_DENSE_AS_CONV = Kind(
    {"torch": (None, None, 1, 1), "flax": (None, None)},
    {"flax": lambda w: w[:, :, 0, 0].T, "torch": lambda k: k.T[:, :, None, None]},
    _BIASED,
)
# Of scSE: one logit for each position.
_DENSE_AS_CONV_TO_ONE = dataclasses.replace(
    _DENSE_AS_CONV, shapes={"torch": (1, None, 1, 1), "flax": (None, 1)}
)
# Of the global context: softmax cancels the bias, and no block here has it.
_POOLING_AS_CONV = dataclasses.replace(
    _DENSE_AS_CONV_TO_ONE, leaves=_WEIGHT | {"bias": None}, zero_bias=True
)
_LAYER_NORM = Kind(
    {"torch": (None,), "flax": (None,)},
    {},
    {"weight": "params/scale", "bias": "params/bias"},
    whole=True,
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
    """The name of a module on either side, and its kind."""

    torch: str
    flax: str
    kind: Kind
    mark: "Rule | None" = None
    """A module of the same block: without it, the name belongs to another block."""

    def under(self, torch: str, flax: str) -> "Rule":
        """The same rule inside the modules ``torch`` and ``flax``."""
        mark = self.mark and self.mark.under(torch, flax)
        return Rule(torch + self.torch, flax + self.flax, self.kind, mark)


def _under(torch: str, flax: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(rule.under(torch, flax) for rule in rules)


def _marked(mark: Rule, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """``mark``, and ``rules`` for blocks that have it."""
    return mark, *(dataclasses.replace(rule, mark=mark) for rule in rules)


def _mlp(reduce: str, expand: str, kind: Kind) -> tuple[Rule, ...]:
    return Rule(reduce, "reduce", kind), Rule(expand, "expand", kind)


def _conv_and_norm(conv: str, norm: str, place: str) -> tuple[Rule, ...]:
    return Rule(conv, f"conv{place}", _CONV), Rule(norm, f"norm{place}", _NORM)


# Also SENet in PyTorch: https://github.com/Cadene/pretrained-models.pytorch,
# pretrainedmodels/models/senet.py.
_SE = _mlp("fc1", "fc2", _DENSE_AS_CONV)
_ECA = (Rule("conv", "conv", _ALONG_CHANNELS),)
_TIMM_SPATIAL = (
    Rule("conv.conv", "conv", _MEAN_MAX),
    Rule("conv.conv", "conv", _ONE_MAP),
    Rule("conv.bn", "norm", _NORM),
)
# In a residual block alone: elsewhere `fc` is the head.
_TIMM_ESE = (Rule("fc", "excite", _DENSE_AS_CONV),)
_TIMM_CONTEXT_MLP = (*_SE, Rule("norm", "norm", _LAYER_NORM))
_TIMM_CONTEXT = _marked(
    Rule("conv_attn", "pool", _POOLING_AS_CONV),
    (
        *_under("mlp_scale.", "", _TIMM_CONTEXT_MLP),
        *_under("mlp_add.", "", _TIMM_CONTEXT_MLP),
    ),
)
_TIMM_COORDINATE = _marked(
    Rule("conv_h", "expand_h", _DENSE_AS_CONV),
    (
        Rule("conv_w", "expand_w", _DENSE_AS_CONV),
        Rule("conv1", "reduce", _DENSE_AS_CONV),
        Rule("bn1", "hidden_norm", _NORM),
    ),
)
_TIMM_GATHER_MLP = _under("mlp.", "", _SE)
# Each convolution halves the map; six cover an extent of 64.
_TIMM_GATHER = _marked(
    Rule("gather.conv1", "gather1", _CONV),
    (
        *(Rule(f"gather.conv{i}", f"gather{i}", _CONV) for i in range(2, 7)),
        *(Rule(f"gather.norm{i}", f"gather{i}_norm", _NORM) for i in range(1, 7)),
        *_TIMM_GATHER_MLP,
    ),
)
_ARTICLE_CHANNEL = (*_mlp("fc_layers.0", "fc_layers.2", _DENSE), *_ECA)
_ARTICLE_SPATIAL = (Rule("conv", "conv", _MAX_MEAN),)
# https://github.com/Jongchan/attention-module, MODELS/cbam.py; [max, mean].
_OFFICIAL_CHANNEL = _mlp("mlp.1", "mlp.3", _DENSE)
_OFFICIAL_SPATIAL = (
    Rule("spatial.conv", "conv", _MAX_MEAN),
    Rule("spatial.bn", "norm", _NORM),
)
_OFFICIAL_CBAM = (
    *_under("ChannelGate.", "channel/", _OFFICIAL_CHANNEL),
    *_under("SpatialGate.", "spatial/", _OFFICIAL_SPATIAL),
)
# https://github.com/Project-MONAI/MONAI, ChannelSELayer; the same names are in
# https://github.com/moskomule/senet.pytorch, senet/se_module.py.
_MONAI = _mlp("fc.0", "fc.2", _DENSE)
# https://github.com/luuuyi/CBAM.PyTorch, model/resnet_cbam.py, and its many copies;
# [mean, max]. Some have the two layers in a Sequential called `fc`.
_CA = (*_SE, *_mlp("fc.0", "fc.2", _DENSE_AS_CONV))
_SA = (Rule("conv1", "conv", _MEAN_MAX),)
_CA_SA = (*_under("ca.", "channel/", _CA), *_under("sa.", "spatial/", _SA))
# All are read. Of rules with the same Flax name, the one that ``like`` has is written,
# else the first; those with the same mark are different blocks, and raise instead.
BLOCK_RULES: dict[Naming, tuple[Rule, ...]] = {
    "timm": (
        *_SE,
        # A norm between SE's layers has the names of timm's `norm_layer`.
        Rule("bn", "reduce_norm", _NORM),
        *_ECA,
        *_TIMM_SPATIAL,
        *_under("channel.", "channel/", _SE),
        *_under("spatial.", "spatial/", _TIMM_SPATIAL),
        *_TIMM_CONTEXT,
        *_TIMM_COORDINATE,
        *_TIMM_GATHER,
        # Without convolutions, the parameters are those of SE.
        *_TIMM_GATHER_MLP,
    ),
    "torchvision": _SE,
    "article": (
        *_ARTICLE_CHANNEL,
        *_ARTICLE_SPATIAL,
        *_under("channel_attention_block.", "channel/", _ARTICLE_CHANNEL),
        *_under("spatial_attention_block.", "spatial/", _ARTICLE_SPATIAL),
    ),
    # ECA-Net: https://github.com/BangguWu/ECANet, models/eca_module.py.
    "official": (*_OFFICIAL_CHANNEL, *_OFFICIAL_SPATIAL, *_OFFICIAL_CBAM, *_ECA),
    # MODELS/bam.py. Apart from the above, whose MLP has other names.
    "official_bam": (
        Rule("channel_att.gate_c.gate_c_fc_0", "reduce", _DENSE),
        Rule("channel_att.gate_c.gate_c_bn_1", "reduce_norm", _NORM),
        Rule("channel_att.gate_c.gate_c_fc_final", "expand", _DENSE),
        *(
            Rule(f"spatial_att.gate_s.gate_s_{torch}", f"spatial_{flax}", kind)
            for torch, flax, kind in (
                ("conv_reduce0", "reduce", _BIASED_CONV),
                ("bn_reduce0", "reduce_norm", _NORM),
                ("conv_di_0", "conv1", _BIASED_CONV),
                ("bn_di_0", "conv1_norm", _NORM),
                ("conv_di_1", "conv2", _BIASED_CONV),
                ("bn_di_1", "conv2_norm", _NORM),
                ("conv_final", "expand", _BIASED_CONV),
            )
        ),
    ),
    # timm, timm/models/_efficientnet_blocks.py: SqueezeExcite.
    "efficientnet": _mlp("conv_reduce", "conv_expand", _DENSE_AS_CONV),
    "monai": _MONAI,
    # https://github.com/qubvel-org/segmentation_models.pytorch, base/modules.py:
    # SCSEModule.
    "smp": (
        *_under("cSE.", "channel/", _mlp("1", "3", _DENSE_AS_CONV)),
        Rule("sSE.0", "spatial", _DENSE_AS_CONV_TO_ONE),
    ),
    "ca_sa": (*_CA, *_SA, *_CA_SA),
}
# The attention of a residual block, by its names there.
_RESIDUAL_ATTENTION: dict[Naming, tuple[Rule, ...]] = {
    "timm": _under("se.", "", (*BLOCK_RULES["timm"], *_TIMM_ESE)),
    "article": _under("attention.", "", BLOCK_RULES["article"]),
    "official": (*_under("cbam.", "", _OFFICIAL_CBAM), *_under("eca.", "", _ECA)),
    "monai": _under("se.", "", _MONAI),
    "ca_sa": _CA_SA,
}
_STEM_AND_HEAD = (
    *_conv_and_norm("conv1", "bn1", "_stem"),
    Rule("fc", "head", _DENSE),
)
_TIMM_STEM = (
    *_conv_and_norm("conv1.0", "conv1.1", "_stem1"),
    *_conv_and_norm("conv1.3", "conv1.4", "_stem2"),
    Rule("conv1.6", "conv_stem3", _CONV),
    *_conv_and_norm("maxpool.0", "maxpool.1", "_stem_pool"),
)
_RESIDUAL = (
    *(rule for i in "123" for rule in _conv_and_norm(f"conv{i}", f"bn{i}", i)),
    *_conv_and_norm("downsample.0", "downsample.1", "_shortcut"),
)
_TIMM_RESIDUAL = _conv_and_norm("downsample.1", "downsample.2", "_pooled_shortcut")
# Read under these names too; written under those above.
_HEAD_ALIASES = (Rule("linear", "head", _DENSE),)
_RESIDUAL_ALIASES = _conv_and_norm("shortcut.0", "shortcut.1", "_shortcut")
_TORCH_BLOCK = re.compile(r"layer([1-9][0-9]*)\.(0|[1-9][0-9]*)\.(.+)")
_FLAX_BLOCK = re.compile(r"stage([1-9][0-9]*)_block([1-9][0-9]*)/(.+)")


def top_rules(source: Side, naming: Naming) -> list[Rule]:
    """The rules for modules outside of residual blocks."""
    rules = [*BLOCK_RULES[naming], *_STEM_AND_HEAD]
    if naming == "timm":
        # Last, since `fc` is the head first.
        rules += (*_TIMM_STEM, *_TIMM_ESE)
    if source == "torch":
        rules += _HEAD_ALIASES
    return rules


def residual_rules(source: Side, naming: Naming) -> list[Rule]:
    """The rules for modules of a residual block."""
    rules = list(_RESIDUAL)
    if naming == "timm":
        rules += _TIMM_RESIDUAL
    rules += _under("", "attention/", _RESIDUAL_ATTENTION.get(naming, ()))
    if source == "torch":
        rules += _RESIDUAL_ALIASES
    return rules


def split_key(side: Side, key: str) -> tuple[BlockIndex, str, str] | None:
    """The residual block, the module in it and the array in that; None: not a key."""
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
    """Undoes ``split_key``."""
    if side == "torch":
        path = f"layer{block[0]}.{block[1]}.{module}" if block else module
        return f"{path}.{leaf}"
    path = f"stage{block[0]}_block{block[1] + 1}/{module}" if block else module
    collection, leaf = leaf.split("/")
    return f"{collection}/{path}/{leaf}"


def fits(shape: tuple[int, ...], pattern: Shape) -> bool:
    """Whether ``shape`` has the sizes that ``pattern`` states."""
    return len(shape) == len(pattern) and all(
        want in (None, size) for size, want in zip(shape, pattern, strict=True)
    )


def shape_text(pattern: Shape) -> str:
    """``pattern`` as shapes are printed, with a star for any size."""
    sizes = ["*" if size is None else str(size) for size in pattern]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
