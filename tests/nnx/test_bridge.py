"""The blocks in NNX, through its bridge to Linen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import flax_attn
from flax_attn.blocks import BLOCKS
from tests.nnx.cases import X, every_block


@every_block
def test_the_same_in_nnx(name):
    linen = BLOCKS[name]()

    @nnx.jit
    def run(x):
        model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return model(x), linen.apply({"params": params}, x), params

    y, expected, params = run(X)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), X).get("params", {})
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_a_norm_inside_wants_mutable():
    norm = partial(nn.BatchNorm, use_running_average=False)
    model = nnx.bridge.ToNNX(flax_attn.CBAM(spatial_norm=norm), rngs=nnx.Rngs(0))
    model.lazy_init(X)
    mean = np.array(model.spatial["norm"]["mean"][...])
    y = model(X, mutable=["batch_stats"])
    assert y.shape == X.shape
    assert np.abs(model.spatial["norm"]["mean"][...] - mean).max() > 0
