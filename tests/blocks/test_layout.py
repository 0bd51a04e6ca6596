import math
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from tests.cases import BLOCKS, normal, variables_for


@pytest.mark.parametrize("block", BLOCKS)
def test_the_same_variables_in_both_layouts(block):
    module = BLOCKS[block]()
    first = flax_attn.ChannelsFirst(module)
    x, cotangent = normal((2, 5, 4, 16), 0), normal((2, 5, 4, 16), 1)
    variables = variables_for(module, x)
    x_first = np.moveaxis(x, -1, 1)
    same = jax.tree.map(np.shape, first.init(jax.random.key(0), x_first))
    assert same == jax.tree.map(np.shape, variables)

    y, pullback = jax.vjp(module.apply, variables, x)
    d_variables, d_x = pullback(cotangent)
    y_first, pullback = jax.vjp(first.apply, variables, x_first)
    d_same, d_x_first = pullback(np.moveaxis(cotangent, -1, 1))
    np.testing.assert_allclose(y_first, np.moveaxis(y, -1, 1), atol=1e-6)
    np.testing.assert_allclose(d_x_first, np.moveaxis(d_x, -1, 1), atol=1e-6)
    for a, b in zip(jax.tree.leaves(d_same), jax.tree.leaves(d_variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_any_leading_axes():
    module = flax_attn.ChannelsFirst(flax_attn.SE())
    x = normal((3, 2, 16, 5, 4), 0)
    variables = module.init(jax.random.key(0), x)
    y = module.apply(variables, x)
    np.testing.assert_allclose(module.apply(variables, x[0, 0]), y[0, 0], atol=1e-6)


def test_any_module_and_its_arguments():
    x = normal((4, 3, 5, 6), 0)
    wrapped = flax_attn.ChannelsFirst(nn.BatchNorm())
    variables = wrapped.init(jax.random.key(0), x, use_running_average=False)
    y, _ = wrapped.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
    resized = flax_attn.ChannelsFirst(nn.Conv(8, (3, 3), strides=2))
    assert resized.init_with_output(jax.random.key(0), x)[0].shape == (4, 8, 3, 3)


def test_inside_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = flax_attn.ChannelsFirst(flax_attn.SE(name="first"))(x)
            return flax_attn.ChannelsFirst(flax_attn.CBAM())(x)

    params = Model().init(jax.random.key(0), normal((1, 16, 4, 4), 0))["params"]
    assert set(params) == {"first", "CBAM_0"}
    assert set(params["CBAM_0"]) == {"channel", "spatial"}


def test_too_few_axes():
    with pytest.raises(ValueError, match=r"3 axes \(..., C, H, W\), got shape \(4, 16"):
        flax_attn.ChannelsFirst(flax_attn.SE()).init(
            jax.random.key(0), np.ones((4, 16), np.float32)
        )


@pytest.mark.parametrize("outer, inner", [(1, 2), (2, 1)])
def test_spatial_dims_must_be_those_of_the_module(outer, inner):
    wrapped = flax_attn.ChannelsFirst(flax_attn.SE(spatial_dims=inner), outer)
    with pytest.raises(ValueError, match=f"of `module`, {inner}, got {outer}; pass"):
        wrapped.init(jax.random.key(0), np.ones((2, 4, 6, 6), np.float32))


def test_transposes_between_wrapped_blocks_cancel():
    class Chain(nn.Module):
        length: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.length):
                x = flax_attn.ChannelsFirst(flax_attn.CBAM())(x)
            return x

    x = normal((2, 16, 12, 10), 0)

    def transposes_to_channels_first(length):
        module = Chain(length)
        variables = jax.jit(module.init)(jax.random.key(0), x)
        text = jax.jit(module.apply).lower(variables, x).compile().as_text()
        moved = re.findall(
            r"f32\[([\d,]+)\]\S* transpose\(.*dimensions=\{0,3,1,2\}", text
        )
        return sum(math.prod(map(int, s.split(","))) == x.size for s in moved)

    # That of the result. A pair that survived would add one per block.
    assert transposes_to_channels_first(1) == 1
    assert transposes_to_channels_first(3) == 1
