"""timm's ResNets: the arguments behind their names, and the same as fields.

A configuration of timm names an ``architecture`` and what of it was changed
(``model_args``). The names are regular, so they are parsed and not listed; the tests
compare with timm's own arguments, name by name.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from flax_attn import presets
from flax_attn.functional.checks import is_int
from flax_attn.resnet._blocks import BasicBlock, BottleneckBlock
from flax_attn.resnet._network import IMAGENET_STAGES

_NAME = re.compile(
    r"(?P<attention>se|eca)?(?P<wide>wide_)?resnex?t(?P<kind>aa|blur|rs)?"
    r"(?P<depth>[0-9]+|light)(?P<stem>[cdst])?"
    r"(?:_(?P<groups>[0-9]+)x(?P<width>[0-9]+)d)?(?(wide)_2)"
)
_BASIC = (10, 18, 34)
_STAGES: Mapping[str, tuple[int, ...]] = {
    **{str(depth): stages for depth, stages in IMAGENET_STAGES.items()},
    "10": (1, 1, 1, 1),
    "14": (1, 1, 1, 1),
    "26": (2, 2, 2, 2),
    "200": (3, 24, 36, 3),
    "201": (3, 24, 36, 4),
    "269": (3, 30, 48, 8),
    "270": (4, 29, 53, 4),
    "350": (4, 36, 72, 4),
    "420": (4, 44, 87, 4),
    "light": (1, 1, 11, 3),
}
# What an entry of timm's resnet.py has that ``ResNet`` has not.
_REFUSED = {
    "ecaresnet50d_pruned": "a different width for every convolution",
    "ecaresnet101d_pruned": "a different width for every convolution",
    "resnet50_gn": "GroupNorm",
    "senet154": "3x3 convolutions as shortcuts",
    "test_resnet": "two kinds of residual blocks",
}
# timm's defaults of all arguments that are read here.
_DEFAULTS: Mapping[str, Any] = {
    "num_classes": 1000,
    "in_chans": 3,
    "channels": (64, 128, 256, 512),
    "cardinality": 1,
    "base_width": 64,
    "stem_width": 64,
    "stem_type": "",
    "replace_stem_pool": False,
    "avg_down": False,
    "aa_layer": None,
    "block_args": {},
}
# Of these only the default is covered.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "output_stride": (32,),
    "global_pool": ("avg",),
    "block_reduce_first": (1,),
    "down_kernel_size": (1,),
    "act_layer": (None, "relu"),
    "norm_layer": (None, "batchnorm", "batchnorm2d"),
}
# These affect only initialization and timm's loading and training.
_IGNORED = (
    "pretrained_strict",
    "zero_init_last",
    "drop_rate",
    "drop_path_rate",
    "drop_block_rate",
)
_ATTENTIONS: Mapping[str | None, Any] = {
    None: None,
    "": None,
    "se": presets.timm_se,
    "ese": presets.timm_ese,
    "eca": presets.timm_eca,
    "ceca": presets.timm_ceca,
    "cbam": presets.timm_cbam(train=False),
}
_POOLINGS = {None: None, "": None, "avg": "mean", "blur": "blur"}


def arguments_of(architecture: str) -> dict[str, Any]:
    """The arguments of timm's ``architecture`` that differ from the defaults.

    As in timm, except that ``block`` is the block's expansion, ``aa_layer`` is
    ``"avg"`` or ``"blur"``, and ``rd_ratio``, which timm binds to the attention of
    ResNet-RS, is a separate entry of ``block_args``.

    Raises:
      ValueError: it is not one of timm's ResNets, or ``ResNet`` does not cover it.
    """
    match = _NAME.fullmatch(architecture)
    if architecture in _REFUSED or not match or match["depth"] not in _STAGES:
        reason = _REFUSED.get(architecture)
        reason = f"which has {reason}" if reason else "which is none of them"
        raise ValueError(
            f"`architecture` must be a ResNet in timm/models/resnet.py that "
            f"`flax_attn.resnet.ResNet` supports, got {architecture!r}, {reason}; the "
            "guide `weights.md` lists the supported networks."
        )
    depth = match["depth"]
    basic = depth.isdigit() and int(depth) in _BASIC
    found: dict[str, Any] = {"block": 1 if basic else 4, "layers": _STAGES[depth]}
    stem = "d" if match["kind"] == "rs" else match["stem"]
    if stem:
        wide = stem == "s" or depth == "201"
        found["stem_type"] = "deep_tiered" if stem == "t" else "deep"
        found["stem_width"] = 64 if wide else 32
    if stem in ("d", "t") or depth == "light":
        found["avg_down"] = True
    if match["kind"] == "rs":
        found["replace_stem_pool"] = True
        found["block_args"] = {"attn_layer": "se", "rd_ratio": 0.25}
    elif match["kind"]:
        found["aa_layer"] = "avg" if match["kind"] == "aa" else "blur"
    if match["attention"]:
        found["block_args"] = {"attn_layer": match["attention"]}
    if match["groups"]:
        found["cardinality"] = int(match["groups"])
        found["base_width"] = int(match["width"])
    if match["wide"]:
        found["base_width"] = 128
    return found


def fields_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The fields of ``ResNet`` for a configuration of timm, and its input channels.

    Raises:
      ValueError: ``ResNet`` does not cover the network.
    """
    pretrained = group(config, "pretrained_cfg") or config
    classes = config.get("num_classes", pretrained.get("num_classes"))
    changed = group(config, "model_args")
    arguments = {
        **_DEFAULTS,
        **({} if classes is None else {"num_classes": classes}),
        **arguments_of(config["architecture"]),
        **changed,
    }
    for name, value in changed.items():
        known = name in _DEFAULTS or name in _IGNORED or name == "layers"
        if not known and value not in _FIXED.get(name, ()):
            rule = " or ".join(map(repr, _FIXED.get(name, ()))) or "left out"
            raise _misfit(name, rule, value)
    _check_types(arguments)
    width = arguments["channels"][0]
    stages = tuple(arguments["layers"])
    if tuple(arguments["channels"]) != tuple(width * 2**i for i in range(len(stages))):
        rule = "one for each stage, each twice the last"
        raise _misfit("channels", rule, arguments["channels"])
    anti_alias = _chosen(arguments, "aa_layer", _POOLINGS)
    pool = "conv" if arguments["replace_stem_pool"] else anti_alias or "max"
    if arguments["replace_stem_pool"] and anti_alias:
        raise _misfit("replace_stem_pool", "False with an `aa_layer`", True)
    fields = {
        "stages": stages,
        "block": _block(arguments, anti_alias),
        "num_classes": arguments["num_classes"],
        "width": width,
        "attention": _attention(group(arguments, "block_args")),
        **_stem(arguments),
        "pooled_shortcut": arguments["avg_down"],
        "stem_pool": pool,
    }
    return fields, arguments["in_chans"]


