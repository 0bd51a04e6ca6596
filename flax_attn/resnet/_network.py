"""The network and its two families."""

import inspect
from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from flax_attn.blocks import BLOCKS
from flax_attn.functional import checks
from flax_attn.resnet._blocks import (
    BasicBlock,
    BottleneckBlock,
    ModuleDef,
    blur_pool,
)

StemPool = Literal["max", "mean", "blur", "conv"]

# A view, so that it has later entries in BLOCKS too.
ATTENTIONS: Mapping[str, ModuleDef | None] = ChainMap(cast(Any, BLOCKS), {"none": None})
"""``flax_attn.BLOCKS``, and ``"none"`` for no attention."""

IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(nn.Module):
    """A residual network that maps images ``(N, H, W, 3)`` to logits ``(N, classes)``.

    ``cifar_resnet`` and ``imagenet_resnet`` create the published networks::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax_attn.resnet import cifar_resnet
      >>> model = cifar_resnet(8, num_classes=10, attention=flax_attn.CBAM)
      >>> images = jnp.zeros((1, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sorted(variables["params"]["stage1_block1"])
      ['attention', 'conv1', 'conv2', 'norm1', 'norm2']

    The method ``features`` returns the feature maps for detection and segmentation,
    with the same variables::

      >>> apply = lambda v, x: model.apply(v, x, method="features")
      >>> [x.shape for x in jax.eval_shape(apply, variables, images)]
      [(1, 32, 32, 16), (1, 32, 32, 16), (1, 16, 16, 32), (1, 8, 8, 64)]

    For a block with its own norm (``spatial_norm``), set ``use_running_average`` in
    ``attention``: use one model to train and one to evaluate, with the same variables.

    Attributes:
      stages: number of blocks in each stage; every stage except the first halves H and
        W.
      block: ``BasicBlock``, ``BottleneckBlock``, or a ``functools.partial`` of one with
        further fields.
      num_classes: number of logits; 0 for a network without the head, which returns
        the pooled features ``(N, C)``.
      width: filters of the first stage; each stage doubles them (default: 64).
      imagenet_stem: start with a 7x7 convolution with stride 2 and 3x3 max pooling with
        stride 2, instead of one 3x3 convolution (default: True).
      attention: constructor of the attention of each block, called with ``dtype`` and
        ``name``; None for a network without attention (default: None).
      dtype: dtype of the computation and the logits; parameters and batch statistics
        are float32 (default: float32).
      deep_stem: three 3x3 convolutions, with width / 2, width / 2 and width filters,
        instead of the 7x7 one. With ``pooled_shortcut`` this gives timm's "d" variants,
        https://arxiv.org/abs/1812.01187, section 4 (default: False).
      pooled_shortcut: shortcuts halve H and W with 2x2 average pooling instead of a
        strided convolution (default: False).
      stem_features: filters of the stem's convolutions, three numbers with
        ``deep_stem`` and otherwise one (default: None, derived from ``width``).
      stem_pool: pooling after an ``imagenet_stem``: ``"max"``; ``"mean"``, 2x2 average
        pooling; ``"blur"``, max pooling with stride 1 and then the blur filter of
        ``BottleneckBlock``; or ``"conv"``, a 3x3 convolution with norm and activation
        (default: "max").

    Raises:
      ValueError: at the first call, if a field is out of range, or for ``deep_stem`` or
        ``stem_pool`` without ``imagenet_stem``.
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
    stem_features: Sequence[int] | None = None
    stem_pool: StemPool = "max"

    def setup(self) -> None:
        """Names the head, so that ``features`` does without its parameters."""
        _check_counts("stages", self.stages)
        checks.check_positive("width", self.width)
        _check_attention(self.attention)
        if not checks.is_int(self.num_classes) or self.num_classes < 0:
            raise ValueError(
                "`num_classes` must be an integer of at least 0, got "
                f"{self.num_classes!r}; 0 leaves out the head."
            )
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, dtype=self.dtype)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits; ``train`` selects batch statistics for normalization."""
        x = self.features(images, train=train)[-1]
        # Summing thousands of half-precision values needs a float32 accumulator.
        x = x.mean((-3, -2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return self.head(x) if self.num_classes else x.astype(self.dtype)

    @nn.compact
    def features(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """Returns the feature map before the stem's pooling, and after each stage.

        To use it as a backbone, call ``model.apply(variables, images,
        method="features")``, or ``self.backbone.features(images, train=train)`` in a
        module with the field ``backbone``. The head then has no parameters, and those
        of a classifier are ignored.

        Args:
          images: ``(N, H, W, 3)``.
          train: as in a call.

        Returns:
          One map for the stem and one per stage. Their strides are 2, 4, 8, 16, 32 with
          ``imagenet_stem``, otherwise 1, 1, 2, 4; stage i, from 0, has
          ``width * 2**i * block.expansion`` channels.
        """
        conv = partial(_conv, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        attention = self.attention and partial(self.attention, dtype=self.dtype)
        x = self._stem(jnp.asarray(images, self.dtype), conv, norm)
        maps = [x]
        x = self._pool(x, conv, norm)
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
            maps.append(x)
        return tuple(maps)

    def _stem(self, x: jax.Array, conv: ModuleDef, norm: ModuleDef) -> jax.Array:
        if self.deep_stem and not self.imagenet_stem:
            raise ValueError(
                "`deep_stem` needs `imagenet_stem`, got imagenet_stem=False; set both, "
                "or neither."
            )
        width = self.width
        usual = (width // 2, width // 2, width) if self.deep_stem else (width,)
        features = usual if self.stem_features is None else self.stem_features
        _check_counts("stem_features", features)
        if len(features) != len(usual):
            raise ValueError(
                f"`stem_features` must be {len(usual)} with deep_stem="
                f"{self.deep_stem}, got {tuple(features)}; pass e.g. {usual}."
            )
        if self.deep_stem:
            for i in (1, 2):
                x = conv(features[i - 1], 3, 3 - i, name=f"conv_stem{i}")(x)
                x = nn.relu(norm(name=f"norm_stem{i}")(x))
            x = conv(features[2], 3, 1, name="conv_stem3")(x)
        else:
            size, stride = (7, 2) if self.imagenet_stem else (3, 1)
            x = conv(features[0], size, stride, name="conv_stem")(x)
        return nn.relu(norm(name="norm_stem")(x))

    def _pool(self, x: jax.Array, conv: ModuleDef, norm: ModuleDef) -> jax.Array:
        checks.check_choice("stem_pool", self.stem_pool, get_args(StemPool))
        if not self.imagenet_stem:
            if self.stem_pool != "max":
                raise ValueError(
                    f"`stem_pool` needs `imagenet_stem`, got {self.stem_pool!r} and "
                    "imagenet_stem=False; set both, or neither."
                )
            return x
        if self.stem_pool == "conv":
            x = conv(x.shape[-1], 3, 2, name="conv_stem_pool")(x)
            return nn.relu(norm(name="norm_stem_pool")(x))
        if self.stem_pool == "mean":
            return nn.avg_pool(x, (2, 2), (2, 2))
        stride = 1 if self.stem_pool == "blur" else 2
        x = nn.max_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))
        return blur_pool(x) if self.stem_pool == "blur" else x


def cifar_resnet(depth: int, **fields: Any) -> ResNet:
    """The (6n+2)-layer network for 32x32 images, section 4.2 of the paper.

    It has three stages of n basic blocks with 16, 32 and 64 filters. Shortcuts that
    change the shape are 1x1 convolutions, not zero padding as in the paper, so depth 20
    with ten classes has 272,474 parameters instead of 269,722.

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
    if not checks.is_int(depth):
        raise ValueError(f"`depth` must be an integer, got {depth!r}; pass e.g. 20.")
    if depth < 8 or depth % 6 != 2:
        below = max(8, (depth - 2) // 6 * 6 + 2)
        raise ValueError(
            f"`depth` must be 6n+2 with n at least 1, got {depth}; the nearest are "
            f"{below} and {below + 6}, the published ones 20, 32, 44, 56 and 110."
        )


def imagenet_resnet(depth: int, **fields: Any) -> ResNet:
    """The 18-, 34-, 50-, 101- or 152-layer network, table 1 of the paper.

    The stride of a bottleneck is on its 3x3 convolution, as in torchvision.

    Args:
      depth: 18 or 34 (basic blocks), or 50, 101 or 152 (bottleneck blocks).
      **fields: further fields of ``ResNet``.

    Raises:
      ValueError: ``depth`` is none of the five.
    """
    check_imagenet_depth(depth)
    fields = {"block": BasicBlock if depth < 50 else BottleneckBlock} | fields
    return ResNet(stages=IMAGENET_STAGES[depth], **fields)


def check_imagenet_depth(depth: int) -> None:
    """Raises ``ValueError`` unless ``depth`` is one of the five."""
    if depth not in IMAGENET_STAGES:
        raise ValueError(
            f"`depth` must be one of {', '.join(map(str, IMAGENET_STAGES))}, got "
            f"{depth}."
        )


def _check_counts(field: str, values: Any) -> None:
    """Raises ``ValueError`` unless ``values`` are integers of at least 1."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if (
        not is_list
        or not values
        or not all(checks.is_int(n) and n >= 1 for n in values)
    ):
        raise ValueError(
            f"`{field}` must be a tuple of integers of at least 1, got {values!r}; "
            "pass e.g. (2, 2, 2, 2)."
        )


def _check_attention(attention: ModuleDef | None) -> None:
    """Raises ``ValueError`` unless ``attention`` makes a module."""
    if attention is None:
        return
    got = f"the module {type(attention).__name__}"
    if not isinstance(attention, nn.Module):
        try:
            inspect.signature(attention).bind(dtype=None, name=None)
        except TypeError as error:
            got = f"{attention!r} ({error})"
        else:
            return
    raise ValueError(
        "`attention` must be called with `dtype` and `name`, as a class, a preset or a "
        f"functools.partial of one is, got {got}; pass e.g. flax_attn.SE."
    )


def _conv(
    features: int, size: int, stride: int, *, dtype: Dtype, name: str, groups: int = 1
) -> nn.Conv:
    # The padding is explicit: at stride 2, "SAME" pads one side only, and weights that
    # were trained elsewhere then see every map shifted.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )
