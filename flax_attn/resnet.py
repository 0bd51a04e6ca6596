"""Residual networks for CIFAR and ImageNet, with an attention block of your choice.

The attention stands after the last normalization of a residual branch and before the
addition, where all official code and timm have it.

References: He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition.
https://arxiv.org/abs/1512.03385, 2015.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from flax_attn.blocks import BLOCKS

ModuleDef = Callable[..., Any]

# The choices of `--attention`; a view, so that a later entry in BLOCKS is one too.
ATTENTIONS: Mapping[str, ModuleDef | None] = ChainMap(cast(Any, BLOCKS), {"none": None})

IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Attributes:
      features: number of filters, and of channels of the result.
      stride: stride of the first convolution.
      conv: makes a convolution.
      norm: makes a normalization.
      attention: makes the block between the last normalization and the addition, or
        None.
      pooled_shortcut: as in ``ResNet`` (default: False).
    """

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    attention: ModuleDef | None
    pooled_shortcut: bool = False

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``relu(attention(branch(x)) + shortcut(x))``."""
        y = self.conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, 3, 1, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        return _join(self, x, y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 has the stride.

    Attributes:
      features: number of filters of the first two; the result has four times as many
        channels.
      stride: stride of the 3x3 convolution.
      conv: makes a convolution.
      norm: makes a normalization.
      attention: makes the block between the last normalization and the addition, or
        None.
      pooled_shortcut: as in ``ResNet`` (default: False).
    """

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    attention: ModuleDef | None
    pooled_shortcut: bool = False

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``relu(attention(branch(x)) + shortcut(x))``."""
        y = self.conv(self.features, 1, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(self.features * self.expansion, 1, 1, name="conv3")(y)
        y = self.norm(name="norm3")(y)
        return _join(self, x, y)


class ResNet(nn.Module):
    """A residual network from images ``(N, H, W, 3)`` to logits ``(N, classes)``.

    ``cifar_resnet`` and ``imagenet_resnet`` make the published ones::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> model = cifar_resnet(8, num_classes=10, attention=flax_attn.CBAM)
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sorted(variables["params"]["stage1_block1"])
      ['attention', 'conv1', 'conv2', 'norm1', 'norm2']

    A block with a normalization of its own (``spatial_norm``) gets
    ``use_running_average`` from whoever makes it: one model to train and one to
    evaluate, over the same variables.

    Attributes:
      stages: number of blocks in each stage; every stage but the first halves H and W.
      block: ``BasicBlock`` or ``BottleneckBlock``.
      num_classes: number of logits.
      width: filters of the first stage; each stage doubles them (default: 64).
      imagenet_stem: a 7x7 convolution of stride 2 and a 3x3 maximum of stride 2 at the
        start, instead of one 3x3 convolution (default: True).
      attention: makes the attention of each block, called with ``dtype`` and ``name``;
        None for a plain network (default: None).
      dtype: the dtype of the computation and the logits; parameters and batch
        statistics are float32 (default: float32).
      deep_stem: three 3x3 convolutions, of width / 2, width / 2 and width filters,
        instead of the 7x7 one. With ``pooled_shortcut`` it makes the networks that timm
        calls "d", https://arxiv.org/abs/1812.01187, section 4 (default: False).
      pooled_shortcut: shortcuts halve H and W by the mean of 2x2, not by the stride of
        their convolution (default: False).

    Raises:
      ValueError: at the first call, for ``deep_stem`` without ``imagenet_stem``.
    """

    stages: Sequence[int]
    block: ModuleDef
    num_classes: int
    width: int = 64
    imagenet_stem: bool = True
    attention: ModuleDef | None = None
    dtype: Dtype = jnp.float32
    deep_stem: bool = False
    pooled_shortcut: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits; ``train`` normalizes by the batch and not the average."""
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        attention = self.attention and partial(self.attention, dtype=self.dtype)
        x = jnp.asarray(images, self.dtype)
        if self.deep_stem:
            if not self.imagenet_stem:
                raise ValueError(
                    "`deep_stem` needs `imagenet_stem`, got imagenet_stem=False; set "
                    "both, or neither."
                )
            for i in (1, 2):
                x = conv(self.width // 2, 3, 3 - i, name=f"conv_stem{i}")(x)
                x = nn.relu(norm(name=f"norm_stem{i}")(x))
            x = conv(self.width, 3, 1, name="conv_stem3")(x)
        elif self.imagenet_stem:
            x = conv(self.width, 7, 2, name="conv_stem")(x)
        else:
            x = conv(self.width, 3, 1, name="conv_stem")(x)
        x = nn.relu(norm(name="norm_stem")(x))
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = self.block(
                    self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    attention=attention,
                    pooled_shortcut=self.pooled_shortcut,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        # Summing thousands of half-precision values wants a float32 accumulator.
        x = x.mean((-3, -2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def cifar_resnet(depth: int, **fields: Any) -> ResNet:
    """The 6n+2 layer network for 32x32 images, section 4.2 of the paper.

    Three stages of n basic blocks with 16, 32 and 64 filters. Shortcuts that change the
    shape are 1x1 convolutions, where the paper pads with zeros; hence 272,474
    parameters at depth 20 and ten classes, not 269,722.

    Args:
      depth: 8, 20, 32, 44, 56, 110 or any other 6n+2 with n at least 1.
      **fields: further fields of ``ResNet``.

    Raises:
      ValueError: ``depth`` is not 6n+2.
    """
    check_cifar_depth(depth)
    fields = {"width": 16, "imagenet_stem": False} | fields
    return ResNet(stages=((depth - 2) // 6,) * 3, block=BasicBlock, **fields)


def check_cifar_depth(depth: int) -> None:
    """Raises ``ValueError`` unless ``depth`` is 6n+2 with n at least 1."""
    if depth < 8 or depth % 6 != 2:
        below = max(8, (depth - 2) // 6 * 6 + 2)
        raise ValueError(
            f"`depth` must be 6n+2 with n at least 1, got {depth}; the nearest are "
            f"{below} and {below + 6}, the published ones 20, 32, 44, 56 and 110."
        )


def imagenet_resnet(depth: int, **fields: Any) -> ResNet:
    """The 18, 34, 50, 101 or 152 layer network, table 1 of the paper.

    The stride of a bottleneck is on its 3x3 convolution, as in torchvision.

    Args:
      depth: 18 and 34 have basic blocks, the others bottlenecks.
      **fields: further fields of ``ResNet``.

    Raises:
      ValueError: ``depth`` is none of the five.
    """
    check_imagenet_depth(depth)
    block = BasicBlock if depth < 50 else BottleneckBlock
    return ResNet(stages=IMAGENET_STAGES[depth], block=block, **fields)


def check_imagenet_depth(depth: int) -> None:
    """Raises ``ValueError`` unless ``depth`` is one of the five."""
    if depth not in IMAGENET_STAGES:
        raise ValueError(
            f"`depth` must be one of {', '.join(map(str, IMAGENET_STAGES))}, got "
            f"{depth}."
        )


def _conv(features: int, size: int, stride: int, *, dtype: Dtype, name: str) -> nn.Conv:
    # The padding is explicit: at stride 2, "SAME" pads one side only, and weights that
    # were trained elsewhere then see every map shifted.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=(size - 1) // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


def _join(block: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Attends to the branch ``y`` and adds the shortcut of ``x``."""
    if block.attention is not None:
        y = block.attention(name="attention")(y)
    if x.shape != y.shape:
        name, stride = "shortcut", block.stride
        if block.pooled_shortcut:
            # A name of its own: the convolution's stride is another, its shape is not.
            name, stride, x = "pooled_shortcut", 1, _mean_pool(x, stride)
        x = block.conv(y.shape[-1], 1, stride, name=f"conv_{name}")(x)
        x = block.norm(name=f"norm_{name}")(x)
    return nn.relu(x + y)


def _mean_pool(x: jax.Array, size: int) -> jax.Array:
    """The means of ``size`` x ``size`` patches, less what the last ones lack."""
    padding = [(0, -length % size) for length in x.shape[-3:-1]]
    window = (size, size)
    return nn.avg_pool(x, window, window, padding, count_include_pad=False)
