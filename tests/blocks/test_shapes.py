"""Signals, volumes and padded batches: `spatial_dims` and `mask`."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests import references
from tests.cases import (
    BLOCKS,
    IMPLEMENTATIONS,
    REFERENCES,
    forward_and_gradients,
    normal,
    variables_for,
)

SIZES = {1: (9,), 2: (5, 4), 3: (3, 5, 4)}
CHANNELS = 20
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def reference(block, dims):
    """What squeezes all positions does not mind how many axes they lie on."""

    def channel(function, params, x):
        flat = x.reshape(*x.shape[: -1 - dims], 1, -1, x.shape[-1])
        return function(params, flat).reshape(x.shape)

    if block == "spatial":
        return references.spatial
    if block == "cbam":
        return lambda params, x: references.spatial(
            params["spatial"], channel(references.channel, params["channel"], x)
        )
    return partial(channel, REFERENCES[block])


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("block", ["eca", "spatial", "cbam"])
def test_signals_and_volumes(block, dims):
    x = normal((2, *SIZES[dims], CHANNELS), 1)
    cotangent = normal(x.shape, 2)
    make = partial(BLOCKS[block], spatial_dims=dims)
    variables = variables_for(make(), x)
    runs = [
        forward_and_gradients(make(implementation=i), variables, x, cotangent)
        for i in IMPLEMENTATIONS
    ]
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, x))
    expected = reference(block, dims)(exact[0]["params"], exact[1])
    for y, *_ in runs:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(*runs, rtol=1e-5, atol=1e-5)


def test_one_axis_and_no_batch():
    x = normal((6, CHANNELS), 1)
    module = flax_attn.CBAM(spatial_dims=1)
    variables = variables_for(module, x)
    batched = module.apply(variables, x[None])[0]
    y, pullback = jax.vjp(lambda x: module.apply(variables, x), x)
    np.testing.assert_allclose(y, batched, rtol=1e-6, atol=1e-6)
    chex.assert_tree_all_finite(pullback(y))


@pytest.mark.parametrize("dims", [1, 3])
def test_gates_have_the_shape_of_their_axes(dims):
    x = normal((2, *SIZES[dims], CHANNELS), 1)
    module = flax_attn.CBAM(spatial_dims=dims)
    y, state = module.apply(variables_for(module, x), x, mutable=["intermediates"])
    sown = state["intermediates"]
    channel, spatial = (sown[k][f"{k}_gate"][0] for k in ("channel", "spatial"))
    assert channel.shape == (2, *(1,) * dims, CHANNELS)
    assert spatial.shape == (2, *SIZES[dims], 1)
    np.testing.assert_array_equal(x * channel * spatial, y)


def test_half_precision_volumes_sum_in_float32():
    """Forty-nine slices of ones: half precision would stop counting."""
    maps = jnp.ones((49, 1, 1, 1), jnp.bfloat16)
    kernel = jnp.full((49, 1, 1, 1, 1), 10 + 1 / 16, jnp.bfloat16)
    y = flax_attn.functional.conv_spatial(maps, kernel)
    expected = 49 * float(kernel[0, 0, 0, 0, 0])
    assert y.dtype == jnp.bfloat16
    # The middle slice alone sees all of the kernel.
    assert abs(float(y[24, 0, 0, 0]) - expected) < expected / 256


def test_channels_first_of_signals_and_volumes():
    for dims in (1, 3):
        x = normal((2, *SIZES[dims], CHANNELS), 1)
        last = flax_attn.SE(spatial_dims=dims)
        first = flax_attn.ChannelsFirst(last, spatial_dims=dims)
        variables = variables_for(last, x)
        y = first.apply(variables, np.moveaxis(x, -1, 1))
        np.testing.assert_array_equal(
            np.moveaxis(y, 1, -1), last.apply(variables, x), strict=False
        )


@pytest.mark.parametrize(
    "module, shape, message",
    [
        (flax_attn.SE(spatial_dims=4), (2, 3, 4), "`spatial_dims` must be 1, 2 or 3"),
        (flax_attn.CBAM(spatial_dims=3), (2, 3, 4), r"4 axes \(..., D, H, W, C\)"),
        (flax_attn.SpatialAttention(spatial_dims=1), (4,), r"2 axes \(..., L, C\)"),
        (
            flax_attn.ChannelsFirst(flax_attn.SE(), spatial_dims=0),
            (2, 3, 4),
            "`spatial_dims` must be an integer of at least 1",
        ),
    ],
)
def test_bad_numbers_of_axes(module, shape, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.ones(shape))


def padded(x, dims, value):
    """``x`` in a larger map, and where it is."""
    pads = [(0, 0), *[(0, 2 + i) for i in range(dims)], (0, 0)]
    big = np.pad(x, pads, constant_values=value)
    mask = np.zeros(big.shape[:-1], bool)
    valid = tuple(slice(n) for n in x.shape[:-1])
    mask[valid] = True
    return big, mask, valid


@pytest.mark.parametrize(
    "block, dims, implementation",
    [
        *((block, 2, "fast") for block in ("se-max", "channel-conv", "cbam")),
        *((block, 2, "plain") for block in ("eca", "spatial", "cbam")),
        ("cbam", 1, "fast"),
        ("cbam", 3, "plain"),
    ],
)
def test_a_padded_map_gives_what_the_map_gives(block, dims, implementation):
    """Whatever stands in the padding: here what poisons all that it touches."""
    x = normal((2, *SIZES[dims], CHANNELS), 1)
    cotangent = normal(x.shape, 2)
    big, mask, valid = padded(x, dims, np.nan)
    module = BLOCKS[block](spatial_dims=dims, implementation=implementation)
    variables = variables_for(module, x)
    y, d_variables, d_x = forward_and_gradients(module, variables, x, cotangent)

    @jax.jit
    def run(variables, big, mask):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, big)
        # Not zero outside: what comes out there depends on nothing.
        return y, *pullback(jnp.ones_like(y).at[valid].set(cotangent))

    y_big, d_variables_big, d_big = run(variables, big, mask)
    np.testing.assert_allclose(y_big[valid], y, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(d_variables_big, d_variables, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_big[valid], d_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y_big[~mask], 0)
    np.testing.assert_array_equal(d_big[~mask], 0)


@both
def test_a_row_of_nothing(implementation):
    """An image that is all padding: zeros, and no influence on anything."""
    x = normal((2, 5, 4, CHANNELS), 1)
    mask = np.ones(x.shape[:-1], bool)
    mask[1] = False
    module = flax_attn.CBAM(use_bias=True, implementation=implementation)
    variables = variables_for(module, x)

    def loss(variables, x, mask):
        return jnp.sum(module.apply(variables, x, mask) ** 2)

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    gradients, alone = run(variables, x, mask), run(variables, x[:1], mask[:1])
    chex.assert_trees_all_close(gradients[0], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gradients[1][1], 0)
    np.testing.assert_array_equal(module.apply(variables, x, mask)[1], 0)


NORMS = {
    "batch": partial(nn.BatchNorm, use_running_average=False, momentum=0.5),
    "group": partial(nn.GroupNorm, num_groups=1),
}
# A row of BAM's channel branch has no spatial axes left to take statistics over.
NORMED = [
    (flax_attn.SpatialAttention, "batch"),
    (flax_attn.SpatialAttention, "group"),
    (flax_attn.BAM, "batch"),
]


@pytest.mark.parametrize("block, norm", NORMED)
def test_a_row_of_nothing_before_a_norm(block, norm):
    x = normal((3, 5, 4, CHANNELS), 1)
    mask = np.ones(x.shape[:-1], bool)
    mask[1] = False
    module = block(norm=NORMS[norm])
    variables = variables_for(module, x)

    def loss(params, x, mask):
        y, state = module.apply(
            variables | {"params": params}, x, mask, mutable=["batch_stats"]
        )
        return jnp.sum(y**2), (y, state)

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradients, (y, state) = run(variables["params"], x, mask)
    alone, (expected, kept) = run(variables["params"], x[::2], mask[::2])
    chex.assert_trees_all_close(gradients, alone, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, kept, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[::2], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y[1], 0)
    # A batch of nothing leaves everything finite.
    gradients, (y, state) = run(variables["params"], x, np.zeros_like(mask))
    chex.assert_tree_all_finite((gradients, state))
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("train", [False, True])
def test_masked_statistics_of_the_norm(train):
    x = normal((2, 5, 4, CHANNELS), 1)
    big, mask, valid = padded(x, 2, 1e6)
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.5)
    module = flax_attn.CBAM(spatial_norm=norm)
    variables = module.init(jax.random.key(0), x)
    y, state = module.apply(variables, x, mutable=["batch_stats"])
    y_big, state_big = module.apply(variables, big, mask, mutable=["batch_stats"])
    np.testing.assert_allclose(y_big[valid], y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state_big, state, rtol=1e-5, atol=1e-7)


def test_a_new_mask_compiles_nothing():
    x, traces = normal((2, 5, 4, CHANNELS), 1), []
    module = flax_attn.CBAM()
    variables = variables_for(module, x)

    @jax.jit
    def run(x, mask):
        traces.append(1)
        return module.apply(variables, x, mask)

    masks = [np.arange(20).reshape(1, 5, 4) < n for n in (20, 7)]
    full, part = (run(x, mask) for mask in masks)
    assert len(traces) == 1
    np.testing.assert_allclose(full, module.apply(variables, x), rtol=1e-6, atol=1e-6)
    assert np.abs(full - part).max() > 0.1


def test_half_precision_counts_valid_elements_exactly():
    """257 ones: bfloat16 has no such number."""
    x = jnp.ones((1, 20, 20, 4), jnp.bfloat16)
    mask = (jnp.arange(400) < 257).reshape(1, 20, 20, 1)
    mean = flax_attn.functional.squeeze_spatial(
        flax_attn.functional.apply_mask(x, mask), mask=mask
    )
    np.testing.assert_allclose(mean, np.ones((1, 1, 1, 4)), rtol=1e-6)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((2, 5, 4)), "`mask` must be boolean"),
        (np.ones((2, 5, 4, CHANNELS), bool), "drop the last axis"),
        (np.ones((2, 5, 5), bool), "pad it as `x` is padded"),
    ],
)
@pytest.mark.parametrize("block", ["se", "spatial", "cbam"])
def test_bad_masks(block, mask, message):
    x = jnp.ones((2, 5, 4, CHANNELS))
    with pytest.raises(ValueError, match=message):
        BLOCKS[block]().init(jax.random.key(0), x, mask)
