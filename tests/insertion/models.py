"""Blocks, models and helpers that the tests of insertion share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import flax_attn
from tests.cases import normal

X = normal((2, 8, 8, 3), 0)
# Compiles faster than the default generator.
KEY = jax.random.key(0, impl="rbg")
CBAM = partial(flax_attn.CBAM, reduction=4, spatial_kernel_size=3)
SE = partial(flax_attn.SE, reduction=2)


def without_attention(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: without_attention(v) for k, v in tree.items() if k != "attention"}


def shapes(model, *args, **kwargs):
    variables = jax.eval_shape(partial(model.init, **kwargs), KEY, *args)
    return jax.tree.map(lambda leaf: leaf.shape, variables)


class Chain(nn.Module):
    """Two layers of a class that tests transform."""

    layer: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.layer(4, (3, 3), name="first")(x))
        return self.layer(3, (1, 1), name="second")(x)


class Gated(nn.Module):
    """A model that uses blocks; ``broken`` makes the second one inactive."""

    broken: str = ""

    @nn.compact
    def __call__(self, x):
        y = CBAM(name="used")(x)
        z = flax_attn.SE(reduction=1, name="second")(y)
        if self.broken == "result":
            z = y
        if self.broken == "zero":
            z = z * 0
        # Removes a factor of the whole map.
        return nn.GroupNorm(num_groups=1)(z)


# As users write them, in different styles, without attention.


class ResNetBlock(nn.Module):
    """Compact, with its layers passed as partials."""

    filters: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3))(x)))
        y = self.norm()(self.conv(self.filters, (3, 3))(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Everything in one compact method; ``train`` chooses the statistics."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = nn.relu(norm(name="bn_init")(conv(8, (3, 3), name="conv_init")(x)))
        x = ResNetBlock(8, conv, norm)(x)
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2)))


class InvertedResidual(nn.Module):
    """Submodules in ``setup``, and no compact method."""

    features: int
    stride: int = 1

    def setup(self):
        hidden = 2 * self.features
        depthwise = {"feature_group_count": hidden, "use_bias": False}
        self.expand = nn.Conv(hidden, (1, 1), use_bias=False)
        self.depthwise = nn.Conv(hidden, (3, 3), self.stride, **depthwise)
        self.project = nn.Conv(self.features, (1, 1), use_bias=False)
        self.norms = [nn.GroupNorm(num_groups=2) for _ in range(3)]
        self.drop = nn.Dropout(0.2)

    def __call__(self, x, deterministic=True):
        y = nn.relu6(self.norms[0](self.expand(x)))
        y = nn.relu6(self.norms[1](self.depthwise(y)))
        y = self.drop(self.norms[2](self.project(y)), deterministic=deterministic)
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """Two methods beside ``__call__``, which users call by name."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3), strides=2)
        self.blocks = [InvertedResidual(4), InvertedResidual(8, stride=2)]
        self.head = nn.Dense(5)

    def encode(self, x, *, deterministic=True):
        x = nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x, deterministic)
        return x

    def classify(self, features):
        return self.head(features.mean((-3, -2)))

    def __call__(self, x, *, deterministic=True):
        return self.classify(self.encode(x, deterministic=deterministic))


class DoubleConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Conv(self.features, (3, 3))(x)))
        return x


class UNet(nn.Module):
    """Skip connections from the encoder to the decoder."""

    widths: Sequence[int] = (4, 8)

    @nn.compact
    def __call__(self, x):
        skips = []
        for width in self.widths:
            x = DoubleConv(width, name=f"down_{width}")(x)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = DoubleConv(2 * self.widths[-1], name="bottom")(x)
        for width, skip in zip(self.widths[::-1], skips[::-1], strict=True):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2), name=f"up_{width}")(x)
            x = jnp.concatenate([skip, x], axis=-1)
            x = DoubleConv(width, name=f"merge_{width}")(x)
        return nn.Conv(2, (1, 1), name="logits")(x)
