"""NNX models as users write them, without attention."""

import jax.numpy as jnp
from flax import nnx

List = getattr(nnx, "List", list)  # Flax 0.11 tracks plain lists.


class Bottleneck(nnx.Module):
    def __init__(self, in_features, features, strides=1, *, rngs):
        conv = nnx.Conv
        out = 2 * features
        self.conv1 = conv(in_features, features, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(
            features, features, (3, 3), strides, padding=1, use_bias=False, rngs=rngs
        )
        self.bn2 = nnx.BatchNorm(features, rngs=rngs)
        self.conv3 = conv(features, out, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(out, rngs=rngs)
        downsample = None
        if strides != 1 or in_features != out:
            downsample = nnx.Sequential(
                conv(in_features, out, (1, 1), strides, use_bias=False, rngs=rngs),
                nnx.BatchNorm(out, rngs=rngs),
            )
        self.downsample = downsample

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nnx.Module):
    """Stages are lists of blocks; the classifier is optional."""

    def __init__(self, stage_sizes=(1, 1), width=4, num_classes=3, *, rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs),
            nnx.BatchNorm(width, rngs=rngs),
            nnx.relu,
        )
        stages, features = [], width
        for i, size in enumerate(stage_sizes):
            blocks = []
            for j in range(size):
                strides = 2 if i > 0 and j == 0 else 1
                blocks.append(Bottleneck(features, width * 2**i, strides, rngs=rngs))
                features = 2 * width * 2**i
            stages.append(List(blocks))
        self.stages = List(stages)
        self.fc = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        if train:  # A Python bool.
            self.train()
        else:
            self.eval()
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(x.mean((1, 2)))


class DoubleConv(nnx.Module):
    def __init__(self, in_features, features, *, rngs):
        self.conv1 = nnx.Conv(in_features, features, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(features, num_groups=2, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(features, num_groups=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)))


class UNet(nnx.Module):
    """Skip connections, and modules in lists."""

    def __init__(self, widths=(4, 8), *, rngs):
        ins = (3, *widths[:-1])
        self.encoder = List(
            [DoubleConv(i, o, rngs=rngs) for i, o in zip(ins, widths, strict=True)]
        )
        self.bottom = DoubleConv(widths[-1], 2 * widths[-1], rngs=rngs)
        up, decoder = [], []
        features = 2 * widths[-1]
        for width in reversed(widths):
            up.append(nnx.ConvTranspose(features, width, (2, 2), 2, rngs=rngs))
            decoder.append(DoubleConv(2 * width, width, rngs=rngs))
            features = width
        self.up, self.decoder = List(up), List(decoder)
        self.logits = nnx.Conv(features, 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.bottom(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(jnp.concatenate([skips.pop(), up(x)], axis=-1))
        return self.logits(x)