def group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry of ``config`` that is an object, empty if it is left out."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise _misfit(name, "an object", value)
    return value


def _check_types(arguments: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for numbers and flags of another type than timm's."""
    for name in ("channels", "layers"):
        values = arguments[name]
        is_list = isinstance(values, list | tuple)
        if not is_list or not values or not all(map(is_count, values)):
            raise _misfit(name, "a list of integers of at least 1", values)
    for name, default in _DEFAULTS.items():
        value = arguments[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise _misfit(name, "true or false", value)
        elif isinstance(default, int):
            least = 0 if name == "num_classes" else 1
            if not is_int(value) or value < least:
                raise _misfit(name, f"an integer of at least {least}", value)


def is_count(value: Any) -> bool:
    """Whether ``value`` is an integer of at least 1."""
    return is_int(value) and value >= 1


def _attention(block_args: Mapping[str, Any]) -> Any:
    if others := block_args.keys() - {"attn_layer", "rd_ratio"}:
        raise _misfit("block_args", "an `attn_layer` alone", sorted(others))
    attention = _chosen(block_args, "attn_layer", _ATTENTIONS)
    if "rd_ratio" not in block_args:
        return attention
    if (block_args.get("attn_layer"), block_args["rd_ratio"]) != ("se", 0.25):
        raise _misfit("rd_ratio", "0.25 and used with se", block_args["rd_ratio"])
    return partial(attention, reduction=4)


def _block(arguments: Mapping[str, Any], anti_alias: str | None) -> Any:
    options = {
        "groups": (arguments["cardinality"], 1),
        "width_per_group": (arguments["base_width"], 64),
        "anti_alias": (anti_alias, None),
    }
    changed = {k: value for k, (value, usual) in options.items() if value != usual}
    is_basic = arguments["block"] == 1
    for name in ("cardinality", "base_width") if is_basic else ():
        if arguments[name] != _DEFAULTS[name]:
            rule = f"{_DEFAULTS[name]} with basic blocks"
            raise _misfit(name, rule, arguments[name])
    block = BasicBlock if is_basic else BottleneckBlock
    return partial(block, **changed) if changed else block


def _stem(arguments: Mapping[str, Any]) -> dict[str, Any]:
    kind, width = arguments["stem_type"], arguments["stem_width"]
    if kind not in ("", "deep", "deep_tiered"):
        raise _misfit("stem_type", "'', 'deep' or 'deep_tiered'", kind)
    if not kind:
        return {"stem_features": (64,)}
    first = 3 * (width // 4) if kind == "deep_tiered" else width
    return {"deep_stem": True, "stem_features": (first, width, 2 * width)}


def _chosen(arguments: Mapping[str, Any], name: str, choices: Mapping[Any, Any]) -> Any:
    value = arguments.get(name)
    if not isinstance(value, str | None) or value not in choices:
        rule = " or ".join(repr(choice) for choice in choices if choice)
        raise _misfit(name, rule, value)
    return choices[value]


def _misfit(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(
        f"`{name}` of timm must be {rule} for `flax_attn.resnet.ResNet`, got "
        f"{value!r}; this network is not supported."
    )
