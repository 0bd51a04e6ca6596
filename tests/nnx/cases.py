"""Blocks in NNX, and what their tests share. Making one costs no compilation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_attn.nnx
from flax_attn import blocks
from tests.cases import has_parameters, normal, variables_for

every_block = pytest.mark.parametrize("name", blocks.BLOCKS)
learned = pytest.mark.parametrize("name", list(filter(has_parameters, blocks.BLOCKS)))
# What NNX does to a module depends on its layers and blocks inside, not on more.
REPRESENTATIVE = {"se", "cbam", "bam"}


def representative(names):
    return [
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.long)
        for name in names
    ]


every_class = pytest.mark.parametrize("name", representative(blocks.BLOCKS))
# For what is said of parameters.
learned_class = pytest.mark.parametrize(
    "name", representative(filter(has_parameters, blocks.BLOCKS))
)

SHAPE = (4, 6, 5, 16)
X, COTANGENT = normal(SHAPE, 1), normal(SHAPE, 2)
MASK = np.arange(5) < np.array([5, 3, 0, 4])[:, None, None] * np.ones((6, 1))


def drawn(make, seed=0):
    """The module that ``make()`` returns, with NumPy draws as its parameters.

    Statistics and scales are those of a new norm.
    """
    graph, state = nnx.split(nnx.eval_shape(make))

    def draw(path, leaf):
        name = next(k.key for k in reversed(path) if hasattr(k, "key"))
        if name in ("mean", "var", "scale"):
            return jnp.asarray(np.full(leaf.shape, name != "mean", leaf.dtype))
        fan = max(leaf.size / leaf.shape[-1], 1)
        draw = normal(leaf.shape, seed + leaf.size) / np.float32(np.sqrt(fan))
        return jnp.asarray(draw.astype(leaf.dtype))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def create(name, features=16, **fields):
    """The block ``name`` with NumPy draws as its parameters."""
    make = partial(flax_attn.nnx.create, name, features, **fields)
    return drawn(lambda: make(rngs=nnx.Rngs(0)))


def pair(name, x=X, **fields):
    """The block in NNX and in Linen, with the same random variables."""
    linen = blocks.BLOCKS[name](**fields)
    variables = variables_for(linen, x)
    block = create(name, x.shape[-1], **fields)
    flax_attn.nnx.from_linen(block, variables)
    return block, linen, variables


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def compiled(block, *args, method="__call__"):
    """What the block returns, from one program."""
    return nnx.jit(lambda block, *args: getattr(block, method)(*args))(block, *args)


def gradients(block, x, cotangent, mask=None):
    """The output, and the gradients by parameters and input."""

    def loss(block, x):
        y = block(x, mask)
        return (y * cotangent.astype(y.dtype)).sum(), y

    (d_block, d_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(block, x)
    return y, nnx.to_pure_dict(d_block), d_x


def linen_gradients(linen, variables, mask=None):
    """What ``gradients`` returns of X and COTANGENT, by the Linen block."""

    @jax.jit
    def run(variables, x):
        def loss(variables, x):
            y = linen.apply(variables, x, mask)
            return (y * COTANGENT.astype(y.dtype)).sum(), y

        (d, d_x), y = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
        return y, d["params"], d_x

    return jax.device_get(run(variables, X))
