"""Norms inside blocks: their place, the start as the identity, and masks."""

from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import (
    BAM,
    CBAM,
    SE,
    ChannelAttention,
    CoordinateAttention,
    GatherExcite,
    SpatialAttention,
)
from tests.cases import forward_and_gradients, long_unless, normal, variables_for

CHANNELS = 20
# Norms know no implementation, and this one compiles faster.
PLAIN = {"implementation": "plain"}
NORMS = {
    "batch": partial(nn.BatchNorm, use_running_average=False, momentum=0.5),
    "group": partial(nn.GroupNorm, num_groups=1),
}


def test_norms_of_bam():
    """One for each branch, over what each branch has: C values and one."""
    module = BAM(norm=NORMS["batch"], **PLAIN)
    x = normal((4, 5, 4, CHANNELS), 1)

    @jax.jit
    def run(key):
        variables = module.init(key, x)
        return variables, module.apply(variables, x, mutable=["batch_stats"])[1]

    variables, state = run(jax.random.key(0))
    means = {k: v["mean"].shape for k, v in variables["batch_stats"].items()}
    assert means == {"channel_norm": (CHANNELS,), "spatial_norm": (1,)}
    assert all(np.abs(m["mean"]).max() > 0 for m in state["batch_stats"].values())


@pytest.mark.parametrize("block, field", [(CBAM, "spatial_norm"), (BAM, "norm")])
def test_identity_with_a_norm_can_learn(block, field):
    """Zeros before a norm would learn nothing, or all at once."""
    module = block(identity_init=True, **{field: NORMS["batch"]}, **PLAIN)
    x = normal((2, 5, 4, 32), 1)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def run(params):
        def output(params):
            state = variables | {"params": params}
            return module.apply(state, x, mutable=["batch_stats"])[0]

        y, pullback = jax.vjp(output, params)
        return y, *pullback(2 * y)

    y, gradients = run(variables["params"])
    np.testing.assert_array_equal(y, x)
    scales = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if path[-1].key == "scale"
    ]
    assert scales and all(jnp.abs(leaf).max() > 1e-3 for leaf in scales)
    stepped = jax.tree.map(lambda p, g: p - 1e-6 * g, variables["params"], gradients)
    assert 0 < jnp.abs(run(stepped)[0] - x).max() < 0.01


@pytest.mark.parametrize("norm", [nn.RMSNorm, partial(nn.LayerNorm, use_scale=False)])
def test_identity_needs_a_norm_with_a_scale(norm):
    module = SpatialAttention(identity_init=True, norm=norm)
    with pytest.raises(ValueError, match="`norm` of .* must have .* pass a norm"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 2, 4)))
    gather = GatherExcite(
        extent=2, extra_params=True, hidden_norm=norm, identity_init=True
    )
    with pytest.raises(ValueError, match="`hidden_norm` of GatherExcite must have"):
        jax.eval_shape(gather.init, jax.random.key(0), jnp.ones((2, 2, 4)))


def test_a_typo_in_a_norm_is_not_hidden_by_the_start_as_the_identity():
    norm = partial(nn.BatchNorm, use_running_avg=True)
    module = CBAM(identity_init=True, spatial_norm=norm)
    with pytest.raises(TypeError, match="use_running_avg"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 2, 4)))


def test_a_norm_inside_bam_is_of_each_sample():
    module = BAM(reduction=2, hidden_norm=NORMS["group"], **PLAIN)
    x = normal((2, 3, 4, 8), 1) * np.array([1, 9])[:, None, None, None]
    variables = variables_for(module, x)
    expected = [module.apply(variables, sample[None])[0] for sample in x]
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4)


def test_a_norm_between_the_layers():
    """Of either squeeze on its own; the start as the identity is not its business."""
    norm = partial(nn.GroupNorm, num_groups=1, use_fast_variance=False)
    module = ChannelAttention(reduction=2, hidden_norm=norm, **PLAIN)
    start = SE(hidden_norm=NORMS["batch"], identity_init=True, **PLAIN)
    x = normal((2, 3, 4, 8), 1)
    variables = variables_for(module, x)

    @jax.jit
    def run(x):
        first = start.init(jax.random.key(0), x)

        def output(params):
            y, state = start.apply(first | {"params": params}, x, mutable="batch_stats")
            return (y**2).sum(), (y, state)

        gradients, aux = jax.grad(output, has_aux=True)(first["params"])
        return module.apply(variables, x), gradients, *aux

    y, gradients, same, state = run(x)
    params = jax.tree.map(np.float64, variables["params"])

    def logits(s):
        z = s @ params["reduce"]["kernel"]
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
        z = z * params["reduce_norm"]["scale"] + params["reduce_norm"]["bias"]
        return np.maximum(z, 0) @ params["expand"]["kernel"]

    sum_of_both = logits(x.mean((1, 2))) + logits(x.max((1, 2)))
    expected = x * (1 / (1 + np.exp(-sum_of_both)))[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, x)
    assert np.abs(gradients["expand"]["kernel"]).max() > 1e-3
    assert np.abs(state["batch_stats"]["reduce_norm"]["mean"]).max() > 0


