"""Every block on other axes: leading ones, vmap, channels first, eight devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import ChannelsFirst
from flax_attn.blocks import BLOCKS
from tests.cases import (
    IMPLEMENTATIONS,
    assert_alike,
    assert_exact,
    blocks,
    forms,
    forward_and_gradients,
    normal,
    variables_for,
)


@forms
def test_each_sample_is_on_its_own(block):
    """With two leading axes, or none under vmap, or in the other layout."""
    x, cotangent = normal((2, 3, 5, 4, 16), 0), normal((2, 3, 5, 4, 16), 1)
    variables = variables_for(BLOCKS[block](), x[0])

    def gradients(apply, x, cotangent):
        y, pullback = jax.vjp(apply, variables, x)
        return y, *pullback(cotangent)

    def mapped(module, x, cotangent):
        """The gradient of what is mapped, and a map of gradients."""
        inner = jax.vmap(module.apply, (None, 0))
        y, d_variables, d_x = jax.vmap(partial(gradients, inner))(x, cotangent)
        return y, jax.tree.map(lambda d: d.sum(0), d_variables), d_x

    def channels_first(module, x, cotangent):
        move = partial(jnp.moveaxis, source=-1, destination=-3)
        apply = ChannelsFirst(module).apply
        y, d_variables, d_x = gradients(apply, move(x), move(cotangent))
        back = partial(jnp.moveaxis, source=-3, destination=-1)
        return back(y), d_variables, back(d_x)

    @jax.jit
    def run(x, cotangent):
        results = {}
        for implementation in IMPLEMENTATIONS:
            module = BLOCKS[block](implementation=implementation)
            leading = gradients(module.apply, x, cotangent)
            results[f"{implementation}, leading axes"] = leading
            results[f"{implementation}, vmap"] = mapped(module, x, cotangent)
        results["channels first"] = channels_first(BLOCKS[block](), x, cotangent)
        return results

    results = run(x, cotangent)
    assert_alike(results)
    assert_exact(block, variables, x, cotangent, results["fast, leading axes"])


@forms
def test_sharded_over_eight_devices(block):
    module = BLOCKS[block]()
    x, cotangent = normal((16, 6, 5, 16), 0), normal((16, 6, 5, 16), 1)
    variables = variables_for(module, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    replicated = jax.NamedSharding(mesh, jax.P())
    result = forward_and_gradients(
        module,
        jax.device_put(variables, replicated),
        *jax.device_put((x, cotangent), sharding),
    )
    y, *_ = result
    assert y.sharding.is_equivalent_to(sharding, y.ndim)
    assert_exact(block, variables, x, cotangent, result)


@blocks
@pytest.mark.parametrize(
    "x, message",
    [
        (np.ones((4, 16), np.float32), r"at least 3 axes .* got shape \(4, 16\)"),
        (np.ones((0, 4, 4, 16), np.float32), r"no empty axis, got shape \(0, 4, 4, 16"),
        (np.ones((4, 0, 16), np.float32), "no empty axis"),
        (np.ones((4, 4, 16), np.int32), "floating-point array, got dtype int32"),
        (np.ones((4, 4, 16), bool), "floating-point array, got dtype bool"),
        (np.ones((4, 4, 16), np.complex64), "floating-point array, got dtype complex"),
    ],
)
def test_bad_inputs(block, x, message):
    with pytest.raises(ValueError, match="`x` must .*" + message):
        jax.eval_shape(BLOCKS[block]().init, jax.random.key(0), x)


@blocks
@pytest.mark.parametrize(
    "dims, shape, message",
    [
        (4, (2, 3, 4), "`spatial_dims` must be 1, 2 or 3"),
        (3, (2, 3, 4), r"4 axes \(..., D, H, W, C\)"),
        (1, (4,), r"2 axes \(..., L, C\)"),
    ],
)
def test_bad_numbers_of_axes(block, dims, shape, message):
    module = BLOCKS[block](spatial_dims=dims)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), np.ones(shape, np.float32))
