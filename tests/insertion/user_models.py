"""Models as users write them, in different styles, without attention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ModuleDef = Any


class ResNetBlock(nn.Module):
    """Compact, with its layers passed as partials."""

    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[jax.Array], jax.Array] = nn.relu
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm()(self.conv(self.filters, (3, 3))(y))
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(
                residual
            )
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    """Everything in one compact method; ``train`` chooses the statistics."""

    stage_sizes: Sequence[int] = (1, 1)
    num_classes: int = 5
    num_filters: int = 8
    block_cls: ModuleDef = ResNetBlock
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            dtype=self.dtype,
        )
        x = conv(self.num_filters, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for i, blocks in enumerate(self.stage_sizes):
            for j in range(blocks):
                x = self.block_cls(
                    self.num_filters * 2**i,
                    strides=(2, 2) if i > 0 and j == 0 else (1, 1),
                    conv=conv,
                    norm=norm,
                )(x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


class InvertedResidual(nn.Module):
    """Submodules in ``setup``, and no compact method."""

    features: int
    expansion: int = 2
    stride: int = 1

    def setup(self):
        hidden = self.features * self.expansion
        self.expand = nn.Conv(hidden, (1, 1), use_bias=False)
        self.depthwise = nn.Conv(
            hidden,
            (3, 3),
            strides=self.stride,
            feature_group_count=hidden,
            use_bias=False,
        )
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

    num_classes: int = 5
    width: int = 4

    def setup(self):
        self.stem = nn.Conv(self.width, (3, 3), strides=2)
        self.blocks = [
            InvertedResidual(self.width),
            InvertedResidual(2 * self.width, stride=2),
        ]
        self.head = nn.Dense(self.num_classes)

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
    out_channels: int = 2

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
        return nn.Conv(self.out_channels, (1, 1), name="logits")(x)


class Staged(nn.Module):
    """Compact, in parts that an argument chooses."""

    @nn.compact
    def __call__(self, x, stage="all"):
        if stage != "head":
            x = nn.Conv(4, (1, 1), name="body")(x)
        return nn.Dense(2, name="head")(x) if stage != "body" else x


class Careful(nn.Module):
    """Calls a module without a parent, which Linen allows."""

    @nn.compact
    def __call__(self, x):
        Careful(parent=None).check(x)
        return nn.Conv(3, (1, 1), name="conv")(x)

    def check(self, x):
        assert x.ndim == 4


class Encoder(nn.Module):
    """Two compact methods, and a field that is a module."""

    layer: nn.Module = nn.Conv(3, (1, 1))
    width: int = 3

    @nn.compact
    def encode(self, x):
        return nn.Conv(self.width, (1, 1), name="conv")(x)

    @nn.compact
    def __call__(self, x):
        return self.layer(x)
