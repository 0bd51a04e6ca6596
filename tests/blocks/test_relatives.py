"""BAM and scSE, which share their parts with the other blocks."""

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
    IMPLEMENTATIONS,
    forward_and_gradients,
    normal,
    variables_for,
)

BLOCKS = {
    "bam": (flax_attn.BAM, references.bam),
    "bam-near": (
        partial(flax_attn.BAM, dilation=1, reduction=5),
        partial(references.bam, dilation=1),
    ),
    "scse": (flax_attn.scSE, references.scse),
    "scse-max": (
        partial(flax_attn.scSE, combine="max"),
        partial(references.scse, combine=np.maximum),
    ),
}
blocks = pytest.mark.parametrize("block", BLOCKS)
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@blocks
@both
@pytest.mark.parametrize("shape", [(2, 9, 6, 20), (1, 1, 1)])
def test_against_numpy_in_float64(block, implementation, shape):
    make, reference = BLOCKS[block]
    x, cotangent = normal(shape, 1), normal(shape, 2)
    module = make(implementation=implementation)
    variables = variables_for(module, x)
    y, d_variables, d_x = forward_and_gradients(module, variables, x, cotangent)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables["params"], x))
    np.testing.assert_allclose(y, reference(*exact), rtol=1e-5, atol=1e-5)

    def loss(params, x):
        return np.sum(reference(params, x) * cotangent)

    # Along one random direction of everything at once.
    leaves, tree = jax.tree.flatten(exact)
    direction = tree.unflatten(
        [normal(a.shape, 7 + i).astype(np.float64) for i, a in enumerate(leaves)]
    )
    steps = (1e-6, -1e-6)
    up, down = (
        loss(*jax.tree.map(lambda a, d, e=e: a + e * d, exact, direction))
        for e in steps
    )
    slope = sum(
        np.sum(np.asarray(g, np.float64) * d)
        for g, d in zip(
            jax.tree.leaves((d_variables["params"], d_x)),
            jax.tree.leaves(direction),
            strict=True,
        )
    )
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "block, dims", [("bam", 1), ("bam", 2), ("bam", 3), ("scse", 2), ("scse-max", 3)]
)
def test_a_padded_map_gives_what_the_map_gives(block, dims):
    x = normal((2, *(5, 4, 3)[:dims], 20), 1)
    cotangent = normal(x.shape, 2)
    big = np.pad(x, [(0, 0), *[(0, 3)] * dims, (0, 0)], constant_values=np.nan)
    mask = ~np.isnan(big[..., 0])
    valid = tuple(slice(n) for n in x.shape[:-1])
    module = BLOCKS[block][0](spatial_dims=dims)
    variables = variables_for(module, x)
    y, d_variables, d_x = forward_and_gradients(module, variables, x, cotangent)

    @jax.jit
    def run(variables, big):
        y, pullback = jax.vjp(lambda v, x: module.apply(v, x, mask), variables, big)
        return y, *pullback(jnp.ones_like(y).at[valid].set(cotangent))

    y_big, d_variables_big, d_big = run(variables, big)
    np.testing.assert_allclose(y_big[valid], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y_big[~mask], 0)
    np.testing.assert_allclose(d_big[valid], d_x, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(d_variables_big, d_variables, rtol=1e-4, atol=1e-5)


@blocks
def test_identity_at_the_start(block):
    x = normal((2, 5, 4, 20), 1)
    module = BLOCKS[block][0](reduction=4, identity_init=True, use_bias=True)
    variables = module.init(jax.random.key(0), x)
    run = jax.jit(lambda v: module.apply(v, x))
    np.testing.assert_array_equal(run(variables), x)
    gradients = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2)))(variables)
    last = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(gradients)
        if path[-2].key in ("expand", "spatial_expand", "spatial")
    ]
    assert len(last) == 4 and all(jnp.abs(leaf).max() > 0 for leaf in last)


def test_the_identity_of_large_half_precision_maps():
    x = jnp.full((1, 2, 2, 4), 40000.0, jnp.float16)
    module = flax_attn.scSE(reduction=2, identity_init=True, dtype=jnp.float16)
    y, _ = module.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("identity_init", [False, True])
def test_sown_gates_multiply_back_to_the_output(identity_init):
    x = normal((2, 5, 4, 20), 1)
    sown = []
    for make in (flax_attn.BAM, flax_attn.scSE):
        module = make(identity_init=identity_init)
        variables = variables_for(module, x)
        y, state = module.apply(variables, x, mutable=["intermediates"])
        sown.append((y, state["intermediates"]))
    (y, gates), (z, two) = sown
    gate = gates["element_gate"][0]
    np.testing.assert_array_equal(x * (gate if identity_init else 1 + gate), y)
    total = x * two["channel"]["channel_gate"][0] + x * two["spatial_gate"][0]
    np.testing.assert_array_equal(total / 2 if identity_init else total, z)


def test_norms_of_bam():
    """One for each branch, over what each branch has: C values and one."""
    norm = partial(nn.BatchNorm, use_running_average=False)
    module = flax_attn.BAM(norm=norm)
    x = normal((4, 5, 4, 20), 1)
    variables = module.init(jax.random.key(0), x)
    means = {k: v["mean"].shape for k, v in variables["batch_stats"].items()}
    assert means == {"channel_norm": (20,), "spatial_norm": (1,)}
    _, state = module.apply(variables, x, mutable=["batch_stats"])
    assert all(np.abs(m["mean"]).max() > 0 for m in state["batch_stats"].values())


def test_parameter_counts_of_the_papers():
    """BAM: C/r (2 C + 9 C/r 2 + 2) and biases; scSE: C^2 + C."""
    x = jnp.ones((1, 8, 8, 64))
    counts = {}
    for make in (flax_attn.BAM, flax_attn.scSE):
        shapes = jax.eval_shape(make().init, jax.random.key(0), x)
        counts[make] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    c, h = 64, 4
    weights = c * h + h * c + c * h + 9 * h * h + 9 * h * h + h
    assert counts[flax_attn.BAM] == weights + (h + c + h + h + h + 1)
    assert counts[flax_attn.scSE] == c * c // 2 * 2 + c


@pytest.mark.parametrize(
    "module, message",
    [
        (flax_attn.BAM(dilation=0), "`dilation` must be an integer of at least 1"),
        (flax_attn.BAM(reduction=0), "`reduction` must be an integer of at least 1"),
        (flax_attn.scSE(combine="mul"), '`combine` must be "add" or "max"'),
    ],
)
def test_bad_fields(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.ones((2, 3, 4)))


@blocks
def test_half_precision(block):
    x = normal((2, 5, 4, 20), 1)
    module = BLOCKS[block][0]()
    variables = variables_for(module, x)
    y = BLOCKS[block][0](dtype=jnp.bfloat16).apply(variables, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(np.float32), module.apply(variables, x), rtol=0.05, atol=0.05
    )
