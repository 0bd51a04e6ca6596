"""Every block in the programs of a training: remat, layers in a scan, whole networks.

As in ``test_programs``, the compiled gradient is compared with the one that is computed
operation by operation, with the plain implementation.
"""

from functools import partial
from itertools import chain
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from flax_attn.blocks import BLOCKS
from flax_attn.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    cifar_resnet,
    imagenet_resnet,
)
from tests.cases import each_block, long_unless, normal
from tests.compilation import jit_as_users_do
from tests.laws.test_programs import Program, distances, draw_params

# A decision is what a compiler could make twice. CBAM makes those of a maximum over H
# and W and over C, the other that between two maps.
DECIDING = ("cbam", "scse-max")
deciding = each_block(long=[name for name in BLOCKS if name not in DECIDING])
TOLERANCE = 1e-3


class Layer(nn.Module):
    """One of several equal layers, in the form of ``nn.scan``."""

    block: str
    implementation: str = "fast"

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=False)(y)
        y = BLOCKS[self.block](implementation=self.implementation)(y)
        return nn.relu(x + y), None


class Stack(nn.Module):
    """Three layers, as one scan over stacked parameters."""

    block: str

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(self.block, name="layers")(x, None)
        return jnp.sin(nn.Dense(5)(x.mean((1, 2)))).sum()


@deciding
def test_layers_in_a_scan(block):
    x = normal((3, 9, 11, 20), 1)
    module = Stack(block)
    params = draw_params(module, x)
    layer, head = Layer(block, "plain"), nn.Dense(5)

    def scanned(params):
        y, _ = module.apply({"params": params}, x, mutable="batch_stats")
        return y

    def unrolled(params):
        y = x
        for i in range(3):
            layer_params = jax.tree.map(itemgetter(i), params["layers"])
            (y, _), _ = layer.apply({"params": layer_params}, y, mutable="batch_stats")
        y = head.apply({"params": params["Dense_0"]}, y.mean((1, 2)))
        return jnp.sin(y).sum()

    expected = jax.grad(unrolled)(params)
    assert_close(jit_as_users_do(jax.grad(scanned))(params), expected)


@deciding
def test_remat_and_accumulated_gradients(block):
    x = normal((3, 2, 14, 14, 8), 2)  # Three small batches.
    module = Program(block, "norm", 24, jnp.dtype("float32"))
    plain = Program(block, "norm", 24, jnp.dtype("float32"), "plain")
    params = draw_params(module, x[0])

    def loss(module, params, x):
        y, _ = module.apply({"params": params}, x, mutable="batch_stats")
        return jnp.sin(y).sum()

    @jit_as_users_do
    def accumulated(params):
        def add(total, x):
            grads = jax.grad(jax.checkpoint(partial(loss, module)))(params, x)
            return jax.tree.map(jnp.add, total, grads), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), x)[0]

    each = [jax.grad(partial(loss, plain))(params, part) for part in x]
    assert_close(accumulated(params), jax.tree.map(lambda *g: sum(g), *each))


SMALL = {
    "basic": partial(ResNet, (1, 1), BasicBlock, width=16, imagenet_stem=False),
    "bottleneck": partial(ResNet, (1,), BottleneckBlock, width=16),
}
PUBLISHED = {
    "ResNet-8": partial(cifar_resnet, 8),
    "ResNet-18": partial(imagenet_resnet, 18),
}
QUICK = {("basic", "se-max"), ("bottleneck", "cbam")}
NETWORKS = SMALL | PUBLISHED
SHAPES = {"basic": (4, 14, 11, 3), "bottleneck": (2, 37, 45, 3)}
SHAPES |= {"ResNet-8": (4, 28, 22, 3), "ResNet-18": (2, 75, 91, 3)}


@pytest.mark.parametrize(
    "network, block",
    [
        pytest.param(network, block, marks=long_unless((network, block) in QUICK))
        for network in NETWORKS
        for block in BLOCKS
    ],
)
def test_gradients_of_a_short_training(network, block):
    make, shape = partial(NETWORKS[network], num_classes=10), SHAPES[network]
    module = make(attention=BLOCKS[block])
    plain = make(attention=partial(BLOCKS[block], implementation="plain"))
    labels = jnp.arange(shape[0]) % 10
    x = normal(shape, 3)
    params = draw_params(module, x)

    def loss(module, params, x):
        logits, _ = module.apply(
            {"params": params}, x, train=True, mutable="batch_stats"
        )
        picked = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], 1)
        return -picked.mean()

    compiled = jit_as_users_do(jax.grad(partial(loss, module)))
    reference = jax.grad(partial(loss, plain))
    for step in range(3):
        x = normal(shape, 10 + step)
        grads = compiled(params, x)
        # Where an activation is within a rounding of zero, the gradient jumps: then it
        # is that of a point as near.
        near = (x + 1e-6 * normal(shape, 20 + i) for i in range(8))
        assert any(
            largest_distance(grads, reference(params, point)) <= NETWORK_TOLERANCE
            for point in chain([x], near)
        )
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)


NETWORK_TOLERANCE = 0.02


def largest_distance(got, expected):
    return np.max(list(distances(got, expected).values()))  # NaN where any is NaN.


def assert_close(got, expected, tolerance=TOLERANCE):
    assert largest_distance(got, expected) <= tolerance
