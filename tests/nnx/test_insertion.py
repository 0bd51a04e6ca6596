"""Blocks after the submodules of an NNX model that knows nothing of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_attn.nnx
from tests.cases import normal
from tests.nnx.cases import drawn, learned_class

X = normal((2, 6, 6, 3), 1)


class Stage(nnx.Module):
    def __init__(self, features_in, features, *, rngs):
        self.conv = nnx.Conv(features_in, features, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Paired(Stage):
    def __call__(self, x):
        y = super().__call__(x)
        return y, y.mean()


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.stage1 = Stage(3, 8, rngs=rngs)
        self.stage2 = Paired(8, 16, rngs=rngs)
        self.unused = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        y, mean = self.stage2(self.stage1(x))
        return self.head(y.mean((1, 2))) + mean


def make():
    return drawn(lambda: Model(rngs=nnx.Rngs(0)))


def insert(model, where, attention=flax_attn.nnx.SE, **fields):
    return flax_attn.nnx.insert(model, attention, where, X, rngs=nnx.Rngs(1), **fields)


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        (nnx.Conv, ["stage1/conv", "stage2/conv"]),
        (
            (nnx.Conv, nnx.BatchNorm),
            [f"stage{i}/{n}" for i in "12" for n in ("conv", "norm")],
        ),
        (Stage, ["stage1", "stage2"]),
        ("stage*", ["stage1", "stage2"]),
        ("*/norm", ["stage1/norm", "stage2/norm"]),
        (re.compile("stage1/.*"), ["stage1/conv", "stage1/norm"]),
        (lambda module, path: path == "stage2", ["stage2"]),
    ],
)
def test_sites(where, paths):
    model = make()
    before = jax.tree.map(np.array, flax_attn.nnx.to_linen(model))
    sites = insert(model, where)
    assert [site.path for site in sites] == paths
    for site in sites:
        assert site.shape == (2, 6, 6, 8 if site.path.startswith("stage1") else 16)
    after = flax_attn.nnx.to_linen(model)

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(after["params"]) - count(before["params"]) == sites.parameters > 0
    np.testing.assert_array_equal(
        after["batch_stats"]["stage1"]["norm"]["mean"],
        before["batch_stats"]["stage1"]["norm"]["mean"],
    )
    gates = nnx.eval_shape(flax_attn.nnx.attention_maps, model, X)
    assert sorted(gates) == sorted(f"{p}/attention/channel_gate" for p in paths)


@learned_class
def test_starts_as_the_model_was_and_trains(name):
    model = make()
    run = nnx.jit(lambda model: nnx.clone(model)(X))
    expected = run(model)
    # Positive, so that no ReLU of few units is dead from the start.
    positive = nnx.initializers.uniform(0.3)
    attention = partial(flax_attn.nnx.BLOCKS[name], kernel_init=positive)
    insert(model, Stage, attention, init="identity")
    np.testing.assert_allclose(run(model), expected, rtol=1e-6, atol=1e-6)
    wrt = flax_attn.nnx.attention_params(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    before = jax.tree.map(np.array, flax_attn.nnx.to_linen(model)["params"])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return (model(X) ** 2).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(
            model
        )
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[2] < losses[0]
    after = flax_attn.nnx.to_linen(model)["params"]
    moved = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    )
    for path, changed in moved:
        assert not changed or "attention" in jax.tree_util.keystr(path)
    assert any(changed for _, changed in moved)


def test_twice_at_one_site():
    model = make()
    insert(model, "stage1")
    sites = insert(model, "stage1", flax_attn.nnx.ECA, name="second")
    assert [site.path for site in sites] == ["stage1"]
    assert type(model.stage1.attention) is flax_attn.nnx.SE
    assert type(model.stage1.second) is flax_attn.nnx.ECA
    assert len(flax_attn.nnx.attention_maps(model, X)) == 2
    assert isinstance(model.stage1, Stage)


def test_tabulate_leaves_the_methods_alone():
    model = make()
    insert(model, "stage1/conv")
    assert "SE" in nnx.tabulate(model, X)
    model.eval()
    model.stage1.conv.train()
    assert model(X).shape == (2, 4)


class Scanned(nnx.Module):
    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Conv(3, 3, (3, 3), rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        scan = nnx.scan(
            lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return scan(self.layers, x)


def narrow(features, *, rngs):
    return nnx.Conv(features, 1, (1, 1), rngs=rngs)


@pytest.mark.parametrize(
    ("where", "fields", "message"),
    [
        ("nowhere", {}, "`where` must select a submodule that Model calls"),
        ("unused", {}, "`where` must select a submodule that Model calls"),
        (nnx.Linear, {}, "`where` must select submodules that return a feature map"),
        (jnp.ndarray, {}, "`where` must be a subclass of nnx.Module"),
        (nnx.Conv, {"init": "zeros"}, "`init` must be 'identity' or None"),
        (nnx.Conv, {"name": "a/b"}, "`name` must be the name of an attribute"),
        (Stage, {"name": "conv"}, "`name` must be unused in stage1"),
        (Stage, {"attention": narrow}, "stage1, stage2 .* must keep the shape"),
        (Stage, {"attention": flax_attn.SE}, "`attention` must be callable as"),
        (Stage, {"attention": lambda *_, **__: 1}, "`attention` must return an NNX"),
    ],
)
def test_errors_leave_the_model_alone(where, fields, message):
    model = make()
    before = nnx.split(model)[0]
    with pytest.raises(ValueError, match=message):
        insert(model, where, **fields)
    assert nnx.split(model)[0] == before


def test_stacked_layers_are_refused():
    model = Scanned(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="outside nnx.scan and nnx.vmap, got layers"):
        insert(model, nnx.Conv)
    with pytest.raises(ValueError, match="`model` must contain attention"):
        flax_attn.nnx.attention_params(model)


class Activated(Scanned):
    """Stacked layers with a submodule of which nothing is stacked."""

    class Activation(nnx.Module):
        def __call__(self, x):
            return nnx.relu(x)

    class Layer(nnx.Module):
        def __init__(self, *, rngs):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
            self.act = Activated.Activation()

        def __call__(self, x):
            return self.act(self.conv(x))

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return self.Layer(rngs=rngs)

        self.layers = make(rngs)


def test_a_submodule_without_parameters_in_stacked_layers_is_refused():
    model = Activated(rngs=nnx.Rngs(0))
    expected = model(X)
    with pytest.raises(ValueError, match="after layers/act .* nnx.scan and nnx.vmap"):
        insert(model, "layers/act")
    np.testing.assert_array_equal(model(X), expected)


def test_a_model_class_is_refused():
    with pytest.raises(ValueError, match="`model` must be an NNX module"):
        insert(Model, "stage1")


class Static(Stage):
    @staticmethod
    def scaled(x):
        return 2 * x

    def __call__(self, x):
        return self.scaled(super().__call__(x))


def test_static_methods_stay_static():
    model = nnx.Sequential(Static(3, 8, rngs=nnx.Rngs(0)))
    expected = model(X)
    insert(model, Static, init="identity")
    np.testing.assert_array_equal(model(X), expected)


class Tokens(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.LinearGeneral((6, 3), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.embed(x)


def test_tokens_need_one_spatial_axis():
    model = Tokens(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="spatial_dims=2 would treat the batch axis"):
        insert(model, "embed")
    insert(model, "embed", partial(flax_attn.nnx.SE, spatial_dims=1))
    assert model(X).shape == (2, 6, 8)
