"""Norms inside the blocks of NNX: modes, statistics, starts, and what is refused."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_attn.nnx
from flax_attn import blocks
from tests.cases import variables_for
from tests.nnx.cases import MASK, X, compiled, create, representative

NORM_FIELDS = ("spatial_norm", "norm", "hidden_norm")


def norm_field(name):
    block = blocks.BLOCKS[name]()
    return next((field for field in NORM_FIELDS if hasattr(block, field)), None)


# One of each class, under its first name. Without `extra_params` there is nothing that
# `ge` would normalize.
WITH_NORM = {
    type(make()): name
    for name, make in reversed(blocks.BLOCKS.items())
    if norm_field(name) and name != "ge"
}.values()
with_norm = pytest.mark.parametrize("name", representative(WITH_NORM))
# Only a norm that makes the logits starts at zero.
with_last_norm = pytest.mark.parametrize(
    "name", [name for name in WITH_NORM if norm_field(name) != "hidden_norm"]
)


@with_norm
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_batch_norm_follows_the_mode(name, mask):
    field = norm_field(name)
    norm = partial(nn.BatchNorm, momentum=0.9)
    train, evaluate = (
        blocks.BLOCKS[name](**{field: partial(norm, use_running_average=mode)})
        for mode in (False, True)
    )
    block = create(name, **{field: partial(nnx.BatchNorm, momentum=0.9)})
    variables = jax.eval_shape(train.init, jax.random.key(0), X)
    new = flax_attn.nnx.to_linen(block)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    start = {"mean": 0, "var": 1}
    for path, value in jax.tree_util.tree_leaves_with_path(new["batch_stats"]):
        np.testing.assert_array_equal(value, start[path[-1].key])
    variables = new | {"params": variables_for(train, X)["params"]}
    flax_attn.nnx.from_linen(block, variables)

    @jax.jit
    def expected(variables):
        y, updates = train.apply(variables, X, mask, mutable=["batch_stats"])
        return y, updates, evaluate.apply(variables | updates, X, mask)

    y, updates, evaluated = expected(variables)
    run = nnx.jit(lambda block, x: block(x, mask))
    block.train()
    np.testing.assert_allclose(run(block, X), y, rtol=1e-4, atol=1e-5)
    new = flax_attn.nnx.to_linen(block)
    chex.assert_trees_all_close(
        new["batch_stats"], updates["batch_stats"], rtol=1e-6, atol=1e-6
    )
    changes = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), new["batch_stats"], variables["batch_stats"]
    )
    assert all(change > 0 for change in jax.tree.leaves(changes))

    block.eval()
    np.testing.assert_allclose(run(block, X), evaluated, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(flax_attn.nnx.to_linen(block), new)


@with_norm
def test_a_norm_of_each_sample_is_that_of_linen(name):
    field = norm_field(name)
    linen = blocks.BLOCKS[name](**{field: nn.LayerNorm})
    block = create(name, **{field: nnx.LayerNorm})
    variables = variables_for(linen, X)
    flax_attn.nnx.from_linen(block, variables)
    expected = jax.jit(linen.apply)(variables, X, MASK)
    np.testing.assert_allclose(compiled(block, X, MASK), expected, rtol=1e-5, atol=1e-6)


@with_last_norm
def test_a_norm_that_starts_as_the_identity(name):
    def make(**fields):
        return flax_attn.nnx.create(
            name, 16, rngs=nnx.Rngs(0), identity_init=True, **fields
        )

    field = norm_field(name)
    y = nnx.jit(lambda x: make(**{field: nnx.BatchNorm})(x))(X)
    np.testing.assert_allclose(y, X, rtol=1e-6)
    for norm in (partial(nnx.BatchNorm, use_scale=False), nnx.RMSNorm):
        with pytest.raises(ValueError, match="`identity_init` .* got .*nnx"):
            make(**{field: norm})


@with_norm
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm, partial(nn.BatchNorm, momentum=0.9), nn.LayerNorm(), "batch"],
    ids=["linen", "partial", "made", "name"],
)
def test_a_norm_of_linen_is_refused(name, norm):
    field = norm_field(name)
    with pytest.raises(ValueError, match=f"`{field}` must make an NNX module"):
        flax_attn.nnx.create(name, 16, rngs=nnx.Rngs(0), **{field: norm})


def test_a_norm_without_a_scale_is_named_by_its_field():
    norm = partial(nnx.LayerNorm, use_scale=False)
    options = {"extra_params": True, "hidden_norm": norm, "identity_init": True}
    with pytest.raises(ValueError, match="`hidden_norm` of GatherExcite must have"):
        flax_attn.nnx.GatherExcite(8, extent=2, **options, rngs=nnx.Rngs(0))
