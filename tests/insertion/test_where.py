"""Where attention is inserted, and which arguments raise."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax
import jax
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import normal, variables_for
from tests.insertion.models import (
    KEY,
    SE,
    DoubleConv,
    InvertedResidual,
    MobileNet,
    UNet,
    X,
    shapes,
)


class Odd(nn.Module):
    """Submodules that return no feature map, or use the name already."""

    @nn.compact
    def __call__(self, x):
        pair = Pair(name="pair")(x)
        y = Named(name="named")(pair["a"] + pair["b"])
        return nn.Dense(2, name="head")(y.mean((1, 2)))


class Pair(nn.Module):
    def __call__(self, x):
        return {"a": x, "b": 2 * x}


class Named(nn.Module):
    def setup(self):
        self.attention = nn.Conv(3, (1, 1))

    def __call__(self, x):
        return self.attention(x)


class Halves(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x[..., ::2, :] * self.param("scale", nn.initializers.ones, ())


DOWN = ["down_4/Conv_0", "down_4/Conv_1", "down_8/Conv_0", "down_8/Conv_1"]
UP = ["up_8", "up_4"]
TOP = ["down_4", "down_8", "bottom", "up_8", "merge_8", "up_4", "merge_4"]
LAYERS = ["Conv", "LayerNorm"]


def norms(*blocks):
    return [f"{block}/LayerNorm_{i}" for block in blocks for i in (0, 1)]


# In the order of the calls.
UP_AND_NORMS = [
    *norms("down_4", "down_8", "bottom"),
    *("up_8", *norms("merge_8")),
    *("up_4", *norms("merge_4")),
]


@pytest.mark.parametrize(
    "where, expected",
    [
        (nn.ConvTranspose, UP),
        ((nn.ConvTranspose, nn.LayerNorm), UP_AND_NORMS),
        ("down_*/Conv_?", DOWN),
        ("down_4/Conv_0", DOWN[:1]),
        ("down_*", ["down_4", "down_8"]),
        ("*", [*TOP, "logits"]),
        ("*4/*_0", [f"{a}_4/{b}_0" for a in ("down", "merge") for b in LAYERS]),
        (re.compile("(up|down)_[0-9]"), ["down_4", "down_8", "up_8", "up_4"]),
        (
            lambda module, path: getattr(module, "features", 0) == 16,
            ["bottom/Conv_0", "bottom/Conv_1", "bottom"],
        ),
        (lambda module, path: path in UP, UP),
    ],
)
def test_where(where, expected):
    model = flax_attn.insert(UNet(), flax_attn.ECA, where)
    assert [site.path for site in flax_attn.sites(model, X)] == expected


@pytest.mark.parametrize(
    "where", [nn.Embed, "conv", re.compile("down"), lambda m, p: 0]
)
def test_no_match_raises(where):
    plain = UNet()
    model = flax_attn.insert(plain, SE(), where)
    variables = jax.eval_shape(plain.init, KEY, X)
    message = r"`where` must select .* UNet.__call__ calls, .*down_4/Conv_0 \(Conv\)"
    for run in (
        lambda: jax.eval_shape(model.init, KEY, X),
        lambda: jax.eval_shape(model.apply, variables, X),
        lambda: flax_attn.sites(model, X),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_no_match_in_a_method_raises_without_attention_elsewhere():
    plain = MobileNet()
    variables = jax.eval_shape(plain.init, KEY, X)
    model = flax_attn.insert(plain, SE(), InvertedResidual)
    with pytest.raises(ValueError, match="MobileNet.classify calls"):
        jax.eval_shape(
            partial(model.apply, method="classify"), variables, normal((2, 2, 2, 8), 0)
        )
    # Pretrained variables alone are not enough.
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="attention/reduce"):
        jax.eval_shape(model.apply, variables, X)


@pytest.mark.parametrize(
    "where, attention, message",
    [
        ("pair", SE(), r"pair \(Pair\) returns a dict of arrays of shapes \[\(2, 8, 8"),
        ("head", SE(), r"head \(Dense\) returns an array of shape \(2, 2\)"),
        ("named", SE(), "`name` must be unused in named .* already has 'attention'"),
        ("named/*", Halves, r"`attention` must keep the shape \(2, 8, 8, 3\)"),
    ],
)
def test_invalid_sites_raise(where, attention, message):
    model = flax_attn.insert(Odd(), attention, where)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, X)


def test_another_name():
    model = flax_attn.insert(Odd(), SE(), "named", name="gate")
    assert set(shapes(model, X)["params"]["named"]) == {"attention", "gate"}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": UNet}, "`model` must be an instance"),
        ({"attention": 3}, "`attention` must be a Linen module"),
        ({"attention": lambda: 3}, "`attention` must be a Linen module"),
        (
            {"attention": flax_attn.presets.official_cbam},
            "`attention` must need no arguments, .*'train'; set them",
        ),
        ({"where": int}, "`where` must be"),
        ({"where": ()}, "`where` must be"),
        ({"where": (nn.Conv, "x")}, "`where` must be"),
        ({"where": [nn.Conv]}, "`where` must be .*several classes as a tuple"),
        ({"where": nn.Conv(3, (1, 1))}, "`where` must be"),
        *(
            ({"name": name}, f"`name` must be .* string .* got {name!r}; leave it out")
            for name in (None, "", "a/b", 3)
        ),
        ({"init": "id"}, "`init` must be 'identity' or None, got 'id'"),
        ({"init": True}, "got True; leave it out"),
        ({"init": "identity", "attention": Halves()}, "a block with a field"),
    ],
)
def test_invalid_arguments_raise(changed, message):
    arguments = {"model": UNet(), "attention": SE(), "where": nn.Conv} | changed
    with pytest.raises(ValueError, match=message):
        flax_attn.insert(**arguments)


def test_insertions_into_insertions():
    first = flax_attn.insert(UNet(), flax_attn.ECA(), nn.Conv)
    # Only SE has Dense layers, and nothing is inserted into it.
    both = flax_attn.insert(first, SE(), DoubleConv)
    with pytest.raises(ValueError, match="selects none of"):
        flax_attn.sites(flax_attn.insert(both, SE(), nn.Dense), X)
    params = shapes(both, X)["params"]["down_4"]
    assert set(params["attention"]) == {"reduce", "expand"}
    assert set(params["Conv_0"]["attention"]) == {"conv"}
    with pytest.raises(ValueError, match="`name` must be unused in down_4/Conv_0"):
        flax_attn.sites(flax_attn.insert(first, SE(), nn.Conv), X)
    twice = flax_attn.insert(first, SE(), nn.Conv, name="se")
    assert set(shapes(twice, X)["params"]["up_4"]) == {"kernel", "bias"}
    assert set(shapes(twice, X)["params"]["logits"]) >= {"attention", "se"}


def test_a_name_of_the_model_does_not_hide_that_nothing_is_selected():
    model = flax_attn.insert(Odd(), SE(), "name")
    with pytest.raises(ValueError, match="Odd.__call__ calls, got 'name'"):
        jax.eval_shape(model.init, KEY, X)


class Auxiliary(nn.Module):
    """A head that only training calls."""

    @nn.compact
    def __call__(self, x, train=True):
        y = nn.Conv(4, (1, 1), name="body")(x)
        return y, nn.Conv(4, (1, 1), name="head")(y) if train else None


@pytest.mark.parametrize("wrong", ["bdoy", nn.Dense, lambda module, path: False])
def test_attention_after_a_called_submodule_is_not_dropped_in_silence(wrong):
    trained = variables_for(flax_attn.insert(Auxiliary(), SE(), nn.Conv), X)
    with pytest.raises(ValueError, match="selects none of"):
        flax_attn.insert(Auxiliary(), SE(), wrong).apply(trained, X)


def test_attention_after_a_submodule_that_is_not_called_is_no_error():
    trained = variables_for(flax_attn.insert(Auxiliary(), SE(), "head"), X)
    attentive = flax_attn.insert(Auxiliary(), SE(), "head")
    y, none = attentive.apply(trained, X, train=False)
    expected, _ = Auxiliary().apply(trained, X, train=False)
    np.testing.assert_array_equal(y, expected)
    assert none is None


class Result(NamedTuple):
    features: jax.Array
    extra: jax.Array


class Wrapped(nn.Module):
    """A convolution whose submodule returns its map in a tuple."""

    wrap: Callable = lambda y: (y,)

    @nn.compact
    def __call__(self, x):
        return Wraps(self.wrap, name="inner")(x)


class Wraps(nn.Module):
    wrap: Callable

    @nn.compact
    def __call__(self, x):
        return self.wrap(nn.Conv(4, (1, 1), name="conv")(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y,), lambda y: (y, 3 * y), lambda y: Result(y, y[..., 0])],
    ids=["one", "two", "named"],
)
def test_the_first_entry_of_a_tuple_is_attended(wrap):
    model = flax_attn.insert(Wrapped(wrap), SE(), "inner")
    (site,) = flax_attn.sites(model, X)
    assert site.shape == (2, 8, 8, 4)
    variables = variables_for(model, X)
    params = variables["params"]["inner"]
    y = nn.Conv(4, (1, 1)).apply({"params": params["conv"]}, X)
    before = wrap(y)
    result = model.apply(variables, X)
    assert type(result) is type(before) and len(result) == len(before)
    attended = SE().apply({"params": params["attention"]}, y)
    np.testing.assert_allclose(result[0], attended, atol=1e-6)
    for entry, expected in zip(result[1:], before[1:], strict=True):
        np.testing.assert_array_equal(entry, expected)


@pytest.mark.parametrize(
    "wrap", [lambda y: (), lambda y: (y.mean(), y), lambda y: ((y,),), lambda y: [y]]
)
def test_other_containers_raise(wrap):
    model = flax_attn.insert(Wrapped(wrap), SE(), "inner")
    with pytest.raises(ValueError, match="`where` must .* a tuple that starts with"):
        jax.eval_shape(model.init, KEY, X)


class ViT(nn.Module):
    """Patches to tokens (N, L, C)."""

    @nn.compact
    def __call__(self, x):
        if x.ndim == 2:
            x = nn.Embed(10, 6)(x)
        else:
            x = nn.Conv(6, (2, 2), strides=2, name="patches")(x)
            x = x.reshape(len(x), -1, 6)
        return nn.Dense(6, name="mlp")(x).mean(1)


@pytest.mark.parametrize("x", [X, np.ones((2, 5), int)], ids=["images", "words"])
@pytest.mark.parametrize(
    "block", [SE(), flax_attn.ECA(), flax_attn.CBAM()], ids=["se", "eca", "cbam"]
)
def test_tokens_need_a_block_of_one_spatial_axis(block, x):
    model = flax_attn.insert(ViT(), block, "mlp")
    message = r"would treat the batch axis .* mlp \(Dense\), .*; pass spatial_dims=1,"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, x)
    model = flax_attn.insert(ViT(), block.clone(spatial_dims=1), "mlp")
    variables = variables_for(model, x)
    # No sample depends on another.
    together = model.apply(variables, x)
    alone = np.concatenate([model.apply(variables, x[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_maps_need_a_block_of_two_spatial_axes():
    model = flax_attn.insert(UNet(), SE(spatial_dims=3), "down_4")
    video = jax.ShapeDtypeStruct((2, 3, 8, 8, 3), "float32")
    assert jax.eval_shape(model.init, KEY, video)

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (1, 1), name="flat")(x.mean(1))

    model = flax_attn.insert(Flat(), SE(spatial_dims=3), "flat")
    with pytest.raises(ValueError, match="pass spatial_dims=2, or"):
        jax.eval_shape(model.init, KEY, video)


def test_one_map_without_a_batch_axis():
    model = flax_attn.insert(UNet(), SE(), "down_4")
    variables = variables_for(model, X)
    one = jax.jit(model.apply)(variables, X[0])
    np.testing.assert_allclose(one, jax.jit(model.apply)(variables, X)[0], atol=1e-5)
