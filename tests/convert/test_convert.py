"""Conversion of weights without PyTorch: state dicts by hand, in NumPy."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict

import flax_attn
from flax_attn import convert
from flax_attn.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    cifar_resnet,
    imagenet_resnet,
)
from tests import processes
from tests.cases import ARTICLE, normal

NORM = partial(nn.BatchNorm, use_running_average=True)
NORM_LEAVES = {
    "weight": "params/{}/scale",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}
D_VARIANT = {"deep_stem": True, "pooled_shortcut": True}
IMAGE = np.zeros((1, 32, 32, 3), np.float32)


def norm_state(name, size=3):
    return {f"{name}.{leaf}": numbers(size) for leaf in NORM_LEAVES}


def numbers(*shape, dtype=np.float32):
    """Distinct numbers, so that any exchange is seen."""
    return np.arange(1, 1 + math.prod(shape)).reshape(shape).astype(dtype)


def flat(variables):
    return flatten_dict(variables, sep="/")


def shapes_of(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)


def random_tree(shapes, dtype=np.float32):
    """Random variables of these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    draws = [normal(leaf.shape, i).astype(dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, draws)


def assert_same(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        assert isinstance(actual[key], np.ndarray), key
        assert actual[key].dtype == array.dtype, key
        assert actual[key].shape == array.shape, key
        assert actual[key].tobytes() == array.tobytes(), key


def norm(torch, flax):
    """The rules of a BatchNorm."""
    return {
        f"{torch}.{leaf}": (place.format(flax), (3,), lambda w: w)
        for leaf, place in NORM_LEAVES.items()
    }


def conv(torch, flax):
    move = partial(np.einsum, "oihw->hwio")
    return {f"{torch}.weight": (f"params/{flax}/kernel", (4, 3, 2, 5), move)}


def dense(torch, flax, *, axes=()):
    shape = (2, 3, *axes)
    return {
        f"{torch}.weight": (
            f"params/{flax}/kernel",
            shape,
            lambda w: np.einsum("oi->io", w.reshape(2, 3)),
        ),
        f"{torch}.bias": (f"params/{flax}/bias", (2,), lambda w: w),
    }


def along(torch, flax):
    return {
        f"{torch}.weight": (
            f"params/{flax}/kernel",
            (1, 1, 3),
            lambda w: w.reshape(3, 1, 1),
        )
    }


def spatial(torch, flax, order):
    def move(w):
        return np.stack([w[0, order[0]], w[0, order[1]]], axis=-1)[..., None]

    return {f"{torch}.weight": (f"params/{flax}/kernel", (1, 2, 3, 5), move)}


def timm(torch, flax):
    """The rules of timm's blocks in a module ``torch``."""
    return [
        dense(f"{torch}fc1", f"{flax}reduce", axes=(1, 1))
        | dense(f"{torch}fc2", f"{flax}expand", axes=(1, 1)),
        along(f"{torch}conv", f"{flax}conv"),
        spatial(f"{torch}conv.conv", f"{flax}conv", (1, 0))
        | norm(f"{torch}conv.bn", f"{flax}norm"),
        dense(f"{torch}channel.fc1", f"{flax}channel/reduce", axes=(1, 1))
        | dense(f"{torch}channel.fc2", f"{flax}channel/expand", axes=(1, 1))
        | spatial(f"{torch}spatial.conv.conv", f"{flax}spatial/conv", (1, 0))
        | norm(f"{torch}spatial.conv.bn", f"{flax}spatial/norm"),
    ]


def article(torch, flax):
    both = f"{torch}channel_attention_block.", f"{flax}channel/"
    half = spatial(
        f"{torch}spatial_attention_block.conv", f"{flax}spatial/conv", (0, 1)
    )
    return [
        dense(f"{torch}fc_layers.0", f"{flax}reduce")
        | dense(f"{torch}fc_layers.2", f"{flax}expand"),
        along(f"{torch}conv", f"{flax}conv"),
        spatial(f"{torch}conv", f"{flax}conv", (0, 1)),
        dense(f"{both[0]}fc_layers.0", f"{both[1]}reduce")
        | dense(f"{both[0]}fc_layers.2", f"{both[1]}expand")
        | half,
        along(f"{both[0]}conv", f"{both[1]}conv") | half,
    ]


COMMON = [
    conv("conv1", "conv_stem") | norm("bn1", "norm_stem") | dense("fc", "head"),
    *(
        conv(f"layer{i}.{j}.conv{k}", f"stage{i}_block{j + 1}/conv{k}")
        | norm(f"layer{i}.{j}.bn{k}", f"stage{i}_block{j + 1}/norm{k}")
        for i, j, k in [(1, 0, 1), (4, 2, 2), (3, 22, 3), (2, 9, 1)]
    ),
    conv("layer2.0.downsample.0", "stage2_block1/conv_shortcut")
    | norm("layer2.0.downsample.1", "stage2_block1/norm_shortcut"),
]
RULES = {
    "timm": [
        *COMMON,
        *timm("", ""),
        *timm("layer3.1.se.", "stage3_block2/attention/"),
        conv("conv1.0", "conv_stem1")
        | norm("conv1.1", "norm_stem1")
        | conv("conv1.3", "conv_stem2")
        | norm("conv1.4", "norm_stem2")
        | conv("conv1.6", "conv_stem3"),
        conv("layer1.0.downsample.1", "stage1_block1/conv_pooled_shortcut")
        | norm("layer1.0.downsample.2", "stage1_block1/norm_pooled_shortcut"),
    ],
    "torchvision": [*COMMON, timm("", "")[0]],
    "article": [
        *COMMON,
        *article("", ""),
        *article("layer3.1.attention.", "stage3_block2/attention/"),
    ],
}
ALIASES = [
    dense("linear", "head"),
    conv("layer2.0.shortcut.0", "stage2_block1/conv_shortcut")
    | norm("layer2.0.shortcut.1", "stage2_block1/norm_shortcut"),
]
SPECIFIED = [
    pytest.param(naming, rules, id=f"{naming}-{next(iter(rules))}")
    for naming, all_rules in RULES.items()
    for rules in all_rules
]


@pytest.mark.parametrize("naming, rules", SPECIFIED)
def test_every_rule_in_both_directions(naming, rules):
    state = {key: numbers(*shape) for key, (_, shape, _) in rules.items()}
    expected = {place: move(state[key]) for key, (place, _, move) in rules.items()}
    variables = convert.to_flax(state, naming=naming)
    assert_same(variables, expected)
    assert_same(convert.to_torch(variables, naming=naming), state)


@pytest.mark.parametrize("naming", RULES)
@pytest.mark.parametrize("rules", ALIASES)
def test_names_that_are_read_and_not_written(naming, rules):
    state = {key: numbers(*shape) for key, (_, shape, _) in rules.items()}
    expected = {place: move(state[key]) for key, (place, _, move) in rules.items()}
    variables = convert.to_flax(state, naming=naming)
    assert_same(variables, expected)
    assert not state.keys() & convert.to_torch(variables, naming=naming).keys()


def test_the_spatial_kernel_of_timm_is_swapped_and_that_of_the_article_is_not():
    mean, maximum = np.full((3, 3), 1.0), np.full((3, 3), 2.0)
    timm = {"spatial.conv.conv.weight": np.stack([mean, maximum])[None]}
    kernel = convert.to_flax(timm)["params"]["spatial"]["conv"]["kernel"]
    assert kernel[0, 0].tolist() == [[2], [1]]
    article = {"conv.weight": np.stack([maximum, mean])[None]}
    kernel = convert.to_flax(article, naming="article")["params"]["conv"]["kernel"]
    assert kernel[0, 0].tolist() == [[2], [1]]


def test_counters_are_dropped_where_a_norm_has_them():
    state = norm_state("bn1") | {"bn1.num_batches_tracked": np.array(7)}
    assert_same(convert.to_torch(convert.to_flax(state)), norm_state("bn1"))
    with pytest.raises(convert.ConversionError, match="num_batches_tracked") as error:
        convert.to_flax(state | {"conv1.num_batches_tracked": np.array(7)})
    assert error.value.report.unused == ["conv1.num_batches_tracked ()"]
    like = state | {"bn1.num_batches_tracked": np.array(7)}
    convert.to_torch(convert.to_flax(state), like=like)


def networks():
    """Modules, their input, and who has a name for everything in them."""
    x = np.zeros((1, 4, 4, 32), np.float32)
    official = partial(flax_attn.CBAM, use_bias=True, spatial_norm=NORM)
    for name, make in ARTICLE.items():
        yield f"article-{name}", make(), x, "article"
        yield f"article-{name}-biased", make(use_bias=True), x, "article"
        net = cifar_resnet(8, num_classes=10, attention=make)
        yield f"article-{name}-8", net, IMAGE, "article"
    timm = {"se": flax_attn.SE, "eca": flax_attn.ECA, "cbam": official}
    for name, make in timm.items():
        yield f"timm-{name}", make(), x, "timm"
        net = cifar_resnet(8, num_classes=10, attention=make)
        yield f"timm-{name}-8", net, IMAGE, "timm"
    net = imagenet_resnet(18, num_classes=10, attention=official)
    yield "timm-cbam-18", net, IMAGE, "timm"
    for naming, variant in (("torchvision", {}), ("timm", D_VARIANT)):
        for block in (BasicBlock, BottleneckBlock):
            net = ResNet((1, 2), block=block, num_classes=10, width=8, **variant)
            yield f"{naming}-{block.__name__}", net, IMAGE, naming


@pytest.mark.parametrize(
    "module, x, naming",
    [pytest.param(*rest, id=label) for label, *rest in networks()],
)
def test_there_and_back_bit_for_bit(module, x, naming, tmp_path):
    like = shapes_of(module, x)
    variables = random_tree(like)
    state = convert.to_torch(variables, naming=naming)
    assert all("/" not in key for key in state)
    convert.save(tmp_path / "torch.safetensors", state)
    loaded = convert.load(tmp_path / "torch.safetensors")
    assert_same(loaded, state)
    back = convert.to_flax(loaded, naming=naming, like=like)
    assert_same(back, variables)
    convert.save(tmp_path / "flax.safetensors", back)
    assert_same(convert.load(tmp_path / "flax.safetensors"), variables)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_dtypes_survive(dtype, tmp_path):
    net = cifar_resnet(8, num_classes=10, attention=flax_attn.CBAM)
    variables = random_tree(shapes_of(net, IMAGE), dtype)
    path = tmp_path / "net.safetensors"
    convert.save(path, convert.to_torch(variables))
    back = convert.to_flax(convert.load(path))
    assert_same(back, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(dtype)}


def test_numbers_that_compare_unequal_to_themselves():
    weight = np.array([np.nan, -np.nan, -0.0, np.inf], np.float32)
    weight.view(np.uint32)[0] |= 1
    state = {"fc.weight": weight.reshape(2, 2)}
    assert_same(convert.to_torch(convert.to_flax(state)), state)


def test_results_are_copies():
    state = norm_state("bn1")
    variables = convert.to_flax(state)
    state["bn1.weight"][:] = 0
    assert variables["params"]["norm_stem"]["scale"].tolist() == [1, 2, 3]
    back = convert.to_torch(variables)
    back["bn1.weight"][:] = 0
    assert variables["params"]["norm_stem"]["scale"].tolist() == [1, 2, 3]


def test_arrays_of_jax_and_frozen_trees():
    variables = flax_attn.SE().init(jax.random.key(0), jnp.ones((1, 2, 2, 16)))
    state = convert.to_torch(freeze(variables))
    assert_same(convert.to_flax(state), jax.tree.map(np.asarray, variables))


# What does not fit.
SE_STATE = {"fc1.weight": numbers(2, 32, 1, 1), "fc2.weight": numbers(32, 2, 1, 1)}
SE_LIKE = {
    "params": {
        "reduce": {"kernel": jax.ShapeDtypeStruct((32, 2), np.float32)},
        "expand": {"kernel": jax.ShapeDtypeStruct((2, 32), np.float32)},
    }
}


def report_of(state, **options):
    with pytest.raises(convert.ConversionError) as error:
        convert.to_flax(state, **options)
    text = str(error.value).splitlines()
    for lines in vars(error.value.report).values():
        if isinstance(lines, list):
            assert all(f"  {line}" in text for line in lines)
    return error.value.report


def test_all_that_is_wrong_is_in_one_error():
    state = {
        "fc1.weight": numbers(2, 32, 1, 1),
        "fc2.weight": numbers(32, 3, 1, 1),
        "bn.weight": numbers(2),
        "fc2.bias": numbers(32),
    }
    like = {"params": SE_LIKE["params"] | {"more": {"kernel": np.zeros((1, 2))}}}
    report = report_of(state, like=like)
    assert report.unused == ["bn.weight (2,)", "fc2.bias as params/expand/bias (32,)"]
    assert report.missing == ["params/more/kernel (1, 2)"]
    assert report.misshapen == [
        "fc2.weight as params/expand/kernel (3, 32): expected (2, 32)"
    ]
    assert report.headline.startswith("Not all keys fit (naming 'timm'). `strict=F")
    assert "2 unused:\n  bn.weight (2,)\n" in str(report)


@pytest.mark.parametrize(
    "key, array",
    [
        ("extra", numbers(3)),
        ("extra.weight", numbers(3)),
        (".weight", numbers(3)),
        ("", numbers(3)),
        ("fc1.gain", numbers(2)),
        ("fc3.weight", numbers(2, 32, 1, 1)),
        ("module.fc1.weight", numbers(2, 32, 1, 1)),
        ("layer0.0.conv1.weight", numbers(1, 2, 3, 3)),
        ("layer1.00.conv1.weight", numbers(1, 2, 3, 3)),
        ("layer1.0.conv4.weight", numbers(1, 2, 3, 3)),
        ("layer1.0.conv1.bias", numbers(3)),
        ("layer1.0.se.bn.weight", numbers(3)),
        ("layer1.0.attention.conv.weight", numbers(1, 1, 3)),
        ("layer1.0.fc1.weight", numbers(2, 32, 1, 1)),
        ("se.fc1.weight", numbers(2, 32, 1, 1)),
        ("channel.conv.weight", numbers(1, 1, 3)),
        ("fc_layers.0.weight", numbers(2, 32)),
        ("params/reduce/kernel", numbers(32, 2)),
    ],
)
def test_keys_that_no_rule_knows(key, array):
    conv1 = {"layer1.0.conv1.weight": numbers(2, 2, 3, 3)}
    report = report_of(SE_STATE | conv1 | {key: array})
    assert report.unused == [f"{key} {array.shape}"]
    assert not (report.missing or report.misshapen or report.repeated)


@pytest.mark.parametrize(
    "key",
    [
        "params/reduce/gain",
        "params/reduce",
        "params/more/kernel",
        "intermediates/reduce/kernel",
        "batch_stats/reduce/kernel",
        "params/stage1_block0/conv1/kernel",
        "params/stage1_block1/conv4/kernel",
        "params/stage01_block1/conv1/kernel",
        "fc1.weight",
    ],
)
def test_paths_that_no_rule_knows(key):
    variables = {"params/expand/kernel": numbers(3, 4), key: numbers(3)}
    with pytest.raises(convert.ConversionError) as error:
        convert.to_torch(variables)
    assert error.value.report.unused == [f"{key} (3,)"]


@pytest.mark.parametrize(
    "key, shape, expected",
    [
        ("fc1.weight", (2, 32), "(*, *, 1, 1)"),
        ("fc1.weight", (2, 32, 3, 3), "(*, *, 1, 1)"),
        ("fc.weight", (2, 32, 1, 1), "(*, *)"),
        ("conv1.weight", (2, 32), "(*, *, *, *)"),
        ("conv.weight", (2, 1, 3), "(1, 1, *)"),
        ("conv.conv.weight", (1, 3, 7, 7), "(1, 2, *, *)"),
        ("bn1.weight", (3, 1), "(*,)"),
        ("layer1.0.downsample.1.weight", (3, 1), "(*,)"),
        ("conv1.weight", (), "(*, *, *, *)"),
    ],
)
def test_shapes_that_a_name_rules_out(key, shape, expected):
    other = {"layer1.0.conv1.weight": numbers(2, 2, 3, 3)}
    norms = norm_state("bn1") | norm_state("layer1.0.downsample.1")
    report = report_of(norms | other | {key: np.zeros(shape)})
    assert report.misshapen == [f"{key} {shape}: expected {expected}"]
    assert not (report.missing or report.unused or report.repeated)


def test_vectors_are_as_long_as_their_weight():
    report = report_of({"fc.weight": numbers(2, 3), "fc.bias": numbers(3)})
    assert report.misshapen == ["fc.bias (3,): expected (2,)"]
    norm = norm_state("bn1", 2) | {"bn1.running_var": numbers(1)}
    assert report_of(norm).misshapen == ["bn1.running_var (1,): expected (2,)"]
    kernel = {"params/head/kernel": numbers(2, 3), "params/head/bias": numbers(2)}
    with pytest.raises(convert.ConversionError, match=r"bias \(2,\): expected \(3,\)"):
        convert.to_torch(kernel)


@pytest.mark.parametrize(
    "module, gone, expected",
    [
        ("fc.", "weight", "(*, *)"),
        ("fc1.", "weight", "(*, *, 1, 1)"),
        ("layer1.0.se.fc2.", "weight", "(*, *, 1, 1)"),
        ("bn1.", "weight", "(*,)"),
        ("bn1.", "bias", "(3,)"),
        ("layer2.0.downsample.1.", "running_var", "(3,)"),
    ],
)
def test_half_a_module(module, gone, expected):
    leaves = NORM_LEAVES if expected.endswith(",)") else ("weight", "bias")
    state = {module + leaf: numbers(3) for leaf in leaves if leaf != gone}
    other = {"conv1.weight": numbers(2, 2, 3, 3)}
    report = report_of(other | state)
    assert report.missing == [f"{module}{gone} {expected}"]
    assert not (report.unused or report.misshapen or report.repeated)
    # The template knows better.
    like = convert.to_flax(other | state, strict=False)
    assert_same(convert.to_flax(other | state, like=like), like)


def test_variables_without_statistics():
    variables = convert.to_flax(norm_state("bn1"))
    with pytest.raises(convert.ConversionError) as error:
        convert.to_torch({"params": variables["params"]})
    assert error.value.report.missing == [
        "batch_stats/norm_stem/mean (3,)",
        "batch_stats/norm_stem/var (3,)",
    ]


def test_two_keys_for_one_place():
    state = {"fc.weight": numbers(2, 3), "linear.weight": 2 * numbers(2, 3)}
    report = report_of(state)
    assert report.repeated == [
        "linear.weight (2, 3): fc.weight gives params/head/kernel"
    ]
    kept = convert.to_flax(state, strict=False)
    assert_same(kept, {"params/head/kernel": numbers(2, 3).T})


def test_not_strict(capsys):
    state = SE_STATE | {"fc2.weight": numbers(32, 3, 1, 1), "extra.weight": numbers(1)}
    arrays = {"params": {"expand": {"kernel": jnp.ones((2, 32))}}}
    like = {"params": SE_LIKE["params"] | arrays["params"]}
    variables = convert.to_flax(state, like=like, strict=False)
    reduce = numbers(2, 32, 1, 1).reshape(2, 32).T
    expected = {
        "params/expand/kernel": np.ones((2, 32), np.float32),
        "params/reduce/kernel": reduce,
    }
    assert_same(variables, expected)
    out = capsys.readouterr().out
    assert "  extra.weight (1,)\n" in out and "expected (2, 32)" in out
    # Shapes alone give nothing to fill in with.
    variables = convert.to_flax(state, like=SE_LIKE, strict=False)
    assert_same(variables, {"params/reduce/kernel": reduce})
    capsys.readouterr()
    convert.to_flax(SE_STATE, like=SE_LIKE, strict=False)
    assert capsys.readouterr().out == ""


def test_what_is_taken_from_like_is_a_copy():
    like = {"fc1.weight": numbers(1, 2, 1, 1), "fc1.bias": np.ones(1, np.float16)}
    variables = {"params": {"reduce": {"kernel": numbers(2, 1)}}}
    state = convert.to_torch(variables, like=like, strict=False)
    assert_same(state, like)
    assert not np.shares_memory(state["fc1.bias"], like["fc1.bias"])


def test_of_like_the_shapes_are_enough():
    gone = jnp.ones((32, 2))
    gone.delete()
    like = {"params": SE_LIKE["params"] | {"reduce": {"kernel": gone}}}
    variables = convert.to_flax(SE_STATE, like=like)
    assert_same(variables, convert.to_flax(SE_STATE))
    torch = pytest.importorskip("torch")
    meta = {key: torch.empty(x.shape, device="meta") for key, x in SE_STATE.items()}
    assert_same(convert.to_torch(variables, like=meta), SE_STATE)
    more = meta | {"fc1.bias": torch.empty(2, device="meta")}
    assert_same(convert.to_torch(variables, like=more, strict=False), SE_STATE)


def test_another_model():
    vit = {"blocks.0.attn.qkv.weight": numbers(6, 2), "cls_token": numbers(1, 1, 2)}
    for strict in (True, False):
        report = report_of(vit, strict=strict)
        assert report.headline.startswith("No key fits (naming 'timm'): another model")
        assert report.unused == ["cls_token (1, 1, 2)", *report.unused[1:]]
        assert len(report.unused) == 2


def test_another_depth():
    shapes = shapes_of(cifar_resnet(8, num_classes=10), IMAGE)
    like = shapes_of(cifar_resnet(14, num_classes=7), IMAGE)
    report = report_of(convert.to_torch(random_tree(shapes)), like=like)
    # Two convolutions and two norms of four arrays in each of the three new blocks.
    assert len(report.missing) == 3 * 2 * (1 + 4)
    assert len(report.misshapen) == 2 and not report.unused
    deeper = random_tree(like)
    report = report_of(convert.to_torch(deeper), like=shapes)
    assert len(report.unused) == 3 * 2 * (1 + 4) and not report.missing


def test_nothing_to_convert():
    with pytest.raises(convert.ConversionError, match="nothing to convert"):
        convert.to_flax({})


def test_the_wrong_direction():
    with pytest.raises(convert.ConversionError, match="Flax variables already; use `t"):
        convert.to_flax(convert.to_flax(SE_STATE))
    with pytest.raises(convert.ConversionError, match="not Flax variables; use `to_f"):
        convert.to_torch(SE_STATE)
    variables = convert.to_flax(SE_STATE)
    with pytest.raises(ValueError, match="`like` must be Flax .* got the key 'fc1.w"):
        convert.to_flax(SE_STATE, like=SE_STATE)
    with pytest.raises(ValueError, match="`like` must be Flax .* the key 'reduce/ker"):
        convert.to_flax(SE_STATE, like=SE_LIKE["params"])
    with pytest.raises(ValueError, match="`like` must be a state dict, .* 'params/red"):
        convert.to_torch(variables, like=variables)


def test_variables_without_collections():
    variables = convert.to_flax(SE_STATE)
    for wrong in (variables["params"], variables["params"]["reduce"]):
        with pytest.raises(convert.ConversionError, match="pass {'params': ...}, with"):
            convert.to_torch(wrong)
    with pytest.raises(convert.ConversionError, match="Flax variables already"):
        convert.to_flax(variables["params"])


def test_a_state_dict_in_a_dict_and_with_a_prefix():
    wrapped = {"epoch": 3, "state_dict": SE_STATE}
    assert report_of(wrapped).headline.endswith("; pass state['state_dict'].")
    for prefix in ("module.", "module._orig_mod."):
        state = {prefix + key: array for key, array in SE_STATE.items()}
        headline = report_of(state).headline
        assert headline.startswith(
            f"No key fits (naming 'timm'): all start with {prefix!r}"
        )
        assert report_of(state | {"more.weight": numbers(1)}).headline.endswith(
            "naming."
        )
    # Not the stage where all lies in one, but the template is another's.
    state = {"layer1.0.conv1.weight": numbers(2, 2, 3, 3)}
    assert report_of(state, like=SE_LIKE).headline.endswith("another naming.")


def test_arguments():
    with pytest.raises(ValueError, match="`naming` must be \"timm\" or .* got 'jax'"):
        convert.to_flax(SE_STATE, naming="jax")
    with pytest.raises(ValueError, match="`epoch` must be an array, got str"):
        convert.to_flax({"epoch": "3"})
    with pytest.raises(ValueError, match="`like` must hold arrays or shapes, got 3"):
        convert.to_flax(SE_STATE, like={"params": 3})
    for wrong in (None, [numbers(2)], numbers(2)):
        name = type(wrong).__name__
        with pytest.raises(ValueError, match=f"`state` must be a dict, got {name}; p"):
            convert.to_flax(wrong)
        with pytest.raises(ValueError, match=f"`variables` must be a dict, got {name}"):
            convert.to_torch(wrong)
    with pytest.raises(ValueError, match="`like` must be a dict, got list"):
        convert.to_flax(SE_STATE, like=[1])
    with pytest.raises(ValueError, match="`state` must have strings for keys, got 0"):
        convert.to_flax({0: numbers(2)})
    with pytest.raises(ValueError, match="`variables` must have strings .* got 1"):
        convert.to_torch({"params": {1: numbers(2)}})


def test_arrays_that_numpy_cannot_read():
    gone = jnp.ones(3)
    gone.delete()
    values = {"deleted": gone, r"key<fry>": jax.random.key(0), "list": [[1], 2]}
    for message, value in values.items():
        with pytest.raises(ValueError, match=rf"`a/b` must be .* got .*{message}"):
            convert.to_torch({"a": {"b": value}})


def strange_tensors(torch):
    """Tensors that NumPy has no like of, and what the error says of them."""
    ones = torch.ones(2, 2)
    return {
        "got torch.float8_e4m3fn, .*float": ones.to(torch.float8_e4m3fn),
        "got .* torch.sparse_coo, .*to_dense": ones.to_sparse(),
        "got torch.bfloat16, torch.sparse_coo": ones.bfloat16().to_sparse(),
        "got .* device meta; load": torch.empty(2, 2, device="meta"),
    }


def test_tensors_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    for message, tensor in strange_tensors(torch).items():
        with pytest.raises(ValueError, match=f"`fc.weight` must be .*{message}"):
            convert.to_flax({"fc.weight": tensor})


# Files.
def test_a_file_that_is_not_all_there(tmp_path):
    path = tmp_path / "se.safetensors"
    convert.save(path, SE_STATE)
    whole = path.read_bytes()
    for part in (whole[:-1], whole[:40], whole[:4], b"", whole + b"1", b"PK\3\4" * 9):
        path.write_bytes(part)
        with pytest.raises(
            ValueError, match="is not a safetensors file, or is not all"
        ):
            convert.load(path)
    path.write_bytes(whole)
    assert_same(convert.load(path), SE_STATE)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="`path` must be a file"):
        convert.load(tmp_path)
    path = tmp_path / "clash.safetensors"
    safetensors.numpy.save_file({"a/b": numbers(1), "a": numbers(1)}, path)
    with pytest.raises(ValueError, match="'a' both as an array and as a tree"):
        convert.load(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_file_of_dtypes_that_numpy_lacks(dtype, command):
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"fc.bias": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + b"00"
    Path("a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"fc.bias` must be .* got {dtype}; .*float"):
        convert.load("a.safetensors")
    code, _, err = command("a.safetensors", "out.safetensors", "--to", "flax")
    assert code == 1 and err.startswith("error: `a.safetensors: fc.bias` must be")


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_dtypes_that_could_not_be_read_are_not_written(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="`fc.bias` must be .* got float8.*astype"):
        convert.save(path, {"fc.bias": np.ones(2, dtype)})
    with pytest.raises(ValueError, match="`rng` must be .* got key<fry>"):
        convert.save(path, {"rng": jax.random.key(0)})
    assert not path.exists()


def test_files_of_torch_that_numpy_cannot_read(command):
    torch = pytest.importorskip("torch")
    for message, tensor in strange_tensors(torch).items():
        torch.save({"fc.weight": tensor}, "a.pth")
        code, _, err = command("a.pth", "out.safetensors", "--to", "flax")
        assert code == 1 and re.match(
            f"error: `a.pth: fc.weight` must .*{message}", err
        )


def test_a_file_of_torch_names_what_is_no_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    held = {"fc.weight": torch.ones(2, 2), "epoch": 3, "best": {"bias": torch.ones(2)}}
    torch.save(held, path)
    with pytest.raises(ValueError, match=r"got epoch \(int\), best \(dict\); save"):
        convert.load(path)
    for other in ([torch.ones(2)], torch.ones(2)):
        torch.save(other, path)
        with pytest.raises(ValueError, match=f"got {type(other).__name__}; save"):
            convert.load(path)


def test_without_libraries(tmp_path, monkeypatch):
    path = tmp_path / "se.pth"
    path.touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        convert.load(path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        convert.save(tmp_path / "se.safetensors", SE_STATE)
    with pytest.raises(ImportError, match="pip install safetensors"):
        convert.load(path.rename(tmp_path / "se.safetensors"))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "se.safetensors"
    convert.save(path, SE_STATE)
    mode = path.stat().st_mode
    (tmp_path / "usual").touch()
    assert mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(FileExistsError, match="exists; `overwrite=True`"):
        convert.save(path, {"a": numbers(1)})
    with pytest.raises(ValueError, match="would be safetensors, which `.pth` is not"):
        convert.save(tmp_path / "se.pth", SE_STATE)
    with pytest.raises(ValueError, match="cannot be written"):
        convert.save(path, {"a": np.ones(3, np.complex128)}, overwrite=True)

    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="no space left"):
            convert.save(path, {"a": numbers(1)}, overwrite=True)
    assert_same(convert.load(path), SE_STATE)
    assert sorted(os.listdir(tmp_path)) == ["se.safetensors", "usual"]
    convert.save(path, {"a": numbers(1)}, overwrite=True)
    assert_same(convert.load(path), {"a": numbers(1)})


def test_arrays_that_lie_in_memory_otherwise(tmp_path):
    state = {
        "fortran": np.asfortranarray(numbers(2, 3)),
        "transposed": numbers(2, 3).T,
        "reversed": numbers(5)[::-1],
        "scalar": np.array(3.0),
        "bytes": numbers(3).astype(">f4"),
    }
    convert.save(tmp_path / "a.safetensors", state)
    loaded = convert.load(tmp_path / "a.safetensors")
    assert loaded.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(loaded[key], array)
        assert loaded[key].shape == array.shape


# The command.
@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = convert.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_both_ways(command):
    convert.save("torch.safetensors", SE_STATE)
    assert command("torch.safetensors", "flax.safetensors", "--to", "flax") == (
        (0, "", "")
    )
    assert_same(convert.load("flax.safetensors"), convert.to_flax(SE_STATE))
    assert command("flax.safetensors", "back.safetensors", "--to", "torch") == (
        (0, "", "")
    )
    assert_same(convert.load("back.safetensors"), SE_STATE)
    again = ("flax.safetensors", "back.safetensors", "--to", "torch")
    assert command(*again, "--naming", "article")[0] == 1
    assert command(*again, "--naming", "article", "--overwrite") == ((0, "", ""))
    assert set(convert.load("back.safetensors")) == {
        "fc_layers.0.weight",
        "fc_layers.2.weight",
    }


def test_errors_of_the_command(command):
    convert.save("se.safetensors", SE_STATE)
    whole = Path("se.safetensors").read_bytes()
    convert.save("extra.safetensors", SE_STATE | {"more.weight": numbers(3)})
    convert.save("vit.safetensors", {"cls_token": numbers(3)})
    convert.save("big.safetensors", convert.to_flax({"fc.weight": numbers(2, 3)}))
    Path("cut.safetensors").write_bytes(whole[:-5])
    files = sorted(os.listdir())
    expected = {
        ("none.safetensors",): "No such file",
        ("cut.safetensors",): "is not a safetensors file, or is not all there",
        ("extra.safetensors",): "1 unused:\n  more.weight (3,)\n",
        ("vit.safetensors",): "No key fits (naming 'timm'): another model",
        ("se.safetensors", "--like", "big.safetensors"): "No key fits",
        (".",): "must be a file",
    }
    messages = set()
    for (name, *options), message in expected.items():
        code, out, err = command(name, "out.safetensors", "--to", "flax", *options)
        assert code == 1 and out == "" and message in err, err
        assert err.startswith("error: ") and "Traceback" not in err
        messages.add(err)
    assert len(messages) == len(expected)
    for name in ("cut.safetensors", "none.safetensors"):
        assert command(name, "out.safetensors", "--to", "flax")[2].count("\n") == 1
    code, _, err = command("se.safetensors", "vit.safetensors", "--to", "flax")
    assert code == 1 and "exists; " in err and err.count("\n") == 1
    same = ("se.safetensors", "./se.safetensors", "--to", "flax", "--overwrite")
    assert "OUT must not be IN" in command(*same)[2]
    assert sorted(os.listdir()) == files
    assert Path("se.safetensors").read_bytes() == whole
    for wrong in (["--to", "jax"], [], ["--to", "flax", "--naming", "keras"]):
        with pytest.raises(SystemExit, match="2"):
            command("se.safetensors", "out.safetensors", *wrong)


def test_the_lenient_command(command):
    convert.save("extra.safetensors", SE_STATE | {"more.weight": numbers(3)})
    code, out, err = command(
        "extra.safetensors", "out.safetensors", "--to", "flax", "--lenient"
    )
    assert code == 0 and err == "" and "  more.weight (3,)\n" in out
    assert_same(convert.load("out.safetensors"), convert.to_flax(SE_STATE))


def test_the_import_is_light():
    code = (
        "import flax.linen, sys; before = set(sys.modules); import flax_attn.convert; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", code]
    new = subprocess.run(command, capture_output=True, text=True, cwd=processes.ROOT)
    assert not {"safetensors", "torch", "train"} & set(new.stdout.split()), new
    assert "flax_attn" in new.stdout.split()


def test_the_command_as_a_process(tmp_path):
    convert.save(tmp_path / "in.safetensors", SE_STATE)
    arguments = (tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    done = processes.complete("flax_attn.convert", *arguments, "--to", "flax")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = processes.complete("flax_attn.convert", *arguments, "--to", "flax")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_partitioned_parameters_are_taken_out_of_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = flax_attn.SE(kernel_init=init)
    boxed = module.init(jax.random.key(0), np.ones((1, 4, 4, 16), np.float32))
    plain = nn.unbox(boxed)
    state = convert.to_torch(boxed)
    assert all((state[k] == v).all() for k, v in convert.to_torch(plain).items())
    chex.assert_trees_all_equal(convert.to_flax(state, like=boxed), plain)
