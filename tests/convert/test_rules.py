"""Every rule: names, layouts and order of inputs, with state dicts in NumPy."""

from functools import partial

import numpy as np
import pytest

from flax_attn import convert
from tests.convert.states import NORM_LEAVES, assert_same, norm_state, numbers


def itself(w):
    return w


def weight(torch, flax, shape, move):
    """The rule of one kernel: its place, its shape in PyTorch, and how it moves."""
    return {f"{torch}.weight": (f"params/{flax}/kernel", shape, move)}


def norm(torch, flax):
    """The rules of a BatchNorm."""
    return {
        f"{torch}.{leaf}": (place.format(flax), (3,), itself)
        for leaf, place in NORM_LEAVES.items()
    }


def conv(torch, flax, shape=(4, 3, 2, 5)):
    return weight(torch, flax, shape, partial(np.einsum, "oihw->hwio"))


def dense(torch, flax, *, axes=(), shape=(2, 3)):
    kernel = weight(torch, flax, (*shape, *axes), lambda w: w.reshape(shape).T)
    return kernel | {f"{torch}.bias": (f"params/{flax}/bias", shape[:1], itself)}


def pair(torch, flax, names=("fc1", "fc2"), *, axes=()):
    """The rules of the two layers ``names`` of an MLP."""
    return {
        **dense(f"{torch}{names[0]}", f"{flax}reduce", axes=axes),
        **dense(f"{torch}{names[1]}", f"{flax}expand", axes=axes),
    }


def along(torch, flax):
    return weight(torch, flax, (1, 1, 3), lambda w: w.reshape(3, 1, 1))


def spatial(torch, flax, order):
    def move(w):
        return np.stack([w[0, order[0]], w[0, order[1]]], axis=-1)[..., None]

    return weight(torch, flax, (1, 2, 3, 5), move)


def timm(torch, flax):
    """The rules of timm's blocks in a module ``torch``."""
    return [
        pair(torch, flax, axes=(1, 1)),
        along(f"{torch}conv", f"{flax}conv"),
        spatial(f"{torch}conv.conv", f"{flax}conv", (1, 0))
        | norm(f"{torch}conv.bn", f"{flax}norm"),
        norm(f"{torch}bn", f"{flax}reduce_norm"),
        dense(f"{torch}fc", f"{flax}excite", axes=(1, 1)),
        conv(f"{torch}spatial.conv.conv", f"{flax}spatial/conv", (1, 1, 3, 5)),
        dense(f"{torch}conv1", f"{flax}reduce", axes=(1, 1))
        | norm(f"{torch}bn1", f"{flax}hidden_norm")
        | dense(f"{torch}conv_h", f"{flax}expand_h", axes=(1, 1))
        | dense(f"{torch}conv_w", f"{flax}expand_w", axes=(1, 1)),
        conv(f"{torch}gather.conv1", f"{flax}gather1")
        | norm(f"{torch}gather.norm1", f"{flax}gather1_norm")
        | conv(f"{torch}gather.conv6", f"{flax}gather6")
        | norm(f"{torch}gather.norm6", f"{flax}gather6_norm")
        | pair(f"{torch}mlp.", flax, axes=(1, 1)),
        pair(f"{torch}channel.", f"{flax}channel/", axes=(1, 1))
        | spatial(f"{torch}spatial.conv.conv", f"{flax}spatial/conv", (1, 0))
        | norm(f"{torch}spatial.conv.bn", f"{flax}spatial/norm"),
    ]


def article(torch, flax):
    layers = "fc_layers.0", "fc_layers.2"
    channel = f"{torch}channel_attention_block.", f"{flax}channel/"
    half = spatial(
        f"{torch}spatial_attention_block.conv", f"{flax}spatial/conv", (0, 1)
    )
    return [
        pair(torch, flax, layers),
        along(f"{torch}conv", f"{flax}conv"),
        spatial(f"{torch}conv", f"{flax}conv", (0, 1)),
        pair(*channel, layers) | half,
        along(*(f"{side}conv" for side in channel)) | half,
    ]


def official(torch, flax):
    return (
        pair(f"{torch}ChannelGate.", f"{flax}channel/", ("mlp.1", "mlp.3"))
        | spatial(f"{torch}SpatialGate.spatial.conv", f"{flax}spatial/conv", (0, 1))
        | norm(f"{torch}SpatialGate.spatial.bn", f"{flax}spatial/norm")
    )


