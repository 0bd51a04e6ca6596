"""How a block in NNX is declared, made and refused; and blocks of your own."""

import inspect
from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_attn.nnx
from flax_attn import blocks
from tests.nnx.cases import MASK, X, compiled, every_block, every_class, params


@every_class
def test_new_parameters(name):
    """Drawn with Linen's initializers, from a stream that calls leave alone."""
    rngs = nnx.Rngs(0)
    first, second = (flax_attn.nnx.create(name, 16, rngs=rngs) for _ in range(2))
    again = flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(params(first), params(again))
    different = jax.tree.map(lambda a, b: (a != b).any(), params(first), params(second))
    assert all(jax.tree.leaves(different)) or "bias" in str(different)
    linen = jax.eval_shape(blocks.BLOCKS[name]().init, jax.random.key(0), X)
    chex.assert_trees_all_equal_shapes_and_dtypes(flax_attn.nnx.to_linen(first), linen)
    count = int(rngs.params.count[...])
    compiled(first, X)
    assert int(rngs.params.count[...]) == count > 0
    assert not nnx.to_flat_state(nnx.state(first, nnx.RngState))


@every_class
def test_errors_are_those_of_linen(name):
    make = partial(flax_attn.nnx.create, name, rngs=nnx.Rngs(0))
    for features in (0, 1.5, True):
        with pytest.raises(ValueError, match="`features` must be"):
            make(features)
    with pytest.raises(ValueError, match="`implementation` must be"):
        make(16, implementation="slow")
    with pytest.raises(TypeError, match="wrong"):
        make(16, wrong=1)
    block = make(16)
    with pytest.raises(ValueError, match="`x` must have 16 channels"):
        block(X[..., :8])
    with pytest.raises(ValueError, match="`x` must have at least 3 axes"):
        block(X[0, 0])
    with pytest.raises(ValueError, match="`mask` must be boolean"):
        block(X, MASK.astype(np.float32))


@every_block
def test_the_class_declares_what_linen_declares(name):
    make = flax_attn.nnx.BLOCKS[name]
    native = getattr(make, "func", make)
    linen = getattr(blocks.BLOCKS[name], "func", blocks.BLOCKS[name])
    assert getattr(flax_attn.nnx, linen.__name__) is native
    assert native is flax_attn.nnx.native(linen) and native.block is linen
    features, rngs, *fields = inspect.signature(native).parameters.values()
    assert features.name == "features" and rngs.name == "rngs"
    expected = inspect.signature(linen).parameters
    assert {f.name: f.default for f in fields} == {
        field: parameter.default
        for field, parameter in expected.items()
        if field not in ("parent", "name")
    }
    assert "Attributes:" in native.__doc__ and ">>>" not in native.__doc__


def test_unknown_blocks():
    with pytest.raises(ValueError, match="`name` must be one of se, "):
        flax_attn.nnx.create("sa", 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`make` must be a subclass"):
        flax_attn.nnx.native(nn.Dense)


class Scaled(blocks.Attention, kw_only=True):
    """A block that the library does not know, with another one inside."""

    gates = {"gate_of": "scale_gate"}
    start: float = 0.5

    @nn.compact
    def __call__(self, x, mask=None):
        return blocks.SE(name="inner")(x, mask) * self.gate_of(x)

    @nn.compact
    def gate_of(self, x):
        init = nn.initializers.constant(self.start)
        gate = self.param("scale", init, x.shape[-1:])
        self.sow("intermediates", "scale_gate", gate)
        return gate.reshape((1,) * (x.ndim - 1) + gate.shape)


def test_a_block_of_your_own():
    block = flax_attn.nnx.native(Scaled)(16, start=2.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block.scale[...], np.full(16, 2.0))
    variables = flax_attn.nnx.to_linen(block)
    expected = jax.jit(Scaled().apply)(variables, X)
    np.testing.assert_allclose(compiled(block, X), expected, rtol=1e-6)
    gates = flax_attn.nnx.attention_maps(block, X)
    assert sorted(gates) == ["inner/channel_gate", "scale_gate"]


def test_inside_a_linen_module():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            make = flax_attn.nnx.SE
            return nnx.bridge.to_linen(make, 16, name="attention")(x)

    variables = jax.jit(Model().init)(jax.random.key(0), X)
    linen = {"params": variables["params"]["attention"]}
    expected = jax.jit(flax_attn.SE().apply)(nn.meta.unbox(linen), X)
    np.testing.assert_allclose(
        jax.jit(Model().apply)(variables, X), expected, rtol=1e-6
    )