# A sample of BAM's channel branch has no spatial axes left to take statistics over.
@pytest.mark.parametrize(
    "block, norm",
    [
        (SpatialAttention, "batch"),
        (SpatialAttention, "group"),
        (BAM, "batch"),
        (ChannelAttention, "batch"),
    ],
)
def test_a_fully_masked_sample_before_a_norm(block, norm):
    x = normal((3, 5, 4, CHANNELS), 1)
    mask = np.ones(x.shape[:-1], bool)
    mask[1] = False
    field = "hidden_norm" if block is ChannelAttention else "norm"
    module = block(**{field: NORMS[norm]}, **PLAIN)
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
    # A batch without a valid position leaves everything finite.
    gradients, (y, state) = run(variables["params"], x, np.zeros_like(mask))
    chex.assert_tree_all_finite((gradients, state))
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("train", [False, True])
def test_masked_statistics_of_the_norm(train):
    x = normal((2, 5, 4, CHANNELS), 1)
    pads = [(0, 0), (0, 2), (0, 3), (0, 0)]
    padded = np.pad(x, pads, constant_values=1e6)
    mask = padded[..., 0] != 1e6
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.5)
    module = CBAM(spatial_norm=norm, **PLAIN)
    variables = dict(variables_for(module, x))
    statistics = {"mean": np.float32([0.25]), "var": np.float32([1.5])}
    variables["batch_stats"] = {"spatial": {"norm": statistics}}
    run = jax.jit(partial(module.apply, mutable=["batch_stats"]))
    y, state = run(variables, x)
    y_padded, state_padded = run(variables, padded, mask)
    np.testing.assert_allclose(y_padded[:, :5, :4], y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state_padded, state, rtol=1e-5, atol=1e-7)


# What a norm reduces: the channels of one position, groups of them over the map, or the
# map of each channel.
WITHIN_A_SAMPLE = {
    "layer": nn.LayerNorm,
    "group": partial(nn.GroupNorm, num_groups=2),
    "instance": nn.InstanceNorm,
}
FIELDS = {
    "se": (partial(SE, reduction=5), "hidden_norm"),
    "bam": (partial(BAM, reduction=5), "hidden_norm"),
    "cbam": (CBAM, "spatial_norm"),
    "coordinate": (partial(CoordinateAttention, hidden_features=4), "hidden_norm"),
    "ge-plus": (partial(GatherExcite, extent=2, extra_params=True), "hidden_norm"),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", FIELDS)
def test_any_batch_axes_before_a_norm(block, masked):
    """None, several, and those of vmap: each map has statistics of its own."""
    make, field = FIELDS[block]
    norm = WITHIN_A_SAMPLE["layer" if block == "se" else "instance"]
    module = make(**{field: norm}, **PLAIN)
    scales = np.array([1, 5, 9], np.float32)[:, None, None, None]
    x = normal((2, 3, 5, 4, CHANNELS), 1) * scales
    mask = np.arange(20).reshape(5, 4) < np.array([20, 11])[:, None, None, None]
    mask = np.broadcast_to(mask, x.shape[:-1])
    variables = variables_for(module, x[0])

    @jax.jit
    def run(x, *mask):
        apply = partial(module.apply, variables)
        rows = [apply(x[i], *(m[i] for m in mask)) for i in range(len(x))]
        return jnp.stack(rows), apply(x, *mask), jax.vmap(jax.vmap(apply))(x, *mask)

    expected, *others = run(x, mask) if masked else run(x)
    for actual in others:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "block, norm",
    [
        pytest.param(block, norm, marks=long_unless(norm == "layer" or block == "bam"))
        for block, norm in product(FIELDS, WITHIN_A_SAMPLE)
        # The spatial map of CBAM has one channel, and SE's squeeze one position.
        if (block, norm) not in [("cbam", "group"), ("se", "instance")]
    ],
)
def test_gradients_of_padded_maps_before_a_norm(block, norm):
    make, field = FIELDS[block]
    module = make(**{field: WITHIN_A_SAMPLE[norm]}, **PLAIN)
    x = normal((2, 5, 4, CHANNELS), 1)
    padded = np.pad(x, [(0, 0), (0, 2), (0, 3), (0, 0)])
    mask = np.arange(7)[:, None] + np.arange(7) // 4 * 9 < 5
    variables = variables_for(module, x)
    y, d_variables, d_x = forward_and_gradients(module, variables, x, x)
    result = forward_and_gradients(module, variables, padded, padded, mask)
    inside = result[0][:, :5, :4], result[1], result[2][:, :5, :4]
    chex.assert_trees_all_close(inside, (y, d_variables, d_x), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(result[2][:, ~mask], 0)
