import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import eca_kernel_size, functional
from tests.cases import IMPLEMENTATIONS, normal
from tests.compilation import jit_as_users_do

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize(
    "shape", [(8,), (), (1, 1, 1, 8), (1, 5, 1, 1), (2, 5, 1, 8), (2, 1, 1, 1)], ids=str
)
def test_a_gate_of_any_shape_that_broadcasts(shape):
    x, gate = normal((2, 5, 4, 8), 0), normal((2, 5, 4, 8), 1)
    gate = gate[tuple(slice(n) for n in shape) if len(shape) == 4 else (0, 0, 0)]
    gate = gate if shape else gate[0]

    def run(implementation):
        def product(x, gate):
            return functional.scale(x, gate, implementation=implementation)

        with jax.numpy_rank_promotion("allow"):
            y, pullback = jax.vjp(product, x, gate)
            return y, *pullback(jnp.cos(y))

    for actual, expected in zip(run("fast"), run("plain"), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@both
def test_numpy_arrays_become_arrays_of_jax(implementation):
    x, gate = normal((1, 3, 4, 8), 0), normal((1, 1, 1, 8), 1)
    kernel = normal((3, 3, 8, 1), 2)
    options = {"implementation": implementation}
    results = (
        functional.apply_mask(x, x > 0),
        functional.squeeze_spatial(x, **options),
        functional.squeeze_spatial(x, pool="max", mask=x[..., :1] > 0, **options),
        functional.squeeze_spatial_by_both(x, **options),
        functional.squeeze_channels(x, **options),
        functional.scale(x, gate, **options),
        functional.scale(x, x, **options),
        functional.scale_and_squeeze(x, gate, **options),
        functional.larger(x, x),
        functional.conv_spatial(x, kernel, **options),
        functional.conv_channels(x, kernel[:, :1, :1, 0], **options),
    )
    for leaf in jax.tree.leaves(results):
        assert isinstance(leaf, jax.Array)


def test_eca_kernel_size_is_the_rule_for_every_count():
    # With gamma 2 and b 1 the rule needs the integer part of log2(C) only:
    # int((log2(C) + 1) / 2) = (floor(log2(C)) + 1) // 2, in integers.
    for features in range(1, 2**20 + 1):
        t = features.bit_length() // 2
        if eca_kernel_size(features) != t + 1 - t % 2:
            pytest.fail(f"wrong at {features}")


@pytest.mark.parametrize("gamma, b", [(1, 0), (3, 1), (2, -9), (-2, 1), (0.5, 2.5)])
def test_eca_kernel_size_at_powers_of_two(gamma, b):
    for n in range(21):
        t = math.floor(abs((n + Fraction(b)) / Fraction(gamma)))
        assert eca_kernel_size(2**n, gamma=gamma, b=b) == t + 1 - t % 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"features": 0}, "`features` must be an integer of at least 1, got 0"),
        ({"features": 2.0}, "`features` must be an integer of at least 1, got 2.0"),
        ({"features": 8, "gamma": 0}, "`gamma` must not be 0"),
        ({"features": 8, "b": math.nan}, "`b` must be a finite number, got nan"),
        ({"features": 8, "gamma": "2"}, "`gamma` must be a finite number, got '2'"),
    ],
)
def test_eca_kernel_size_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        eca_kernel_size(**arguments)


@both
@pytest.mark.parametrize("dtype, value", [("float16", 300), ("bfloat16", 1.01)])
def test_means_accumulate_in_float32(dtype, value, implementation):
    x = jnp.full((40, 40, 300), value, dtype)
    kwargs = {"implementation": implementation}
    spatial = jit_as_users_do(
        partial(functional.squeeze_spatial, pool="avg", **kwargs)
    )(x)
    channels = jit_as_users_do(partial(functional.squeeze_channels, **kwargs))(x)
    assert spatial.dtype == channels.dtype == jnp.float32
    expected = float(x[0, 0, 0])
    np.testing.assert_allclose(spatial, expected, rtol=1e-5)
    np.testing.assert_allclose(channels, expected, rtol=1e-5)


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_of_equals_takes_the_gradient(dtype, implementation):
    # Channel 0: one maximum; channel 1: three; channel 2: constant; channel 3: zeros
    # after a ReLU.
    x = np.zeros((3, 4, 4), np.float32)
    x[1, 2, 0] = 5
    x[:, 1, 1] = 2
    x[..., 2] = -1
    x = jnp.asarray(x, dtype)

    def peak(x):
        return functional.squeeze_spatial(
            x, pool="max", implementation=implementation
        ).sum()

    for grad in (jax.grad(peak), jit_as_users_do(jax.grad(peak))):
        g = np.asarray(grad(x), np.float32)
        np.testing.assert_array_equal(g[..., 0], np.eye(12)[6].reshape(3, 4))
        np.testing.assert_array_equal(g[..., 1], np.eye(12)[1].reshape(3, 4))
        for c in (2, 3):
            np.testing.assert_array_equal(g[..., c], np.eye(12)[0].reshape(3, 4))


