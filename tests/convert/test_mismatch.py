"""Keys that do not fit: what is reported, and what is kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import convert
from flax_attn.resnet import cifar_resnet
from tests.convert.states import (
    IMAGE,
    NORM_LEAVES,
    SE_LIKE,
    SE_STATE,
    assert_same,
    norm_state,
    numbers,
    random_tree,
    report_of,
    shapes_of,
)


def test_all_that_is_wrong_is_in_one_error():
    state = {
        "fc1.weight": numbers(2, 32, 1, 1),
        "fc2.weight": numbers(32, 3, 1, 1),
        "norm.weight": numbers(2),
        "fc2.bias": numbers(32),
    }
    like = {"params": SE_LIKE["params"] | {"more": {"kernel": np.zeros((1, 2))}}}
    report = report_of(state, like=like)
    assert report.unused == ["norm.weight (2,)", "fc2.bias as params/expand/bias (32,)"]
    assert report.missing == ["params/more/kernel (1, 2)"]
    assert report.misshapen == [
        "fc2.weight as params/expand/kernel (3, 32): expected (2, 32)"
    ]
    assert report.headline.startswith("Not all keys fit (naming 'timm'). `strict=F")
    assert "2 unused:\n  norm.weight (2,)\n" in str(report)


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
        ("layer1.0.se.norm.weight", numbers(3)),
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
        ("fc.weight", (2, 32, 3), "(*, *)"),
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
    # With a template the same state converts.
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
    # A template of shapes has no values for what is missing.
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
        assert report.headline.startswith("No key fits (naming 'timm'): wrong model")
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
