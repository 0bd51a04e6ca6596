"""ChannelsFirst around modules; ``laws/test_axes.py`` has it around every block."""

import math
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from flax_attn import CBAM, SE, ChannelsFirst
from tests.cases import normal, variables_for


@pytest.mark.parametrize("shape", [(3, 2, 16, 5, 4), (16, 5, 4), (2, 16, 9)])
def test_any_axes(shape):
    dims = 1 if len(shape) == 3 and shape[0] == 2 else 2
    x, block = normal(shape, 0), SE(spatial_dims=dims)
    x_last = np.moveaxis(x, -1 - dims, -1)
    variables = variables_for(block, x_last)
    first = ChannelsFirst(block, spatial_dims=dims)
    y, last = jax.jit(lambda v: (first.apply(v, x), block.apply(v, x_last)))(variables)
    np.testing.assert_allclose(np.moveaxis(y, -1 - dims, -1), last, rtol=1e-6)


def test_any_module_and_its_arguments():
    x = normal((4, 3, 5, 6), 0)
    wrapped = ChannelsFirst(nn.BatchNorm())

    @jax.jit
    def run(key):
        variables = wrapped.init(key, x, use_running_average=False)
        return wrapped.apply(
            variables, x, use_running_average=False, mutable=["batch_stats"]
        )

    y, _ = run(jax.random.key(0))
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
    resized = ChannelsFirst(nn.Conv(8, (3, 3), strides=2))
    y, _ = jax.eval_shape(resized.init_with_output, jax.random.key(0), x)
    assert y.shape == (4, 8, 3, 3)


def test_inside_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ChannelsFirst(SE(name="first"))(x)
            return ChannelsFirst(CBAM())(x)

    x = normal((1, 16, 4, 4), 0)
    params = jax.eval_shape(Model().init, jax.random.key(0), x)["params"]
    assert set(params) == {"first", "CBAM_0"}
    assert set(params["CBAM_0"]) == {"channel", "spatial"}


@pytest.mark.parametrize(
    "module, message",
    [
        (ChannelsFirst(SE()), r"3 axes \(..., C, H, W\), got shape \(4, 16"),
        (
            ChannelsFirst(SE(), spatial_dims=0),
            "`spatial_dims` must be an integer of at least 1",
        ),
    ],
)
def test_bad_numbers_of_axes(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), np.ones((4, 16), np.float32))


@pytest.mark.parametrize("outer, inner", [(1, 2), (2, 1)])
def test_spatial_dims_must_be_those_of_the_module(outer, inner):
    wrapped = ChannelsFirst(SE(spatial_dims=inner), outer)
    with pytest.raises(ValueError, match=f"of `module`, {inner}, got {outer}; pass"):
        wrapped.init(jax.random.key(0), np.ones((2, 4, 6, 6), np.float32))


def test_transposes_between_wrapped_blocks_cancel():
    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = ChannelsFirst(CBAM())(x)
            return x

    x = normal((2, 16, 12, 10), 0)
    variables = variables_for(Chain(), x)
    text = jax.jit(Chain().apply).lower(variables, x).compile().as_text()
    moved = re.findall(r"f32\[([\d,]+)\]\S* transpose\(.*dimensions=\{0,3,1,2\}", text)
    # That of the result alone. A pair that survived would add one per block.
    assert sum(math.prod(map(int, s.split(","))) == x.size for s in moved) == 1
