"""Insertion under Linen's transformations, and nn.jit's cache."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import normal, variables_for
from tests.insertion.models import KEY, SE, Chain, X, shapes


def by_hand(params, x, attend=("first", "second")):
    """Chain with SE after the layers in ``attend``, module by module."""
    for name, layer in (("first", nn.Conv(4, (3, 3))), ("second", nn.Conv(3, (1, 1)))):
        own = {k: v for k, v in params[name].items() if k != "attention"}
        x = layer.apply({"params": own}, x)
        if name in attend:
            x = SE().apply({"params": params[name]["attention"]}, x)
        if name == "first":
            x = nn.relu(x)
    return x


def assert_same_function(f, g, params, x):
    cotangent = normal(x.shape, 7)

    def both(function, params, x):
        y, pullback = jax.vjp(function, params, x)
        return y, *pullback(cotangent)

    a, b = (jax.jit(partial(both, function))(params, x) for function in (f, g))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), a, b)


LIFTS = {"plain": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}


@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("inside", [True, False])
def test_insertion_equals_a_model_written_by_hand(lift, inside):
    lifted = LIFTS[lift]
    model = Chain(lifted(nn.Conv)) if inside else lifted(Chain)()
    model = flax_attn.insert(model, SE(), nn.Conv)
    variables = variables_for(model, X)
    assert shapes(model, X)["params"]["first"]["attention"] == {
        "reduce": {"kernel": (4, 2)},
        "expand": {"kernel": (2, 4)},
    }
    assert_same_function(
        lambda p, x: model.apply({"params": p}, x), by_hand, variables["params"], X
    )


def test_scan():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Chain(name="chain")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scan(name="body")(x, None)[0]

    model = flax_attn.insert(Scanned(), SE(), "*/second")
    variables = variables_for(model, X)
    stacked = variables["params"]["body"]["chain"]
    assert stacked["second"]["attention"]["reduce"]["kernel"].shape == (3, 3, 1)
    (site,) = flax_attn.sites(model, X)
    assert site == ("body/chain/second", "Conv", X.shape, 3 * (3 + 3))

    def loop(params, x):
        for i in range(3):
            step = jax.tree.map(lambda p: p[i], params)  # noqa: B023
            x = by_hand(step, x, attend=["second"])
        return x

    def scanned(params, x):
        return model.apply({"params": {"body": {"chain": params}}}, x)

    assert_same_function(scanned, loop, stacked, X)
    # Each step has its own initial weights.
    fresh = jax.jit(model.init)(KEY, X)["params"]["body"]["chain"]
    first, *others = fresh["second"]["attention"]["reduce"]["kernel"]
    assert all(np.abs(first - other).max() > 1e-3 for other in others)
    paths = ("body/chain/second/attention",)
    assert flax_attn.assert_active(model, variables, X) == paths


def test_vmap():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                Chain,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return members(name="members")(x)

    model = flax_attn.insert(Ensemble(), SE(), nn.Conv)
    variables = variables_for(model, X)
    y = jax.jit(model.apply)(variables, X)
    for i in range(2):
        member = jax.tree.map(lambda p: p[i], variables["params"]["members"])  # noqa: B023
        np.testing.assert_allclose(y[i], by_hand(member, X), atol=1e-5)

    # jax.vmap of apply over weights and over examples.
    model = flax_attn.insert(Chain(), SE(), nn.Conv)
    member = variables["params"]["members"]
    z = jax.jit(jax.vmap(lambda p: model.apply({"params": p}, X)))(member)
    np.testing.assert_allclose(z, y, atol=1e-5)
    one = {"params": jax.tree.map(lambda p: p[0], member)}
    z = jax.jit(jax.vmap(partial(model.apply, one)))(X)
    np.testing.assert_allclose(z, y[0], atol=1e-5)


AXES = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
TRANSFORMS = {
    "vmap": lambda f: partial(nn.vmap(f, **AXES, in_axes=0)),
    "scan": lambda f: (
        lambda m, x: nn.scan(lambda m, x, _: (f(m, x), None), **AXES, length=2)(
            m, x, None
        )[0]
    ),
    "remat": nn.remat,
    "jit": nn.jit,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_of_an_insertion_in_a_method(transform):
    class Outer(nn.Module):
        transform: str

        @nn.compact
        def __call__(self, x):
            model = flax_attn.insert(Chain(name="chain"), SE(), nn.Conv)
            lift = TRANSFORMS[self.transform]
            return lift(lambda model, x: model(x))(model, x)

    model = Outer(transform)
    kernel = shapes(model, X)["params"]["chain"]["second"]["attention"]["reduce"]
    stacked = transform in ("vmap", "scan")
    assert kernel["kernel"] == (*([2] if stacked else []), 3, 1)
    variables = variables_for(model, X)
    y = model.apply(variables, X)
    members = variables["params"]["chain"]
    if transform in ("remat", "jit"):
        expected = by_hand(members, X)
    else:
        a, b = (jax.tree.map(lambda p: p[i], members) for i in range(2))  # noqa: B023
        if transform == "scan":
            expected = by_hand(b, by_hand(a, X))
        else:
            expected = np.stack([by_hand(a, X[0]), by_hand(b, X[1])])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_labels_where_a_transformed_module_has_a_block(lift):
    model = lift(nn.Sequential)([nn.Conv(4, (1, 1)), SE()])
    labels = flax_attn.parameter_labels(model, X)
    assert labels["layers_0"] == {"kernel": "backbone", "bias": "backbone"}
    assert set(jax.tree.leaves(labels["layers_1"])) == {"attention"}


def test_nn_jit_caches_each_insertion_apart():
    lifted = nn.jit(Chain)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="chain")(x)

    plain = Model()
    models = {
        (): plain,
        ("first",): flax_attn.insert(plain, SE(), "*/first"),
        ("second",): flax_attn.insert(plain, SE(), "*/second"),
        ("first", "second"): flax_attn.insert(plain, SE(), nn.Conv),
    }
    # The same for all models, so that only the hooks differ.
    variables = variables_for(models["first", "second"], X)
    for _ in range(2):
        for attend, model in models.items():
            # The second time it is compiled already and not traced.
            expected = by_hand(variables["params"]["chain"], X, attend=attend)
            y = model.apply(variables, X)
            np.testing.assert_allclose(y, expected, atol=1e-5)
    for attend in (("first",), ("first", "second")):
        gates = flax_attn.assert_active(models[attend], variables, X)
        assert gates == tuple(f"chain/{name}/attention" for name in attend)


def test_nn_jit_keeps_fields_that_are_alike_apart():
    lifted = nn.jit(Chain)
    plain = nn.Sequential([lifted(), lifted()])
    model = flax_attn.insert(plain, SE(), "layers_1/first")
    variables = variables_for(model, X)
    first, second = (variables["params"][f"layers_{i}"] for i in range(2))
    for attend, applied in ((), plain), (("first",), model), ((), plain):
        expected = by_hand(second, by_hand(first, X, attend=()), attend=attend)
        np.testing.assert_allclose(applied.apply(variables, X), expected, atol=1e-5)
    gates = flax_attn.assert_active(model, variables, X)
    assert gates == ("layers_1/first/attention",)
    block = nn.jit(flax_attn.SE)(reduction=2)
    both = nn.Sequential([block, block.clone()])
    variables = variables_for(both, X)
    assert flax_attn.assert_active(both, variables, X) == ("layers_0", "layers_1")


def test_nn_jit_compiles_once():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(x.shape)
            return nn.Conv(3, (1, 1))(x)

    lifted = nn.jit(Counted)

    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lifted(name="counted")(x)

    model = flax_attn.insert(Fixed(), SE(), nn.Conv)
    variables = variables_for(model, X)
    traces.clear()
    for _ in range(3):
        model.apply(variables, X)
    assert len(traces) == 1
