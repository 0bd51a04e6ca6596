"""The residual blocks."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

ModuleDef = Callable[..., Any]
Pooling = Literal["mean", "blur"]


class _Residual(nn.Module):
    """What the residual blocks share; ``BasicBlock`` documents the fields."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    attention: ModuleDef | None
    pooled_shortcut: bool = False

    @nn.nowrap
    def joined(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Attends to the branch ``y`` and adds the shortcut of ``x``."""
        if self.attention is not None:
            y = self.attention(name="attention")(y)
        if x.shape != y.shape:
            name, stride = "shortcut", self.stride
            if self.pooled_shortcut:
                # A name of its own: only the stride of the convolution is another.
                name, stride, x = "pooled_shortcut", 1, _mean_pool(x, stride)
            x = self.conv(y.shape[-1], 1, stride, name=f"conv_{name}")(x)
            x = self.norm(name=f"norm_{name}")(x)
        return nn.relu(x + y)


class BasicBlock(_Residual):
    """A residual block with two 3x3 convolutions.

    Attributes:
      features: number of filters, and of output channels.
      stride: stride of the first convolution.
      conv: constructor of a convolution.
      norm: constructor of a norm layer.
      attention: constructor of the block between the last norm and the addition, or
        None.
      pooled_shortcut: as in ``ResNet`` (default: False).
      anti_alias: as in ``BottleneckBlock``, for the first convolution (default: None).
    """

    anti_alias: Pooling | None = None

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``relu(attention(branch(x)) + shortcut(x))``."""
        stride, pool = _strides(self.stride, self.anti_alias)
        y = self.conv(self.features, 3, stride, name="conv1")(x)
        y = pool(nn.relu(self.norm(name="norm1")(y)))
        y = self.conv(self.features, 3, 1, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        return self.joined(x, y)


class BottleneckBlock(_Residual):
    """A residual block with 1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride.

    ``functools.partial`` sets the last three fields: ResNeXt-50 (32x4d) is
    ``imagenet_resnet(50, block=partial(BottleneckBlock, groups=32, width_per_group=4),
    num_classes=1000)``.

    Attributes:
      features: number of filters of the first two convolutions; the output has four
        times as many channels.
      stride: stride of the 3x3 convolution.
      conv, norm, attention, pooled_shortcut: as in ``BasicBlock``.
      groups: number of groups of the 3x3 convolution,
        https://arxiv.org/abs/1611.05431 (default: 1).
      width_per_group: the first two convolutions have ``features * width_per_group //
        64 * groups`` filters, as in torchvision; 128 makes the wide ResNets (default:
        64).
      anti_alias: pooling after the activation of the 3x3 convolution that applies the
        stride instead of the convolution: ``"mean"`` for 2x2 average pooling, or
        ``"blur"`` for the binomial 3x3 filter of https://arxiv.org/abs/1904.11486
        (default: None).
    """

    groups: int = 1
    width_per_group: int = 64
    anti_alias: Pooling | None = None

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``relu(attention(branch(x)) + shortcut(x))``."""
        width = self.features * self.width_per_group // 64 * self.groups
        stride, pool = _strides(self.stride, self.anti_alias)
        y = self.conv(width, 1, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        grouped = {"groups": self.groups} if self.groups > 1 else {}
        y = self.conv(width, 3, stride, **grouped, name="conv2")(y)
        y = pool(nn.relu(self.norm(name="norm2")(y)))
        y = self.conv(self.features * self.expansion, 1, 1, name="conv3")(y)
        y = self.norm(name="norm3")(y)
        return self.joined(x, y)


def blur_pool(x: jax.Array) -> jax.Array:
    """Filters by [1, 2, 1] / 4 along H and W, mirrored at the edges, with stride 2."""
    # Two means of two neighbors are the filter; the second has the stride.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="reflect")
    return nn.avg_pool(nn.avg_pool(x, (2, 2)), (2, 2), (2, 2))


def _strides(
    stride: int, anti_alias: Pooling | None
) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """The stride of the convolution, and what follows its activation."""
    if anti_alias not in (None, "mean", "blur"):
        raise ValueError(
            f"`anti_alias` must be None, 'mean' or 'blur', got {anti_alias!r}."
        )
    if anti_alias is None or stride == 1:
        return stride, lambda x: x
    if anti_alias == "blur":
        return 1, blur_pool
    return 1, lambda x: nn.avg_pool(x, (2, 2), (2, 2))


def _mean_pool(x: jax.Array, size: int) -> jax.Array:
    """The means of ``size`` x ``size`` patches, less what the last ones lack."""
    padding = [(0, -length % size) for length in x.shape[-3:-1]]
    window = (size, size)
    return nn.avg_pool(x, window, window, padding, count_include_pad=False)
