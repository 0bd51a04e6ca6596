"""The blocks in NNX, through its bridge to Linen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import flax_attn
from flax_attn.blocks import BLOCKS
from tests.cases import normal

X = normal((4, 5, 4, 16), 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_same_in_nnx(block):
    linen = BLOCKS[block]()

    @nnx.jit
    def run(x):
        model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return model(x), linen.apply({"params": params}, x), params

    y, expected, params = run(X)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), X).get("params", {})
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_trains_with_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(16, 16, (1, 1), rngs=rngs)
            self.attention = nnx.bridge.ToNNX(flax_attn.CBAM(), rngs=rngs).lazy_init(X)

        def __call__(self, x):
            return self.attention(self.conv(x))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model.attention, nnx.Param))
    before = jax.tree.map(np.array, before)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - X / 2) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model.attention, nnx.Param))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert all(m > 0 for m in jax.tree.leaves(moved))


def test_a_norm_inside_wants_mutable():
    norm = partial(nn.BatchNorm, use_running_average=False)
    model = nnx.bridge.ToNNX(flax_attn.CBAM(spatial_norm=norm), rngs=nnx.Rngs(0))
    model.lazy_init(X)
    mean = np.array(model.spatial["norm"]["mean"][...])
    y = model(X, mutable=["batch_stats"])
    assert y.shape == X.shape
    assert np.abs(model.spatial["norm"]["mean"][...] - mean).max() > 0
