"""Options of blocks that the laws, which run over defaults, do not reach."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import (
    BAM,
    CoordinateAttention,
    GatherExcite,
    GlobalContext,
    SimAM,
    presets,
    scSE,
)
from tests import references
from tests.cases import normal, variables_for

NORM = partial(nn.BatchNorm, use_running_average=False)
PLUS = partial(GatherExcite, extent=4, extra_params=True)


def test_padding_counts_for_nothing_with_other_options():
    """Nor for a norm inside, which takes its statistics from what is valid."""
    modules = [
        SimAM(ddof=1),
        GlobalContext(fuse="scale", use_bias=True),
        CoordinateAttention(hidden_norm=NORM, use_bias=True),
        GatherExcite(extent=3),
        PLUS(hidden_norm=NORM),
        PLUS(hidden_norm=NORM, use_mlp=True, use_bias=True),
        presets.official_bam(train=True)(),
    ]
    x = normal((3, 9, 6, 32), 1)
    padded = np.pad(x, [(0, 0), (0, 2), (0, 3), (0, 0)], constant_values=np.nan)
    mask = ~np.isnan(padded[..., 0])

    @jax.jit
    def run(x, padded):
        def outputs(module):
            apply = partial(module.apply, variables_for(module, x), mutable=True)
            return apply(x)[0], apply(padded, mask)[0]

        return [outputs(module) for module in modules]

    for module, (y, y_padded) in zip(modules, run(x, padded), strict=True):
        valid = y_padded[:, :9, :6]
        np.testing.assert_allclose(valid, y, atol=1e-5, err_msg=str(module))
        assert np.count_nonzero(y_padded) <= y.size


def test_a_softmax_of_low_logits_ignores_the_padding():
    """There exp(logit - maximum) would be infinite, and so its gradient NaN."""
    x = np.abs(normal((2, 5, 4, 16), 0))
    mask = np.arange(5)[:, None] < np.full(4, 3)
    module = GlobalContext()
    variables = variables_for(module, x)
    variables["params"]["pool"]["kernel"] = np.full((16, 1), -30, np.float32)

    @jax.jit
    def slope(variables):
        return jax.grad(lambda v: (module.apply(v, x, mask) ** 2).sum())(variables)

    assert np.isfinite(slope(variables)["params"]["pool"]["kernel"]).all()


def test_a_product_of_branches_starts_as_the_identity_and_learns():
    module = presets.official_bam(train=True)(identity_init=True)
    x = normal((3, 6, 5, 32), 1)

    @jax.jit
    def run(key):
        variables = module.init(key, x)
        stats = {"batch_stats": variables["batch_stats"]}

        def output(params):
            return module.apply({"params": params, **stats}, x, mutable=True)[0]

        y, pullback = jax.vjp(output, variables["params"])
        return y, pullback(y)[0]

    y, gradients = run(jax.random.key(0))
    np.testing.assert_array_equal(y, x)
    assert np.abs(gradients["expand"]["kernel"]).max() > 0


def test_what_adds_has_no_multiplier():
    init = partial(GlobalContext().init, method="multiplier")
    with pytest.raises(ValueError, match='`fuse` must .*"add".* pass fuse="scale"'):
        jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 4, 4, 16)))


def test_second_derivatives_of_simam():
    """Of the equation as it stands in the paper."""
    x = normal((1, 2, 3, 1), 0)
    block = SimAM(implementation="plain")

    def equation(x):
        mean, variance = (f((1, 2), keepdims=True) for f in (x.mean, x.var))
        logits = (x - mean) ** 2 / (4 * (variance + 1e-4)) + 0.5
        return x * jax.nn.sigmoid(logits)

    def curvature(f):
        return jax.jit(jax.hessian(lambda x: (f(x) ** 3).sum()))(x)

    got, expected = curvature(lambda x: block.apply({}, x)), curvature(equation)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra_params", [False, True])
def test_nan_stays_in_the_regions_that_gather_it(extra_params):
    """One of 4x4 positions, and one channel of two."""
    x = normal((1, 16, 16, 2), 0)
    x[0, 0, 0, 0] = np.nan
    block = GatherExcite(extent=4, extra_params=extra_params)
    y = jax.jit(block.apply)(variables_for(block, x), x)
    expected = np.zeros(x.shape, bool)
    expected[0, :4, :4, 0] = True
    np.testing.assert_array_equal(np.isnan(y), expected)


def test_bam_without_holes():
    x = normal((2, 9, 6, 20), 1)
    module = BAM(dilation=1, reduction=5)
    variables = variables_for(module, x)
    params = jax.tree.map(np.float64, variables["params"])
    expected = references.bam(params, np.float64(x), dilation=1)
    y = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


# Without it, BAM multiplies by one more than its gate, and scSE adds the products.
@pytest.mark.parametrize(
    "make, output",
    [(BAM, lambda x, gate: x * gate), (scSE, lambda x, c, s: (x * c + x * s) / 2)],
    ids=["bam", "scse"],
)
def test_the_gates_of_the_start_as_the_identity(make, output):
    x = normal((2, 5, 4, 20), 1)
    module = make(identity_init=True)
    run = jax.jit(lambda v: module.apply(v, x, mutable=["intermediates"]))
    y, state = run(variables_for(module, x))
    gates = jax.tree.leaves(state["intermediates"])
    np.testing.assert_allclose(y, output(x, *gates), rtol=1e-5)


def test_the_identity_of_large_half_precision_maps():
    """Twice such a map would overflow."""
    x = jnp.full((1, 2, 2, 4), 40000.0, jnp.float16)
    module = scSE(identity_init=True, dtype=jnp.float16)
    y, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)
