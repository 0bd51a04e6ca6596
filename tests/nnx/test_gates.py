"""The gates of blocks in NNX: only where somebody asks, and those of Linen."""

import jax
import numpy as np
import pytest
from flax import nnx

import flax_attn.nnx
from tests.nnx.cases import MASK, X, compiled, every_block, every_class, pair


@every_block
def test_the_maps_are_those_of_linen(name):
    block, linen, variables = pair(name)
    maps = flax_attn.inspect.attention_maps

    @nnx.jit
    def run(block, x):
        return flax_attn.nnx.attention_maps(block, x, MASK), maps(
            linen, variables, x, MASK
        )

    got, expected = run(block, X)
    assert got.keys() == expected.keys()
    assert all((got[path] == expected[path]).all() for path in expected)


@every_class
def test_nothing_is_kept_unless_asked_for(name):
    block, *_ = pair(name)
    before = nnx.split(block)[0]
    flax_attn.nnx.attention_maps(block, X)
    compiled(block, X)
    assert not nnx.to_flat_state(nnx.state(block, nnx.Intermediate))
    assert nnx.split(block)[0] == before


@every_class
@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="Flax before 0.12")
def test_capture(name):
    block, linen, variables = pair(name)
    expected = flax_attn.inspect.attention_maps(linen, variables, X)
    # The block itself as the function, or one that calls it, under jit.
    _, state = nnx.capture(block, nnx.Intermediate)(X)
    gates = jax.tree.leaves(nnx.to_pure_dict(state))
    assert len(gates) == len(expected)
    shapes = sorted(gate.shape for gate in expected.values())
    assert sorted(gate.shape for gate in gates) == shapes
    jitted = nnx.jit(nnx.capture(lambda block, x: block(x), nnx.Intermediate))
    y, state = jitted(block, X)
    np.testing.assert_allclose(y, linen.apply(variables, X), rtol=1e-5, atol=1e-6)
    for a, b in zip(gates, jax.tree.leaves(nnx.to_pure_dict(state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@every_class
@pytest.mark.skipif(hasattr(nnx, "capture"), reason="Flax has nnx.capture")
def test_sown_by_a_mode(name):
    block, linen, variables = pair(name)
    expected = flax_attn.inspect.attention_maps(linen, variables, X)
    block.set_attributes(sow_gates=True)
    compiled(block, X)
    gates = nnx.to_flat_state(nnx.pop(block, nnx.Intermediate))
    assert {"/".join(path) for path, _ in gates} == expected.keys()
    assert not nnx.to_flat_state(nnx.state(block, nnx.Intermediate))


def test_no_gates():
    with pytest.raises(ValueError, match="`model` must call .* got no gate from Conv"):
        flax_attn.nnx.attention_maps(nnx.Conv(16, 4, (1, 1), rngs=nnx.Rngs(0)), X)
