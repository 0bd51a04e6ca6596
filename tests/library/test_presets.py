"""The presets' fields, widths, starts and places; test_parity_presets.py compares.

Their numbers of parameters in a ResNet-50 are in test_resnet.py.
"""

import inspect
import math
import pydoc
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import presets
from flax_attn.resnet import cifar_resnet
from tests.cases import ARTICLE, normal, variables_for

# Those that are functions of `train`, and those of anything else.
FUNCTIONS = [n for n in presets.__all__ if inspect.isfunction(getattr(presets, n))]
TRAINED = [n for n in FUNCTIONS if n != "official_eca"]
NAMES = [name for name in presets.__all__ if name != "official_eca"]


def make(name, *, train=False):
    preset = getattr(presets, name)
    return preset(train=train) if name in TRAINED else preset


def shapes(block, features):
    x = jnp.zeros((1, 2, 2, features))
    return jax.eval_shape(block.init, jax.random.key(0), x)


def kernel_width(preset, features):
    width, *ones = shapes(preset(), features)["params"]["conv"]["kernel"].shape
    assert ones == [1, 1]
    return width


def test_every_name_is_public_and_documented():
    assert flax_attn.presets is presets
    assert sorted(presets.__all__) == presets.__all__
    public = [n for n, value in vars(presets).items() if is_preset(n, value)]
    assert sorted(public) == presets.__all__
    rows = re.findall(r"^``(\w+)", presets.__doc__, re.MULTILINE)
    assert sorted(rows) == presets.__all__
    for name in presets.__all__:
        preset = getattr(presets, name)
        assert preset.__doc__ != partial.__doc__ and preset.__doc__, name
        if name in FUNCTIONS:
            assert ">>>" in preset.__doc__


def test_help_shows_the_preset_and_not_functools():
    text = pydoc.plain(pydoc.render_doc(presets.timm_se))
    assert "timm.layers.SEModule" in text and "partial application" not in text


def is_preset(name, value):
    made_here = (getattr(value, "__module__", None) or "").startswith(presets.__name__)
    return not name.startswith("_") and (isinstance(value, partial) or made_here)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_block_with_fields(name):
    preset = make(name)
    assert isinstance(preset, partial) and not preset.args
    assert issubclass(preset.func, nn.Module)
    assert not preset.func.__module__.startswith(presets.__name__)
    block = preset(dtype=jnp.bfloat16, use_bias=True, name="attention")
    assert block.dtype == jnp.bfloat16 and block.use_bias and block.name == "attention"


def test_built_anew_a_preset_is_the_same():
    """Equal, so that what is compiled for it is found again."""
    traced = []

    @partial(jax.jit, static_argnums=0)
    def run(block, x):
        traced.append(block)
        return x

    builds = [partial(make, name, train=True) for name in NAMES]
    builds.append(lambda: presets.official_eca({64: 3, 128: 5}))
    for build in builds:
        traced.clear()
        first, second = build()(), build()()
        assert first == second and hash(first) == hash(second)
        run(first, 1.0), run(second, 1.0)
        assert len(traced) == 1
    norm = partial(nn.BatchNorm, use_running_average=True)
    other = flax_attn.CBAM(spatial_norm=partial(norm, use_running_average=False))
    assert flax_attn.CBAM(spatial_norm=norm) != other


def test_a_partial_of_what_has_no_hash_stays_as_it_is():
    norm = partial(nn.BatchNorm, use_running_average=True, scale_init=np.ones(1))
    assert flax_attn.CBAM(spatial_norm=norm).spatial_norm is norm


@pytest.mark.parametrize("name", TRAINED)
def test_train_is_keyword_only_and_has_no_default(name):
    with pytest.raises(TypeError):
        getattr(presets, name)()
    with pytest.raises(TypeError):
        getattr(presets, name)(True)


@pytest.mark.parametrize("block", ARTICLE)
def test_the_article_is_what_the_parity_tests_compare(block):
    preset = make("article_" + block.replace("-", "_"))
    assert preset() == ARTICLE[block]()


