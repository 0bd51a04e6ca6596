"""What a configuration means, and which are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import flax_attn
from flax_attn.blocks import BLOCKS
from flax_attn.resnet import ATTENTIONS
from tests import tiny_run
from train.engine import attention, loop, model
from train.engine import config as config_lib
from train.engine.config import Config

DIGITS = Config(depth=8, dataset="digits", batch_size=16, attention="cbam", devices=1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"init": "zeros"}, "`init` must be one of default, identity, got 'zeros'"),
        ({"attention": "none", "init": "identity"}, "`init` .* with `attention` none"),
        (
            {"attention": "none", "attention_lr_scale": 0.1},
            "`attention_lr_scale` is for .* got 0.1 with `attention` none; choo",
        ),
        ({"attention_lr_scale": -1.0}, "`attention_lr_scale` must be finite and at le"),
        (
            {"attention": "ge", "init": "identity"},
            "`init` identity does not go with ge .*no parameters that could start at z",
        ),
        (
            {"attention": "simam", "attention_lr_scale": 0.1},
            "`attention_lr_scale` is for .* got 0.1 for simam, which has none; leave",
        ),
        (
            {"attention": "none", "preset": "official_eca50"},
            "official_eca50 does not go with this network .*got 16; .*choose another",
        ),
        ({"preset": "timm_se"}, "`preset` replaces `attention`, got timm_se and `at"),
        (
            {"attention": "none", "preset": "official_eca"},
            "`preset` must be one of article_cbam, .* got 'official_eca'",
        ),
        ({"attention": "cbm"}, "`attention` must be one of none, se, .* got 'cbm'"),
        ({"dataset": "mnist"}, "`dataset` must be one of cifar10, .* got 'mnist'"),
        ({"dtype": "float8"}, "`dtype` must be one of float32, bfloat16, got 'float8'"),
        ({"depth": 18}, "`depth` must be 6n.2 .* got 18; the nearest are 14 and 20"),
        ({"batch_size": 41}, "`batch_size` must be at most the 40 training images"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be finite and at least 0"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be finite"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, r"`seed` must be in \[0, 2\*\*32\), got -1"),
        ({"keep": 0}, "`keep` must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be at least 1, got 0"),
        ({"resume": "yes"}, "`resume` must be one of auto, never, got 'yes'"),
        ({"loader": "grain"}, "`dataset` folder and `loader` grain go together"),
        ({"image_size": 64}, "`image_size` must be 32 for digits, got 64"),
        (
            {"skip_damaged": True},
            "`skip_damaged` is for image folders, got dataset digits",
        ),
        ({"family": "imagenet"}, "`depth` must be one of 18, 34, 50, 101, 152, got 8"),
        ({"num_processes": 2}, "`coordinator` is missing: pass --coordinator, --num-"),
        ({"devices": 99}, "`devices` must be at most 8, the number of cpu devices, go"),
        ({"devices": 6}, "`batch_size` must be a multiple of the 6 devices, got 16; t"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        loop.train(dataclasses.replace(DIGITS, **fields), tiny_run.images())
    assert "\n" not in str(error.value)


# Which parameters of a block start different from zero.
KERNELS = {
    "none": {},
    "se+identity": {"expand/kernel": False, "reduce/kernel": True},
    "se+1e-05lr": {"expand/kernel": True, "reduce/kernel": True},
    "timm_cbam+identity": {
        "channel/expand/kernel": False,
        "channel/reduce/kernel": True,
        "spatial/conv/kernel": True,
        "spatial/norm/bias": False,
        "spatial/norm/scale": False,
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_name_gives_block_and_init(name):
    config = Config(**attention.attention_fields(name))
    assert config.block == name
    attention.check_attention(config)
    make = loop.make_model(config, 10).attention
    params = {}
    if make is not None:
        init = jax.jit(make().init)
        params = init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf.any())
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert kernels == KERNELS[name]


def test_presets_for_one_network_go_with_it():
    config = Config(family="imagenet", depth=50, preset="official_eca50")
    model.check_block(config)
    model.check_block(dataclasses.replace(config, depth=101, preset="official_eca101"))


def test_all_presets_make_a_block():
    assert {"official_cbam", "timm_se", "article_eca"} <= set(attention.PRESETS)
    for name in attention.PRESETS:
        config = Config(preset=name)
        for train in (False, True):
            block = attention.make_attention(config, train=train)(name="attention")
            assert isinstance(block, flax_attn.blocks.Attention)


def test_defaults_by_data_set():
    for fields, expected in (
        ({"dataset": "digits"}, ("digits", 10, 64, 32)),
        ({"dataset": "cifar100"}, ("cifar100", 100, 128, 32)),
        ({"epochs": 3, "batch_size": 7}, ("cifar10", 3, 7, 32)),
        ({"loader": "grain", "family": "imagenet"}, ("folder", 90, 256, 224)),
    ):
        config = config_lib.resolve(Config(**fields))
        found = config.dataset, config.epochs, config.batch_size, config.image_size
        assert found == expected
    assert list(ATTENTIONS) == ["none", *BLOCKS]
