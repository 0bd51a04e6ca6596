"""How models call and share their submodules: methods, fields, scopes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import variables_for
from tests.insertion.models import (
    KEY,
    SE,
    Chain,
    DoubleConv,
    MobileNet,
    UNet,
    X,
    shapes,
    without_attention,
)


class Staged(nn.Module):
    """Compact, in parts that an argument chooses."""

    @nn.compact
    def __call__(self, x, stage="all"):
        if stage != "head":
            x = nn.Conv(4, (1, 1), name="body")(x)
        return nn.Dense(2, name="head")(x) if stage != "body" else x


class Careful(nn.Module):
    """Calls a module without a parent, which Linen allows."""

    @nn.compact
    def __call__(self, x):
        Careful(parent=None).check(x)
        return nn.Conv(3, (1, 1), name="conv")(x)

    def check(self, x):
        assert x.ndim == 4


class Encoder(nn.Module):
    """Two compact methods, and a field that is a module."""

    layer: nn.Module = nn.Conv(3, (1, 1))
    width: int = 3

    @nn.compact
    def encode(self, x):
        return nn.Conv(self.width, (1, 1), name="conv")(x)

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


class Shared(nn.Module):
    """Setup style; one layer called twice."""

    layer: nn.Module = nn.Conv(3, (1, 1))

    def setup(self):
        self.shared = self.layer.clone()

    def __call__(self, x):
        return self.shared(self.shared(x))


@pytest.mark.parametrize("layer", [nn.Conv(3, (1, 1)), Shared()])
def test_a_submodule_that_is_called_twice_has_one_attention(layer):
    model = flax_attn.insert(Shared(layer), SE(), "shared")
    assert len(flax_attn.sites(model, X)) == 1
    variables = variables_for(model, X)
    params = dict(variables["params"]["shared"])
    attention = {"params": params.pop("attention")}
    expected = X
    for _ in range(2):
        expected = layer.apply({"params": params}, expected)
        expected = SE().apply(attention, expected)
    y = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_a_submodule_that_calls_its_super_class_has_one_attention():
    class Base(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (1, 1), name="conv")(x)

    class Derived(nn.remat(Base)):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Model(nn.Module):
        def __call__(self, x):
            return self.block(x)

        def setup(self):
            self.block = Derived()

    model = flax_attn.insert(Model(), SE(), Base)
    variables = variables_for(model, X)
    params = variables["params"]["block"]
    y = 2 * nn.Conv(3, (1, 1)).apply({"params": params["conv"]}, X)
    y = SE().apply({"params": params["attention"]}, y)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, X), y, atol=1e-6)


def test_parameters_keep_their_paths():
    class Own(nn.Module):
        """Names that the wrapper could use itself."""

        def setup(self):
            self.model = nn.Conv(3, (1, 1))
            self.hook = nn.Sequential([nn.Sequential([nn.Conv(3, (1, 1))])])

        def __call__(self, x):
            return self.hook(self.model(x))

    class Outer(nn.Module):
        body: nn.Module

        @nn.compact
        def __call__(self, x):
            return flax_attn.insert(UNet(), SE(), DoubleConv)(self.body(x))

    own = flax_attn.insert(Own(), SE(), nn.Conv)
    table = [site.path for site in flax_attn.sites(own, X)]
    assert table == ["model", "hook/layers_0/layers_0"]
    for cls in (Outer, nn.remat(Outer), nn.jit(Outer)):
        model = cls(own)
        params = shapes(model, X)["params"]
        assert without_attention(params) == {
            "body": shapes(Own(), X)["params"],
            "UNet_0": shapes(UNet(), X)["params"],
        }
        paths = [site.path for site in flax_attn.sites(model, X)]
        assert paths[:2] == [f"body/{path}" for path in table]
        assert paths[2:4] == ["UNet_0/down_4", "UNet_0/down_8"]


METHODS = {
    "function": Encoder.encode,
    "other": Encoder().encode,
    "partial": partial(Encoder.encode),
    "lambda": lambda model, x: model.encode(x),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("twice", [False, True])
def test_a_method_of_the_class_has_attention_too(method, twice):
    model = flax_attn.insert(Encoder(), SE(), nn.Conv)
    if twice:
        model = flax_attn.insert(model, flax_attn.ECA(), nn.Conv, name="eca")
    expected = shapes(model, X, method="encode")
    assert set(expected["params"]["conv"]) >= {"attention"}
    method = METHODS[method]
    assert shapes(model, X, method=method) == expected
    lazy = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, "float32"), method=method)
    assert jax.tree.map(jnp.shape, lazy) == expected
    (site,) = {site.path for site in flax_attn.sites(model, X, method=method)}
    assert site == "conv"
    if not twice:
        y = model.apply(lazy, X, method=method)
        conv = without_attention(lazy["params"]["conv"])
        z = nn.Conv(3, (1, 1)).apply({"params": conv}, X)
        z = SE().apply({"params": lazy["params"]["conv"]["attention"]}, z)
        np.testing.assert_allclose(y, z, atol=1e-6)
        gates = flax_attn.assert_active(model, lazy, X, method=method)
        assert gates == ("conv/attention",)


def test_an_overridden_method_of_a_base_class():
    class Derived(Encoder):
        def encode(self, x):
            raise NotImplementedError

    model = flax_attn.insert(Derived(), SE(), nn.Conv)
    expected = shapes(flax_attn.insert(Encoder(), SE(), nn.Conv), X, method="encode")
    assert shapes(model, X, method=Encoder.encode) == expected


@pytest.mark.parametrize("twice", [False, True])
def test_fields_of_the_model(twice):
    model = flax_attn.insert(Encoder(width=5), SE(), nn.Conv)
    if twice:
        model = flax_attn.insert(model, SE(), nn.Conv, name="se")
    assert model.width == 5
    assert set(shapes(model, X, method="encode")["params"]) == {"conv"}
    assert "attention" in shapes(model, X, method="layer")["params"]["layer"]
    with pytest.raises(AttributeError, match="Encoder has no attribute 'depth', only"):
        model.depth  # noqa: B018


def test_a_bound_model_uses_the_variables_of_the_call():
    plain = Encoder()
    # Binds its field too.
    bound = plain.bind(variables_for(plain, X))
    model = flax_attn.insert(plain, SE(), "layer")
    again = flax_attn.insert(bound, SE(), "layer")
    assert shapes(again, X) == shapes(model, X)
    other = variables_for(model, X, seed=9)
    np.testing.assert_array_equal(again.apply(other, X), model.apply(other, X))
    assert len(flax_attn.sites(again.bind(other), X)) == 1


@pytest.mark.parametrize("layer", [Chain(), MobileNet()])
def test_a_submodule_with_and_without_attention(layer):
    class Outer(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            inserted = flax_attn.insert(self.layer, SE(), nn.Conv)
            return self.layer(x), inserted(x), self.layer(x)

    model = Outer(layer)
    inserted = flax_attn.insert(layer, SE(), nn.Conv)
    variables = variables_for(model, X)
    assert shapes(model, X)["params"] == {"layer": shapes(inserted, X)["params"]}
    own = {"params": variables["params"]["layer"]}
    y, attended, z = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(attended, jax.jit(inserted.apply)(own, X), atol=1e-6)
    np.testing.assert_array_equal(y, z)
    assert np.abs(y - attended).max() > 0


@pytest.mark.parametrize("fresh", [False, True])
def test_a_call_without_sites_does_not_depend_on_earlier_ones(fresh):
    model = flax_attn.insert(Staged(), SE(), "body")
    variables = variables_for(model, X)
    if fresh:
        model = flax_attn.insert(Staged(), SE(), "body")
    head = partial(jax.eval_shape, partial(model.apply, stage="head"))
    features = jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")
    assert head(variables, features).shape == (2, 8, 8, 2)
    for run in (
        lambda: head(without_attention(variables), features),
        lambda: jax.eval_shape(partial(model.init, stage="head"), KEY, features),
    ):
        with pytest.raises(ValueError, match="Staged.__call__ calls, got 'body'"):
            run()


def test_modules_without_a_scope_are_ignored():
    model = flax_attn.insert(Careful(), SE(), nn.Conv)
    (site,) = flax_attn.sites(model, X)
    assert site.path == "conv"
    variables = variables_for(model, X)
    gates = flax_attn.assert_active(model, variables, X)
    assert gates == ("conv/attention",)
    labels = flax_attn.parameter_labels(model, X)
    assert labels["conv"]["kernel"] == "backbone"
