"""Every block in NNX computes what its Linen block does, with the same variables."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_attn.nnx
from flax_attn import blocks, convert
from tests.cases import normal, variables_for
from tests.nnx.cases import (
    COTANGENT,
    MASK,
    REPRESENTATIVE,
    X,
    create,
    every_class,
    gradients,
    learned,
    linen_gradients,
    pair,
)

FIELDS = {
    "bfloat16, bias, masked": ({"use_bias": True, "dtype": jnp.bfloat16}, MASK),
    "whole": ({}, None),
    "plain, masked": ({"implementation": "plain"}, MASK),
}
# How fields and masks arrive at Linen does not depend on the block.
CASES = [
    pytest.param(
        name,
        *FIELDS[fields],
        id=f"{name}-{fields}",
        marks=() if i == 0 or name in REPRESENTATIVE else pytest.mark.long,
    )
    for name in blocks.BLOCKS
    for i, fields in enumerate(FIELDS)
]


@pytest.mark.parametrize("name, fields, mask", CASES)
def test_outputs_and_gradients_are_those_of_linen(name, fields, mask):
    block, linen, variables = pair(name, **fields)
    got = nnx.jit(partial(gradients, mask=mask))(block, X, COTANGENT)
    expected = linen_gradients(linen, variables, mask)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    # Two programs: a sum of large terms may be rounded differently.
    for leaf, wanted in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        atol = 1e-6 * max(np.abs(wanted).max(), 1)
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=atol)
    assert all(np.abs(d).max() > 0 for d in jax.tree.leaves(got[1]))


@every_class
@pytest.mark.parametrize("shape", [(3, 7, 16), (2, 3, 4, 5, 16)], ids=["1d", "3d"])
def test_other_numbers_of_spatial_axes(name, shape):
    x = normal(shape, 3)
    block, linen, variables = pair(name, x, spatial_dims=len(shape) - 2)

    @nnx.jit
    def run(block, x):
        return block(x), linen.apply(variables, x)

    y, expected = run(block, x)
    assert (y == expected).all()


@learned
def test_starts_as_the_identity(name):
    @jax.jit
    def start(x):
        rngs = nnx.Rngs(0)
        identity = flax_attn.nnx.create(name, 16, rngs=rngs, identity_init=True)
        return identity(x)

    np.testing.assert_allclose(start(X), X, rtol=1e-6)


@learned
def test_variables_move_without_renaming(name):
    block, _, variables = pair(name)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), variables)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    flax_attn.nnx.from_linen(block, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(flax_attn.nnx.to_linen(block), half)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), half)
    leaves, tree = jax.tree.flatten(variables)
    wider = jax.tree.unflatten(tree, [*leaves[:-1], np.zeros((1, *leaves[-1].shape))])
    with pytest.raises(ValueError, match="`variables` must have the shapes"):
        flax_attn.nnx.from_linen(block, wider)
    with pytest.raises(ValueError, match="got one that .* at params/other"):
        other = {"params": variables["params"] | {"other": leaves[0]}}
        flax_attn.nnx.from_linen(block, other)
    with pytest.raises(ValueError, match="got none at params/"):
        flax_attn.nnx.from_linen(block, {"params": {}})
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), half)


def test_converted_weights_fit():
    linen = flax_attn.presets.timm_cbam(train=False)()
    variables = variables_for(linen, X)
    state = convert.to_torch(variables, naming="timm")
    assert "spatial.conv.bn.running_var" in state
    block = create("cbam", divisor=1, spatial_norm=nnx.BatchNorm)
    flax_attn.nnx.from_linen(block, convert.to_flax(state, naming="timm"))
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), variables)