# By hand from timm's make_divisible(C / 16, divisor, round_limit=0.0).
@pytest.mark.parametrize(
    "features, se, cbam",
    [(1, 8, 1), (8, 8, 1), (20, 8, 1), (23, 8, 1), (24, 8, 2), (40, 8, 3), (64, 8, 4)]
    + [(184, 8, 12), (191, 8, 12), (192, 16, 12), (200, 16, 13), (256, 16, 16)]
    + [(320, 24, 20), (2048, 128, 128)],
)
def test_hidden_widths_of_timm(features, se, cbam):
    params = shapes(presets.timm_se(), features)["params"]
    assert params["reduce"]["kernel"].shape == (features, se)
    assert params["reduce"]["bias"].shape == (se,)
    params = shapes(presets.timm_cbam(train=False)(), features)["params"]
    assert params["channel"]["reduce"]["kernel"].shape == (features, cbam)
    assert "bias" not in params["channel"]["reduce"]


@pytest.mark.parametrize("name", ["timm_eca", "timm_ceca"])
@pytest.mark.parametrize("features, k", [(1, 3), (7, 3), (8, 3), (128, 5), (2048, 7)])
def test_kernel_widths_of_timm(name, features, k):
    assert kernel_width(make(name), features) == k


@pytest.mark.parametrize(
    "name, widths",
    [("official_eca50", (3, 5, 5, 7)), ("official_eca101", (3, 3, 5, 7))],
)
def test_kernel_widths_of_eca_net(name, widths):
    for features, k in zip((256, 512, 1024, 2048), widths, strict=True):
        assert kernel_width(make(name), features) == k


def test_eca_net_knows_its_channels_only():
    message = "`x` must have 256 or 512 or .* got 64; pass .*presets.official_eca`"
    with pytest.raises(ValueError, match=message):
        shapes(presets.official_eca50(), 64)


def test_widths_of_another_network():
    widths = {64: 3, 128: 9}
    attention = presets.official_eca(widths)
    widths[64] = 5  # Of no account any more.
    assert kernel_width(attention, 64) == 3 and kernel_width(attention, 128) == 9


@pytest.mark.parametrize(
    "widths, message",
    [
        ({}, "`widths` must name at least one"),
        ({64: 4}, "`widths` must be an odd integer of at least 1, got 4"),
        ({64: 3.0}, "`widths` must be an odd integer of at least 1, got 3.0"),
        ({0: 3}, "`widths` must be an integer of at least 1, got 0"),
        ([64], r"`widths` must be a dict from .*, got \[64\]; pass e.g. {256: 3"),
        (5, "`widths` must be a dict from numbers of channels to widths, got 5"),
    ],
)
def test_bad_widths(widths, message):
    with pytest.raises(ValueError, match=message):
        presets.official_eca(widths)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("official_eca")])
