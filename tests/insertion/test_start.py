"""A model with new attention against the model without: tables, outputs, state."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import normal, variables_for
from tests.insertion.models import (
    CBAM,
    KEY,
    SE,
    DoubleConv,
    InvertedResidual,
    MobileNet,
    ResNet,
    UNet,
    X,
    shapes,
    without_attention,
)

MODELS = {
    "resnet": (ResNet(), CBAM, "ResNetBlock_*/BatchNorm_1", {"train": False}),
    "mobilenet": (MobileNet(), SE(), "blocks_*/project", {}),
    "unet": (UNet(widths=(4,)), flax_attn.ECA(), DoubleConv, {}),
}


TABLES = {
    # CBAM: 2 * C * C / 4 + 3 * 3 * 2.
    "resnet": """
path                       type       output        parameters
ResNetBlock_0/BatchNorm_1  BatchNorm  (2, 8, 8, 8)          50
total                                                       50
""",
    # SE: 2 * C * C / 2.
    "mobilenet": """
path              type  output        parameters
blocks_0/project  Conv  (2, 4, 4, 4)          16
blocks_1/project  Conv  (2, 2, 2, 8)          64
total                                         80
""",
    # ECA: the kernel size of the article.
    "unet": """
path     type        output        parameters
down_4   DoubleConv  (2, 8, 8, 4)           1
bottom   DoubleConv  (2, 4, 4, 8)           3
merge_4  DoubleConv  (2, 8, 8, 4)           1
total                                       5
""",
}


@pytest.mark.parametrize("name", MODELS)
def test_sites_table(name):
    model, attention, where, kwargs = MODELS[name]
    inserted = flax_attn.insert(model, attention, where)
    table = flax_attn.sites(inserted, jax.ShapeDtypeStruct(X.shape, "float32"))
    assert str(table) == TABLES[name].strip("\n")

    def count(module):
        params = jax.eval_shape(partial(module.init, **kwargs), KEY, X)
        return sum(leaf.size for leaf in jax.tree.leaves(params["params"]))

    assert count(inserted) - count(model) == table.parameters


@pytest.mark.parametrize("name", MODELS)
def test_identity_start_keeps_the_output_bit_for_bit(name):
    model, attention, where, kwargs = MODELS[name]
    inserted = flax_attn.insert(model, attention, where, init="identity")
    init = partial(inserted.init, **kwargs)
    fresh = jax.jit(init)(KEY, X)
    # Unlike what the new model's initializers give.
    pretrained = jax.tree.map(lambda v: v + np.float32(0.01), without_attention(fresh))
    variables, new = flax_attn.merge(pretrained, fresh)
    assert new and all("/attention/" in path for path in new)
    jax.tree.map(
        np.testing.assert_array_equal, without_attention(variables), pretrained
    )

    y = jax.jit(partial(model.apply, **kwargs))(pretrained, X)
    now = jax.jit(partial(inserted.apply, **kwargs))(variables, X)
    np.testing.assert_array_equal(now, y)
    cotangent = normal(y.shape, 3)

    @jax.jit
    def gradients_of(params):
        def loss(params):
            y = inserted.apply(variables | {"params": params}, X, **kwargs)
            return jnp.sum(y * cotangent)

        return jax.grad(loss)(params)

    gradients = gradients_of(variables["params"])
    last = [
        g
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if "attention" in str(path) and re.search("expand|conv", str(path[-2:]))
    ]
    assert last and all(np.abs(g).max() > 0 for g in last)
    # The output depends on the gates.
    gates = flax_attn.assert_active(inserted, variables, X, **kwargs)
    assert len(gates) == len(last)


def test_other_variables_are_initialized_alike():
    model = InvertedResidual(4)
    inserted = flax_attn.insert(model, SE(), nn.Conv)
    a, b = (jax.jit(m.init)(KEY, X) for m in (model, inserted))
    jax.tree.map(np.testing.assert_array_equal, a, without_attention(b))


def test_sites_keep_their_dtype_in_half_precision():
    model = ResNet(dtype=jnp.bfloat16)
    inserted = flax_attn.insert(model, SE, nn.BatchNorm, init="identity")
    fresh = jax.jit(partial(inserted.init, train=False))(KEY, X)
    y = jax.jit(partial(inserted.apply, train=False))(fresh, X)
    plain = without_attention(fresh)
    expected = jax.jit(partial(model.apply, train=False))(plain, X)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(y), np.float32(expected))


def test_batch_statistics_methods_and_rngs():
    inserted = flax_attn.insert(ResNet(), SE, nn.BatchNorm)
    state = shapes(inserted, X)["batch_stats"]
    assert state["bn_init"] == {"mean": (8,), "var": (8,)}
    run = partial(inserted.apply, train=True, mutable=["batch_stats"])
    variables = jax.eval_shape(inserted.init, KEY, X)
    _, new = jax.eval_shape(run, variables, X)
    assert jax.tree.map(np.shape, new["batch_stats"]) == state

    inserted = flax_attn.insert(MobileNet(), SE(), InvertedResidual)
    variables = variables_for(inserted, X)

    @jax.jit
    def run(variables, x):
        y = inserted.apply(variables, x)
        encoded = inserted.apply(variables, x, method="encode")
        # A method that calls no site, of a model that has some.
        parts = inserted.apply(variables, encoded, method="classify")
        bound = inserted.bind(variables)
        also = inserted.apply(
            variables, x, method=lambda m, x: m.classify(bound.encode(x))
        )
        drop = partial(inserted.apply, variables, x, deterministic=False)
        dropped = [drop(rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
        return y, parts, also, dropped

    y, parts, also, (a, b, c) = run(variables, X)
    np.testing.assert_allclose(parts, y, atol=1e-6)
    np.testing.assert_allclose(also, y, atol=1e-6)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0 and np.abs(a - y).max() > 0
    with pytest.raises(AttributeError, match="no attribute"):
        inserted.decode  # noqa: B018
    with pytest.raises(ValueError, match="`model` must be bound"):
        inserted(X)


def test_captured_intermediates_hold_each_output_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    x = normal((2, 4, 4, 3), 0)
    model = flax_attn.insert(Model(), flax_attn.SE(), "dense")
    model = flax_attn.insert(model, flax_attn.ECA(), "dense", name="second")
    variables = model.init(jax.random.key(0), x)
    y, state = model.apply(variables, x, capture_intermediates=True)
    (recorded,) = state["intermediates"]["__call__"]
    np.testing.assert_array_equal(recorded, y)
    assert len(state["intermediates"]["dense"]["__call__"]) == 1