def ca_sa(torch, flax, names=("fc1", "fc2")):
    return pair(f"{torch}ca.", f"{flax}channel/", names, axes=(1, 1)) | spatial(
        f"{torch}sa.conv1", f"{flax}spatial/conv", (1, 0)
    )


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
        dense("layer3.1.se.fc", "stage3_block2/attention/excite", axes=(1, 1)),
        conv("conv1.0", "conv_stem1")
        | norm("conv1.1", "norm_stem1")
        | conv("conv1.3", "conv_stem2")
        | norm("conv1.4", "norm_stem2")
        | conv("conv1.6", "conv_stem3")
        | conv("maxpool.0", "conv_stem_pool")
        | norm("maxpool.1", "norm_stem_pool"),
        conv("layer1.0.downsample.1", "stage1_block1/conv_pooled_shortcut")
        | norm("layer1.0.downsample.2", "stage1_block1/norm_pooled_shortcut"),
    ],
    "torchvision": [*COMMON, timm("", "")[0]],
    "article": [
        *COMMON,
        *article("", ""),
        *article("layer3.1.attention.", "stage3_block2/attention/"),
    ],
    "official": [
        *COMMON,
        official("", ""),
        official("layer3.1.cbam.", "stage3_block2/attention/"),
        pair("", "", ("mlp.1", "mlp.3")),
        spatial("spatial.conv", "conv", (0, 1)) | norm("spatial.bn", "norm"),
        along("conv", "conv"),
        along("layer3.1.eca.conv", "stage3_block2/attention/conv"),
    ],
    "efficientnet": [*COMMON, pair("conv_", "", ("reduce", "expand"), axes=(1, 1))],
    "monai": [
        *COMMON,
        pair("", "", ("fc.0", "fc.2")),
        pair("layer3.1.se.", "stage3_block2/attention/", ("fc.0", "fc.2")),
    ],
    "smp": [
        *COMMON,
        pair("cSE.", "channel/", ("1", "3"), axes=(1, 1))
        | dense("sSE.0", "spatial", axes=(1, 1), shape=(1, 3)),
    ],
    "ca_sa": [
        *COMMON,
        ca_sa("", ""),
        ca_sa("layer3.1.", "stage3_block2/attention/"),
        pair("", "", axes=(1, 1)),
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


def read(rules, naming):
    """A state dict of all ``rules``, and its variables, which are where they say."""
    state = {key: numbers(*shape) for key, (_, shape, _) in rules.items()}
    variables = convert.to_flax(state, naming=naming)
    expected = {place: move(state[key]) for key, (place, _, move) in rules.items()}
    assert_same(variables, expected)
    return state, variables


@pytest.mark.parametrize("naming, rules", SPECIFIED)
def test_every_rule_in_both_directions(naming, rules):
    state, variables = read(rules, naming)
    assert_same(convert.to_torch(variables, naming=naming), state)


@pytest.mark.parametrize("naming", RULES)
@pytest.mark.parametrize("rules", ALIASES)
def test_names_that_are_read_and_not_written(naming, rules):
    state, variables = read(rules, naming)
    assert not state.keys() & convert.to_torch(variables, naming=naming).keys()


def test_the_spatial_kernel_of_timm_is_swapped_and_that_of_the_article_is_not():
    mean, maximum = np.full((3, 3), 1.0), np.full((3, 3), 2.0)
    timm = {"spatial.conv.conv.weight": np.stack([mean, maximum])[None]}
    kernel = convert.to_flax(timm)["params"]["spatial"]["conv"]["kernel"]
    assert kernel[0, 0].tolist() == [[2], [1]]
    article = {"conv.weight": np.stack([maximum, mean])[None]}
    kernel = convert.to_flax(article, naming="article")["params"]["conv"]["kernel"]
    assert kernel[0, 0].tolist() == [[2], [1]]


@pytest.mark.parametrize(
    "torch, flax", [("", ""), ("layer3.1.se.", "stage3_block2/attention/")]
)
@pytest.mark.parametrize("name", ["mlp_scale", "mlp_add"])
def test_the_two_global_contexts_of_timm(torch, flax, name):
    rules = dense(f"{torch}{name}.fc1", f"{flax}reduce", axes=(1, 1))
    rules |= dense(f"{torch}{name}.fc2", f"{flax}expand", axes=(1, 1))
    for ours, theirs in {"scale": "weight", "bias": "bias"}.items():
        place = f"params/{flax}norm/{ours}"
        rules[f"{torch}{name}.norm.{theirs}"] = place, (3,), lambda w: w
    pool = f"{torch}conv_attn.weight"
    rules[pool] = f"params/{flax}pool/kernel", (1, 3, 1, 1), lambda w: w.reshape(3, 1)
    state = {key: numbers(*shape) for key, (_, shape, _) in rules.items()}
    expected = {place: move(state[key]) for key, (place, _, move) in rules.items()}
    bias = {f"{torch}conv_attn.bias": numbers(1)}
    variables = convert.to_flax(state | bias)
    assert_same(variables, expected)
    # The softmax cancels the bias, so its value is lost.
    written = state | {key: np.zeros_like(array) for key, array in bias.items()}
    assert_same(convert.to_torch(variables, like=written), written)
    readings = rf"`{torch}mlp_scale\.fc[12]\.(\w+)` or `{torch}mlp_add\.fc[12]\.\1`"
    message = rf"may be {readings} \(naming 'timm'\); pass `like`"
    for strict in (True, False):
        with pytest.raises(convert.ConversionError, match=message):
            convert.to_torch(variables, strict=strict)


def test_the_mlp_of_gather_excite_is_written_where_like_has_it():
    """Alone, it has the parameters of an SE."""
    shapes = {"fc1.weight": (2, 3, 1, 1), "fc2.weight": (3, 2, 1, 1)}
    se = {key: numbers(*shape) for key, shape in shapes.items()}
    state = {f"mlp.{key}": array for key, array in se.items()}
    variables = convert.to_flax(state)
    assert_same(variables, convert.to_flax(se))
    assert_same(convert.to_torch(variables, like=state), state)
    assert_same(convert.to_torch(variables), se)


def test_counters_are_dropped_where_a_norm_has_them():
    state = norm_state("bn1") | {"bn1.num_batches_tracked": np.array(7)}
    assert_same(convert.to_torch(convert.to_flax(state)), norm_state("bn1"))
    with pytest.raises(convert.ConversionError, match="num_batches_tracked") as error:
        convert.to_flax(state | {"conv1.num_batches_tracked": np.array(7)})
    assert error.value.report.unused == ["conv1.num_batches_tracked ()"]
    like = state | {"bn1.num_batches_tracked": np.array(7)}
    convert.to_torch(convert.to_flax(state), like=like)


def test_the_other_layers_of_ca_sa_are_read():
    names = ("fc.0", "fc.2")
    for rules in (ca_sa("", "", names), pair("", "", names, axes=(1, 1))):
        read(rules, "ca_sa")


def test_a_key_with_two_readings():
    """A spatial attention alone, or the stem of a network of one filter."""
    state = {"conv1.weight": numbers(1, 2, 7, 7)}
    shapes = {"conv": (7, 7, 2, 1), "conv_stem": (7, 7, 2, 1)}
    message = r"\(1, 2, 7, 7\) may be `params/conv/kernel` or `params/conv_stem/kernel`"
    for strict in (True, False):
        with pytest.raises(convert.ConversionError, match=message):
            convert.to_flax(state, naming="ca_sa", strict=strict)
    found = {}
    for name, shape in shapes.items():
        like = {"params": {name: {"kernel": np.zeros(shape)}}}
        params = convert.to_flax(state, naming="ca_sa", like=like)["params"]
        (found[name],) = params[name].values()
        assert len(params) == 1
    assert (found["conv"] == found["conv_stem"][:, :, ::-1]).all()
    assert convert.to_flax(state)["params"].keys() == {"conv_stem"}


@pytest.mark.parametrize(
    "naming, name, shape",
    [
        ("'monai'", "fc.2", (32, 2)),
        ("'ca_sa'", "ca.fc1", (2, 32, 1, 1)),
        ("'official'", "mlp.1", (2, 32)),
        ("'efficientnet'", "conv_expand", (32, 2, 1, 1)),
        ("'smp'", "cSE.3", (32, 2, 1, 1)),
        ("'article'", "fc_layers.0", (2, 32)),
    ],
)
def test_names_of_another_naming_are_recognized(naming, name, shape):
    with pytest.raises(convert.ConversionError) as error:
        convert.to_flax({f"{name}.weight": numbers(*shape)})
    headline = error.value.report.headline
    assert headline.endswith(f"these are names of {naming}; pass that `naming`.")


def test_the_official_bam_has_its_own_naming():
    state = {
        "channel_att.gate_c.gate_c_fc_0.weight": numbers(2, 32),
        "spatial_att.gate_s.gate_s_conv_final.weight": numbers(1, 2, 1, 1),
    }
    for more in ({}, {"conv1.weight": numbers(4, 3, 7, 7)}):
        with pytest.raises(convert.ConversionError, match="'official_bam'"):
            convert.to_flax(state | more, naming="official")
    params = convert.to_flax(state, naming="official_bam")["params"]
    assert params["reduce"]["kernel"].shape == (32, 2)
    assert params["spatial_expand"]["kernel"].shape == (1, 1, 2, 1)