@both
def test_ties_over_channels(implementation):
    x = jnp.array([[[1.0, 3.0, 3.0, 0.0]], [[2.0, 2.0, 2.0, 2.0]]])

    def peak(x):
        return functional.squeeze_channels(x, implementation=implementation)[..., 0]

    g = jax.grad(lambda x: peak(x).sum())(x)
    np.testing.assert_array_equal(g, [[[0, 1, 0, 0]], [[1, 0, 0, 0]]])


@both
def test_a_tie_that_the_gate_makes(implementation):
    # 2 * 3 and 3 * 2 tie only once they are scaled.
    x = jnp.array([[[2.0, 3.0, 1.0]]])
    gate = jnp.array([[[3.0, 2.0, 1.0]]])

    def peak(x, gate):
        _, maps = functional.scale_and_squeeze(x, gate, implementation=implementation)
        return maps[..., 0].sum()

    d_x, d_gate = jax.grad(peak, (0, 1))(x, gate)
    np.testing.assert_array_equal(d_x, [[[3.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(d_gate, [[[2.0, 0.0, 0.0]]])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("h, w, c", [(1, 1, 1), (7, 7, 3), (4, 4, 8), (5, 9, 70)])
def test_squeezes_with_an_older_jax_too(monkeypatch, fast, dtype, h, w, c):
    # Maxima are cut into slices there, which overlap where they do not divide H * W or
    # C. Means are products, as they are of large samples with a newer jax.
    from flax_attn.functional import _sums

    monkeypatch.setattr(_sums, "FAST_REDUCTIONS", fast)
    x = jnp.asarray(normal((2, 2, h, w, c), 0), dtype).at[1, 0, -1, -1, -1].set(9)
    expected = np.asarray(x, np.float32)
    over_space = jit_as_users_do(partial(functional.squeeze_spatial, pool="max"))(x)
    over_space = np.asarray(over_space, np.float32)
    np.testing.assert_array_equal(over_space, expected.max((-3, -2), keepdims=True))
    over_channels = jit_as_users_do(functional.squeeze_channels)(x)[..., 0]
    over_channels = np.asarray(over_channels, np.float32)
    np.testing.assert_array_equal(over_channels, expected.max(-1))
    means = jit_as_users_do(partial(functional.squeeze_spatial, pool="avg"))(x)
    expected = expected.astype(np.float64).mean((-3, -2), keepdims=True)
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_maximum_alone():
    # A program without the value itself did not compile with jax 0.12.0.1. Channels of
    # a pixel that holds NaN have their first NaN for a maximum.
    x = normal((2, 5, 9, 70), 0)
    x[1, 2, 3, 4:6] = np.nan
    grad = jit_as_users_do(
        jax.grad(lambda x: functional.squeeze_channels(x)[..., 0].sum())
    )
    # `argmax` of NumPy finds the first NaN too.
    np.testing.assert_array_equal(grad(x), np.eye(70)[x.argmax(-1)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_squeezes_of_other_platforms(dtype):
    """The reductions of GPUs and TPUs, run here: ties, NaN, infinities, gates."""
    from flax_attn.functional import _maxima, _sums

    x = np.round(4 * normal((2, 3, 5, 7), 0)) / 4
    x[0, 1, 2, 3:5] = np.nan
    x[1, 0, 0], x[1, 0, 1] = -np.inf, np.inf
    x = jnp.asarray(x, dtype)
    gate = jnp.asarray(np.round(4 * normal((2, 1, 1, 7), 1)) / 4 + 8, dtype)
    cases = [
        (_sums.itself, _sums.SPATIAL, (x,)),
        (_sums.itself, _sums.CHANNEL, (x,)),
        (_sums.product, _sums.CHANNEL, (x, gate)),
    ]

    @jit_as_users_do
    def run(cases_maps):
        return [
            squeeze(f, axes, with_index, *maps)
            for (f, axes, _), maps in zip(cases, cases_maps, strict=True)
            for with_index in (False, True)
            for squeeze in (
                _maxima.squeezes_by_reduction,
                _maxima.squeezes_on_gpu,
            )
        ]

    results = iter(run([maps for _, _, maps in cases]))
    for _, axes, maps in cases:
        y = np.prod([np.float32(m) for m in np.broadcast_arrays(*maps)], axis=0)
        flat = np.moveaxis(y, -1, 1).reshape(2, 7, 15) if len(axes) == 2 else y
        with np.errstate(invalid="ignore"):  # Both infinities in one sum.
            expected = flat.sum(-1)
        for with_index in (False, False, True, True):
            total, m, *index = (np.squeeze(r) for r in next(results))
            np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-5)
            np.testing.assert_array_equal(m, flat.max(-1))
            assert len(index) == with_index
            if with_index:
                np.testing.assert_array_equal(index[0], flat.argmax(-1))


def test_a_lost_maximum_is_seen():
    # An index that no element has must not pass for a gradient of zero.
    from flax_attn.functional import _reductions

    x, index = jnp.ones((2, 2, 1)), jnp.full((1, 1, 1), 4)
    cotangents = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))
    (g,) = _reductions._mean_and_maximum_bwd(
        _reductions.SPATIAL, (x, index), cotangents
    )
    assert jnp.isnan(g).any()


def test_half_precision_counts_valid_elements_exactly():
    """257 ones: bfloat16 has no such number."""
    x = jnp.ones((1, 20, 20, 4), jnp.bfloat16)
    mask = (jnp.arange(400) < 257).reshape(1, 20, 20, 1)
    mean = functional.squeeze_spatial(functional.apply_mask(x, mask), mask=mask)
    np.testing.assert_allclose(mean, np.ones((1, 1, 1, 4)), rtol=1e-6)


@both
def test_nan_is_the_largest(implementation):
    """In inference too, where XLA's CPU backend may lose it."""
    x = normal((2, 16, 16, 64), 0)
    x[1, 3, 4, 5] = np.nan
    gate = jnp.ones((2, 1, 1, 64))

    @jit_as_users_do
    def squeezed(x):
        run = {"implementation": implementation}
        return (
            functional.squeeze_spatial(x, pool="max", **run),
            functional.squeeze_channels(x, **run)[..., :1],
            functional.scale_and_squeeze(x, gate, **run)[1][..., :1],
        )

    of_channels, *of_pixels = map(np.isnan, squeezed(x))
    assert of_channels.sum() == 1 and of_channels[1, 0, 0, 5]
    assert all(found.sum() == 1 and found[1, 3, 4, 0] for found in of_pixels)


@pytest.mark.parametrize("size", [(1024, 1024), (257, 391), (64, 64, 64)])
def test_means_of_large_maps(size):
    dims = len(size)
    x = np.full((*size, 2), 0.1, np.float32)
    exact = float(np.float32(0.1))
    mean = partial(functional.squeeze_spatial, spatial_dims=dims)
    np.testing.assert_allclose(jit_as_users_do(mean)(x), exact, rtol=1e-6)

    def product_sum(gate):
        return functional.scale(x, gate, spatial_dims=dims).sum()

    gate = jnp.ones((1,) * dims + (2,))
    slope = jit_as_users_do(jax.grad(product_sum))(gate) / np.prod(size)
    np.testing.assert_allclose(slope, exact, rtol=2e-6)


def test_bad_choices():
    x = jnp.ones((2, 2, 1))
    with pytest.raises(ValueError, match='`pool` must be "avg" or "max", got \'sum\''):
        functional.squeeze_spatial(x, pool="sum")
    with pytest.raises(ValueError, match="`implementation` must be .* got None"):
        functional.squeeze_channels(x, implementation=None)
