"""Masks: what a padded map gives is what the map gives, whatever the padding."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import checkify

from flax_attn.blocks import BLOCKS
from tests.cases import (
    assert_alike,
    assert_exact,
    blocks,
    each_block,
    fast_and_plain,
    long_unless,
    normal,
    variables_for,
)
from tests.compilation import jit_as_users_do

SIZES = {1: (9,), 2: (5, 4), 3: (3, 5, 4)}
CHANNELS = 20


@pytest.mark.parametrize("block", ["ge-plus", "ge"])
def test_no_index_is_out_of_bounds(block):
    """A sample without a valid position has no position to count from."""
    module = partial(BLOCKS[block], extent=4 if block == "ge-plus" else 3)()
    x = normal((2, 5, 4, 8), 0)
    mask = np.ones(x.shape[:-1], bool)
    mask[1] = False
    variables = variables_for(module, x)
    run = checkify.checkify(jax.jit(module.apply), errors=checkify.index_checks)
    error, _ = run(variables, x, mask)
    error.throw()


@pytest.mark.parametrize(
    "dims, block",
    [
        # In 1-D and 3-D, each a quarter of the blocks without the long tests.
        pytest.param(dims, block, marks=long_unless(dims == 2 or (dims + i) % 4 == 0))
        for dims in SIZES
        for i, block in enumerate(BLOCKS)
    ],
)
def test_padding_counts_for_nothing(block, dims):
    """NaN, which poisons all that it touches; a third row is nothing but padding."""
    x = normal((2, *SIZES[dims], CHANNELS), 1)
    pads = [(0, 1), *[(1 + i, 2 + i) for i in range(dims)], (0, 0)]
    padded = np.pad(x, pads, constant_values=np.nan)
    mask = ~np.isnan(padded[..., 0])
    valid = tuple(
        slice(before, before + n)
        for (before, _), n in zip(pads, x.shape[:-1], strict=False)
    )
    cotangent = normal(padded.shape, 2)  # Not zero outside: no output there has inputs.
    make = partial(BLOCKS[block], spatial_dims=dims, use_bias=True)
    variables = variables_for(make(), x)
    # What the compiler's optimizations do shows in maps.
    run = fast_and_plain(make, jit_as_users_do if dims == 2 else jax.jit)
    results = run(variables, padded, cotangent, mask)
    assert_alike(results)
    y, d_variables, d_x = results["fast"]
    np.testing.assert_array_equal(y[~mask], 0)
    np.testing.assert_array_equal(d_x[~mask], 0)
    result = y[valid], d_variables, d_x[valid]
    assert_exact(block, variables, x, cotangent[valid], result, dims)


@each_block(long=[name for name in BLOCKS if name not in ("gc", "cbam")])
def test_masks_compute_no_infinity_and_no_nan(block):
    """As the debug flags see it, operation by operation; a sample has nothing valid."""
    x = normal((2, 5, 6, CHANNELS), 1)
    mask = np.zeros(x.shape[:-1], bool)
    mask[0, :3, 1:5] = True
    module = BLOCKS[block]()
    variables = variables_for(module, x)
    with jax.debug_infs(True), jax.debug_nans(True):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, x)
        pullback(y)


def test_one_mask_for_the_whole_batch():
    x = normal((2, 5, 4, CHANNELS), 1)
    module = BLOCKS["cbam"]()
    run = jax.jit(partial(module.apply, variables_for(module, x)))
    everywhere = np.ones((5, 4), bool)
    np.testing.assert_allclose(run(x, everywhere), run(x), rtol=1e-6, atol=1e-6)
    part = (np.arange(20) < 7).reshape(1, 5, 4)
    for_each = np.broadcast_to(part, x.shape[:-1])
    np.testing.assert_allclose(run(x, part), run(x, for_each), rtol=1e-6, atol=1e-6)
    assert np.abs(run(x, part) - run(x)).max() > 0.1


@blocks
@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((2, 5, 4)), "`mask` must be boolean"),
        (np.ones((2, 5, 4, CHANNELS), bool), "drop the last axis"),
        (np.ones((2, 5, 5), bool), "pad it as `x` is padded"),
    ],
)
def test_bad_masks(block, mask, message):
    x = np.ones((2, 5, 4, CHANNELS), np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(BLOCKS[block]().init, jax.random.key(0), x, mask)
