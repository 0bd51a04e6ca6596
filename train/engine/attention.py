"""The attention of a run: block or preset, initialization and learning rate.

A comparison combines them in one name: ``se``, ``timm_se+identity``,
``cbam+identity+0.1lr``.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from flax_attn import presets
from flax_attn.resnet import ATTENTIONS
from train.engine.config import IDENTITY, Config, check_choice

ModuleDef = Callable[..., Any]
LR_SCALE = re.compile(r"\+(\d*\.?\d+(?:e-?\d+)?)lr$")


def _fits_any_network(preset: Any) -> bool:
    """Whether it takes only ``train``; ``official_eca`` needs widths."""
    return (
        isinstance(preset, partial) or "train" in inspect.signature(preset).parameters
    )


PRESETS = tuple(
    name for name in presets.__all__ if _fits_any_network(getattr(presets, name))
)


def make_attention(config: Config, *, train: bool) -> ModuleDef | None:
    """The factory of the attention of each residual block; None without attention.

    Args:
      config: of the run.
      train: whether a normalization inside the block uses the statistics of the batch.
    """
    make = ATTENTIONS[config.attention]
    if config.preset is not None:
        make = getattr(presets, config.preset)
        make = make if isinstance(make, partial) else make(train=train)
    if make is None or config.init == "default":
        return make
    return partial(make, identity_init=True)


def check_attention(config: Config) -> None:
    """Raises ``ValueError`` for an unknown attention, or one with a wrong option."""
    check_choice("attention", config.attention, ATTENTIONS)
    if config.preset is not None:
        check_choice("preset", config.preset, PRESETS)
        if config.attention != "none":
            raise ValueError(
                "`preset` replaces `attention`, got "
                f"{config.preset} and `attention` {config.attention}; pass only one "
                "of them."
            )
    elif config.attention == "none":
        if config.init != "default":
            raise ValueError(
                "`init` is the initialization of an attention block, got "
                f"{config.init} with `attention` none; choose a block or a preset, or "
                "leave `init` out."
            )
        if config.attention_lr_scale != 1:
            raise ValueError(
                "`attention_lr_scale` is for the parameters of attention blocks, got "
                f"{config.attention_lr_scale} with `attention` none; choose a block or "
                "a preset, or leave `attention_lr_scale` out."
            )


def attention_fields(name: str) -> dict[str, Any]:
    """The fields of ``Config`` for a name such as ``se`` or ``cbam+identity+0.1lr``.

    The inverse of ``Config.block``; whether the name exists is for
    ``check_attention`` to say.

      >>> attention_fields("se+identity")
      {'attention': 'se', 'preset': None, 'init': 'identity', 'attention_lr_scale': 1.0}
      >>> attention_fields("timm_se+0.1lr")["attention_lr_scale"]
      0.1
    """
    factor = re.search(LR_SCALE, name)
    start = name[: factor.start()] if factor else name
    block = start.removesuffix(IDENTITY)
    is_preset = block in PRESETS
    return {
        "attention": "none" if is_preset else block,
        "preset": block if is_preset else None,
        "init": "default" if block == start else "identity",
        "attention_lr_scale": float(factor[1]) if factor else 1.0,
    }
