"""The values and gradients of every block, in both implementations."""

from functools import partial

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import ChannelsFirst, nnx
from flax_attn.blocks import BLOCKS
from tests.cases import (
    IMPLEMENTATIONS,
    REFERENCES,
    assert_alike,
    assert_exact,
    blocks,
    fast_and_plain,
    forms,
    long_unless,
    normal,
    variables_for,
)
from tests.compilation import jit_as_users_do
from tests.nnx.cases import drawn

# The shape, the number of spatial axes, and whether there are biases.
KINDS = {
    "maps": ((2, 9, 7, 36), 2, True),
    "1x1": ((3, 1, 1, 20), 2, False),
    "one channel": ((2, 5, 4, 1), 2, False),
    "one element": ((1, 1, 1), 2, True),
    "signals": ((2, 9, 20), 1, False),
    "one signal": ((6, 20), 1, True),
    "volumes": ((2, 3, 5, 4, 20), 3, False),
}
QUICK = ("maps", "1x1", "one channel", "signals", "volumes")
WITH_TIES = {
    "after a ReLU": lambda x: np.maximum(x, 0),
    "constant": lambda x: np.full_like(x, 0.7),
    "zeros": np.zeros_like,
}


@blocks
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=long_unless(kind in QUICK)) for kind in KINDS]
)
def test_both_implementations_against_float64(block, kind):
    shape, dims, use_bias = KINDS[kind]
    x, cotangent = normal(shape, 1), normal(shape, 2)
    make = partial(BLOCKS[block], spatial_dims=dims, use_bias=use_bias)
    variables = variables_for(make(), x)
    # What the compiler's optimizations do shows in maps.
    run = fast_and_plain(make, jit_as_users_do if kind == "maps" else jax.jit)
    results = run(variables, x, cotangent)
    assert_alike(results)
    assert_exact(block, variables, x, cotangent, results["fast"], dims)
    for change in WITH_TIES.values():
        tied = change(x)
        results = run(variables, tied, cotangent)
        assert_alike(results)
        assert_exact(block, variables, tied, cotangent, results["fast"], dims, True)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@forms
def test_float64(block, x64):
    make = partial(BLOCKS[block], param_dtype=jnp.float64)
    x = np.float64(normal((1, 6, 5, 16), 0))
    variables = jax.tree.map(np.float64, variables_for(make(), x))
    expected = REFERENCES[block](variables["params"], x)

    @jax.jit
    def run(variables, x):
        return [make(implementation=i).apply(variables, x) for i in IMPLEMENTATIONS]

    for y in run(variables, x):
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=1e-12)


@forms
def test_forward_mode_by_the_plain_implementation(block):
    x = normal((1, 3, 3, 4), 0)
    variables = variables_for(BLOCKS[block](), x)

    def f(x, implementation="plain"):
        return BLOCKS[block](implementation=implementation).apply(variables, x)

    @jax.jit
    def derivatives(x):
        hessian = jax.hessian(lambda x: (f(x) ** 2).sum())(x)
        reverse = jax.jacrev(partial(f, implementation="fast"))(x)
        return jax.jacfwd(f)(x), reverse, hessian

    forward, reverse, hessian = derivatives(x)
    np.testing.assert_allclose(forward, reverse, atol=1e-5)
    hessian = hessian.reshape(x.size, x.size)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)
    assert np.abs(hessian).max() > 0.1


# What has one implementation, in the operations of JAX.
WITHOUT_FAST = {"ge-plus"}


@pytest.mark.parametrize("block", [name for name in BLOCKS if name not in WITHOUT_FAST])
def test_the_fast_implementation_refuses_forward_mode(block):
    module = BLOCKS[block]()
    x = normal((1, 3, 3, 4), 0)
    variables = variables_for(module, x)
    with pytest.raises(TypeError, match='implementation="plain"'):
        jax.jvp(partial(module.apply, variables), (x,), (x,))


@forms
def test_the_multiplier_multiplies_back(block):
    """In both APIs and layouts, with a mask and without."""
    # What can also add to the map has nothing to multiply by unless it scales.
    scaling = {"fuse": "scale"} if hasattr(BLOCKS[block](), "fuse") else {}
    make = partial(BLOCKS[block], use_bias=True, **scaling)
    x = normal((2, 5, 4, 16), 0)
    mask = np.ones(x.shape[:-1], bool)
    mask[1, 3:] = mask[1, :, 2:] = False
    linen, variables = make(), variables_for(make(), x)
    native = drawn(lambda: nnx.native(make)(16, rngs=flax.nnx.Rngs(0)))
    nnx.from_linen(native, variables)

    @jax.jit
    def run(x):
        def pair(mask=None):
            y = linen.apply(variables, x, mask)
            return y, linen.apply(variables, x, mask, method="multiplier")

        first = ChannelsFirst(linen).apply(
            variables, jnp.moveaxis(x, -1, -3), mask, method="multiplier"
        )
        return (
            pair(),
            pair(mask),
            (native(x, mask), native.multiplier(x, mask)),
            (native(x, mask), jnp.moveaxis(first, -3, -1)),
        )

    masks = (1, *(mask[..., None],) * 3)
    for (y, multiplier), within in zip(run(x), masks, strict=True):
        np.testing.assert_allclose(x * within * multiplier, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["cbam", "bam", "scse", "scse-max"])
def test_the_multiplier_of_the_identity_is_one(block):
    x = normal((2, 5, 4, 16), 0)
    module = BLOCKS[block](identity_init=True)

    @jax.jit
    def run(key):
        variables = module.init(key, x)
        return module.apply(variables, x, method="multiplier")

    np.testing.assert_array_equal(run(jax.random.key(0)), np.ones_like(x))