def test_a_preset_is_an_attention_of_the_networks(name):
    model = cifar_resnet(8, num_classes=10, attention=make(name, train=True))
    apply = partial(model.init, train=True)
    variables = jax.eval_shape(apply, jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
    blocks = {k: v for k, v in variables["params"].items() if "_block" in k}
    learned = bool(jax.tree.leaves(shapes(make(name)(), 16)))
    assert len(blocks) == 3
    assert all(("attention" in block) == learned for block in blocks.values())
    averages = variables["batch_stats"]["stage1_block1"]
    assert ("attention" in averages) == (name in TRAINED)


def initial(name, features):
    block = make(name)()
    x = jnp.zeros((2, 4, 4, features))
    # Jitted for the parameters alone, nothing of the block itself is compiled.
    return jax.jit(lambda key: block.init(key, x)["params"])(jax.random.key(0))


def check_uniform(kernel, fan_in):
    """PyTorch's default for linear and convolutional layers."""
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(kernel).max() <= bound
    if kernel.size > 1000:
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_official_cbam_starts_as_its_code_does():
    params = initial("official_cbam", 512)
    check_uniform(params["channel"]["reduce"]["kernel"], 512)
    check_uniform(params["channel"]["expand"]["kernel"], 32)
    # Kaiming, fan-out: 49 positions and one channel. 98 draws, so within a quarter.
    std = np.std(params["spatial"]["conv"]["kernel"])
    assert std == pytest.approx(math.sqrt(2 / 49), rel=0.25)
    assert np.all(params["spatial"]["norm"]["scale"] == 0)
    biases = [params["channel"][k]["bias"] for k in ("reduce", "expand")]
    assert not any(map(np.any, (*biases, params["spatial"]["norm"]["bias"])))


@pytest.mark.parametrize("spatial_dims", [1, 3])
def test_the_official_cbam_starts_alike_in_any_dimension(spatial_dims):
    block = make("official_cbam")(spatial_dims=spatial_dims)
    x = jnp.zeros((1, *(2,) * spatial_dims, 32))
    params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    shape = params["spatial"]["conv"]["kernel"].shape
    assert shape == (*(7,) * spatial_dims, 2, 1)
    draws = [
        block.kernel_init(jax.random.key(i), shape, jnp.float32) for i in range(20)
    ]
    assert np.std(draws) == pytest.approx(math.sqrt(2 / 7**spatial_dims), rel=0.15)


def test_timm_starts_as_its_layers_do_but_for_the_biases():
    params = initial("timm_se", 512)
    check_uniform(params["reduce"]["kernel"], 512)
    check_uniform(params["expand"]["kernel"], 32)
    params = initial("timm_cbam", 512)
    check_uniform(params["channel"]["reduce"]["kernel"], 512)
    assert np.all(params["spatial"]["norm"]["scale"] == 1)
    check_uniform(params["spatial"]["conv"]["kernel"], 2 * 49)
    for name in ("timm_eca", "timm_ceca", "official_eca50"):
        check_uniform(initial(name, 512)["conv"]["kernel"], 5)


@pytest.mark.parametrize(
    "name, momentum", [("official_cbam", 0.99), ("timm_cbam", 0.9), ("timm_lcbam", 0.9)]
)
def test_running_averages(name, momentum):
    """One step moves them by 1 - momentum; without `train` they stay."""
    x = normal((4, 3, 5, 24), 0)
    train, test = make(name, train=True)(), make(name, train=False)()
    variables = dict(variables_for(train, x))
    norm = {"mean": np.float32([0.25]), "var": np.float32([1.5])}
    variables["batch_stats"] = {"spatial": {"norm": norm}}

    @jax.jit
    def run(variables, x):
        apply = partial(train.apply, mutable=["batch_stats", "intermediates"])
        _, state = apply(variables, x, capture_intermediates=True)
        _, same = test.apply(variables, x, mutable=["batch_stats"])
        logits = state["intermediates"]["spatial"]["conv"]["__call__"][0]
        return state["batch_stats"], logits, same["batch_stats"]

    stats, logits, same = run(variables, x)
    logits = np.asarray(logits, np.float64)
    expected = {
        "mean": momentum * 0.25 + (1 - momentum) * logits.mean(),
        "var": momentum * 1.5 + (1 - momentum) * logits.var(),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(stats["spatial"]["norm"][key], value, atol=1e-5)
        np.testing.assert_array_equal(same["spatial"]["norm"][key], norm[key])


@pytest.mark.parametrize("name", TRAINED)
def test_logits_that_are_nearly_equal(name):
    """The variance is that of the centered logits; E[z^2] - E[z]^2 would be noise."""
    fields = make(name, train=True).keywords
    norm = (fields.get("spatial_norm") or fields["hidden_norm"])()
    logits = np.float32(100) + np.float32(0.01) * normal((4, 5, 6, 1), 0)
    params = {"scale": np.float32([1]), "bias": np.float32([0])}
    stats = {"mean": np.float32([0]), "var": np.float32([1])}
    variables = {"params": params, "batch_stats": stats}
    y, _ = jax.jit(partial(norm.apply, mutable=["batch_stats"]))(variables, logits)
    wide = logits.astype(np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    np.testing.assert_allclose(y, expected, atol=5e-3)
