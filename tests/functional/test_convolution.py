"""The small convolutions: values, gradients, and what is not finite.

On every platform's code, as far as a CPU runs it.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import functional
from flax_attn.functional import _convolution
from tests.cases import IMPLEMENTATIONS, normal
from tests.compilation import jit_as_users_do
from tests.platforms import code_for


@pytest.mark.parametrize(
    "shape, kernel_shape", [((2, 1, 1, 2), (3, 3, 2, 1)), ((2, 5, 40, 2), (3, 7, 2, 3))]
)
@pytest.mark.parametrize("form", ["by_rows", "by_windows", "by_taps"])
def test_the_gradient_of_the_convolution_on_every_platform(form, shape, kernel_shape):
    maps, kernel = normal(shape, 0), normal(kernel_shape, 1)
    cotangent = normal((*shape[:3], kernel_shape[-1]), 2)
    _, *expected = convolution_and_gradients(
        *map(np.float64, (maps, kernel, cotangent))
    )
    backward = partial(getattr(_convolution, f"_bwd_{form}"), None)
    gradients = jit_as_users_do(backward)(maps, kernel, cotangent)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "h, w, k",
    [(1, 1, 1), (1, 1, 7), (1, 9, 3), (1, 9, 11), (5, 3, 7), (5, 3, 9), (8, 8, 5)]
    + [(3, 40, 7), (3, 40, 11)]
    + [(9, 17, k) for k in (1, 3, 5, 7, 9, 11)],
)
def test_spatial_convolution(h, w, k):
    maps, kernel = normal((2, h, w, 2), 0), normal((k, k, 2, 1), 1)
    cotangent = normal((2, h, w, 1), 2)
    arrays = maps, kernel, cotangent
    expected = convolution_and_gradients(*map(np.float64, arrays))
    sizes = convolution_and_gradients(*(np.abs(np.float64(a)) for a in arrays))
    # Products in each sum: a float32 sum of n, in any order, is off by at most n units
    # of rounding times the sum of their sizes (Higham, Accuracy and Stability, 3.1).
    counts = 2 * k * k, k * k, 2 * h * w
    results = by_implementation(functional.conv_spatial, *arrays)
    for implementation, result in results.items():
        for got, want, size, n in zip(result, expected, sizes, counts, strict=True):
            bound = n * 2.0**-24 / (1 - n * 2.0**-24) * size
            assert (np.abs(got - want) <= bound).all(), implementation


def convolution_and_gradients(maps, kernel, cotangent):
    """Output and gradients of the convolution, tap by tap."""
    (kh, kw), (h, w) = kernel.shape[:2], maps.shape[1:3]
    pads = (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)
    padded = np.pad(maps, pads)
    y, d_padded, d_kernel = map(np.zeros_like, (cotangent, padded, kernel))
    for i, j in np.ndindex(kh, kw):
        part = np.s_[:, i : i + h, j : j + w]
        y += padded[part] @ kernel[i, j]
        d_padded[part] += cotangent @ kernel[i, j].T
        d_kernel[i, j] = np.einsum("nhwm,nhwo->mo", padded[part], cotangent)
    return y, d_padded[:, kh // 2 :, kw // 2 :][:, :h, :w], d_kernel


def test_second_derivatives_of_the_convolution():
    arrays = normal((2, 7, 5, 2), 0), normal((3, 3, 2, 1), 1), normal((2, 7, 5, 1), 2)

    def of_gradients(*arrays, implementation):
        def loss(*arrays):
            y = functional.conv_spatial(*arrays, implementation=implementation)
            return jnp.sin(y)

        return sum(jnp.cos(g).sum() for g in jax.vjp(loss, *arrays)[1](cotangent))

    *arrays, cotangent = arrays
    results = by_implementation(of_gradients, *arrays, np.float32(1))
    plain = results.pop("plain")
    for result in results.values():
        chex.assert_trees_all_close(result, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_the_convolution_of_volumes(k):
    arrays = normal((2, 5, 4, 3, 2), 0), normal((k, k, k, 2, 1), 1)
    results = by_implementation(
        functional.conv_spatial, *arrays, normal((2, 5, 4, 3, 1), 2)
    )
    plain = results.pop("plain")
    for result in results.values():
        chex.assert_trees_all_close(result, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_channel_convolution(k):
    s, kernel = normal((2, 5), 0), normal((k, 1, 1), 1)
    for padding in functional.PADDINGS:
        conv = partial(functional.conv_channels, padding=padding)
        results = by_implementation(conv, s, kernel, normal((2, 5), 2))
        plain = results.pop("plain")
        for result in results.values():
            chex.assert_trees_all_close(result, plain, rtol=1e-5, atol=1e-5)


def by_implementation(conv, *arrays):
    return make_by_implementation(conv)(*arrays)


def make_by_implementation(conv):
    """Output and gradients of both, and of the fast one on a GPU, in one program."""

    def run_one(implementation, maps, kernel, cotangent):
        f = partial(conv, implementation=implementation)
        y, pullback = jax.vjp(f, maps, kernel)
        return y, *pullback(cotangent)

    @jit_as_users_do
    def run(*arrays):
        results = {i: run_one(i, *arrays) for i in IMPLEMENTATIONS}
        with code_for("cuda", _convolution):
            return results | {"on a GPU": run_one("fast", *arrays)}

    return run


def test_half_precision_volumes_sum_in_float32():
    """Forty-nine slices of ones: half precision would stop counting."""
    maps = jnp.ones((49, 1, 1, 1), jnp.bfloat16)
    kernel = jnp.full((49, 1, 1, 1, 1), 10 + 1 / 16, jnp.bfloat16)
    y = jit_as_users_do(functional.conv_spatial)(maps, kernel)
    expected = 49 * float(kernel[0, 0, 0, 0, 0])
    assert y.dtype == jnp.bfloat16
    # The middle slice alone sees all of the kernel.
    assert abs(float(y[24, 0, 0, 0]) - expected) < expected / 256


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding, ends", [("zeros", (3, 5)), ("circular", (7, 6))])
def test_padding_of_the_channel_convolution(padding, ends, implementation):
    s = jnp.array([1.0, 2.0, 1.0, 4.0])
    y = functional.conv_channels(
        s, jnp.ones((3, 1, 1)), padding=padding, implementation=implementation
    )
    assert (float(y[0]), float(y[-1])) == ends


def test_infinity_and_nan_stay_in_their_windows():
    finite = {
        "maps": normal((1, 20, 40, 2), 0),
        "kernel": normal((7, 7, 2, 1), 1),
        "cotangent": normal((1, 20, 40, 1), 2),
    }
    # The last pixel of a row, and so out of sight of most taps.
    places = {"maps": (0, 10, 39, 1), "kernel": (3, 0, 1, 0), "cotangent": (0, 5, 6, 0)}
    run = make_by_implementation(functional.conv_spatial)
    for name, place in places.items():
        for value in (np.nan, np.inf, -np.inf):
            arrays = {key: array.copy() for key, array in finite.items()}
            arrays[name][place] = value
            results = run(*arrays.values())
            expected = results.pop("plain")
            assert not all(np.isfinite(leaf).all() for leaf in expected)
            for form, result in results.items():
                for a, b in zip(result, expected, strict=True):
                    np.testing.assert_allclose(
                        a, b, rtol=1e-4, atol=1e-4, err_msg=f"{name} {value} {form}"
                    )

    s = np.ones((2, 16), np.float32)
    s[1, 5] = np.inf
    kernel = np.ones((3, 1, 1), np.float32)
    results = by_implementation(functional.conv_channels, s, kernel, np.ones_like(s))
    for y, *_ in results.values():
        assert np.isinf(y).sum() == 3 and not np.isnan(y).any()


def test_half_precision_sums_in_float32_on_a_gpu():
    """In bfloat16, 49 times 10 + 1/16 would stop growing, and 400 ones at 256."""
    maps = jnp.ones((1, 20, 20, 1), jnp.bfloat16)
    kernel = jnp.full((7, 7, 1, 1), 10 + 1 / 16, jnp.bfloat16)

    @jit_as_users_do
    def run(maps, kernel):
        y, pullback = jax.vjp(functional.conv_spatial, maps, kernel)
        return y, *pullback(jnp.ones_like(y))

    with code_for("cuda", _convolution):
        y, d_maps, d_kernel = run(maps, kernel)
    expected = 49 * float(kernel[0, 0, 0, 0])
    for middle in (y[0, 10, 10, 0], d_maps[0, 10, 10, 0]):
        assert abs(float(middle) - expected) < expected / 256
    assert float(d_kernel[3, 3, 0, 0]) == 400


@pytest.mark.parametrize("form", ["by_rows", "by_windows"])
def test_large_values_out_of_sight_of_each_other(form):
    """Their product is infinite, and in no gradient."""
    maps, kernel = normal((1, 1, 16, 2), 0), normal((3, 3, 2, 1), 1)
    cotangent = normal((1, 1, 16, 1), 2)
    maps[..., 2, :] = cotangent[..., 12, :] = 1e25
    _, expected, d_kernel = convolution_and_gradients(
        *map(np.float64, (maps, kernel, cotangent))
    )
    backward = jit_as_users_do(partial(getattr(_convolution, f"_bwd_{form}"), None))
    for got, want in zip(
        backward(maps, kernel, cotangent), (expected, d_kernel), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_nan_at_one_sample_stays_there_under_vmap(platform):
    maps, kernel = normal((3, 9, 9, 2), 0), normal((3, 3, 2, 1), 1)
    maps[1, 4, 4, 0] = np.nan
    run = jax.vmap(functional.conv_spatial, (0, None))
    with code_for(platform, _convolution):
        d_maps = jit_as_users_do(jax.grad(lambda m: run(m, kernel)[0].sum()))(maps)
        y = run(maps, kernel)
    assert np.isnan(y).sum() == 9
    assert np.isfinite(d_maps).all()
