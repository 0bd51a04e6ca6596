"""The published variants of the blocks by name, as ready sets of fields.

A preset is a ``functools.partial`` of a block, so it is used like the block. Further
fields override its own::

  >>> import jax, jax.numpy as jnp
  >>> from flax_attn import presets
  >>> x = jnp.ones((2, 8, 8, 64))
  >>> block = presets.timm_se(dtype=jnp.bfloat16)
  >>> params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
  >>> jax.tree.map(jnp.shape, params["reduce"])
  {'bias': (8,), 'kernel': (64, 8)}

A preset with a BatchNorm is a function of ``train``; ``official_eca``, of the widths.

==============================  ======================================================
``article_se``                  no bias, hidden width C // 16
``article_se_max``              the same, squeezed by the maximum
``article_eca``                 width of the kernel by the formula
``article_channel``             channel half of CBAM, MLP without bias
``article_channel_conv``        channel half of CBAM, 1-D convolution
``article_spatial``             spatial half of CBAM, 7x7, neither bias nor norm
``article_cbam``                ``article_channel``, then ``article_spatial``
``article_cbam_conv``           ``article_channel_conv``, then ``article_spatial``
``official_se``                 SENet: biases, hidden width C // 16
``official_eca(widths)``        ECA-Net: a fixed width for each number of channels
``official_eca50``              ECA-Net50: 3, 5, 5, 7 in the stages
``official_eca101``             ECA-Net101 and ECA-Net152: 3, 3, 5, 7
``official_cbam(train=...)``    CBAM: MLP with biases, BatchNorm after the 7x7
``timm_se``                     ``se``: biases, hidden width a multiple of 8
``timm_eca``                    ``eca``: width by the formula, at least 3
``timm_ceca``                   ``ceca``: the same, circular along the channels
``timm_ese``                    ``ese``: bias, hard sigmoid
``timm_cbam(train=...)``        ``cbam``: hidden width rounded, BatchNorm after the 7x7
``timm_lcbam(train=...)``       ``lcbam``: the same with one squeeze in each half
==============================  ======================================================

"article" is the one that the README names; it follows the papers' equations.
"official" is the code that the papers' authors published, "timm" is PyTorch Image
Models 1.x under the names that it gives these blocks.

Deviations, common to all:

- If elements tie for a maximum, the first one gets the gradient, as in the article's
  and the official code; timm's ``amax`` splits it evenly.
- ``timm_cbam`` stacks [max, mean] as everything here does; timm stacks [mean, max], so
  the two inputs of its spatial kernel are swapped when weights are converted.
- Flax's BatchNorm keeps an average of the biased variance of the n logits of a batch,
  PyTorch's of the unbiased one, which is n / (n - 1) times as large.
- Biases start at zero. timm's start from PyTorch's uniform draw.
"""

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from flax import linen as nn
from flax.typing import Dtype, Initializer, PRNGKey, Shape

from flax_attn import functional
from flax_attn.blocks import (
    CBAM,
    ECA,
    ESE,
    SE,
    ChannelAttention,
    LightCBAM,
    SpatialAttention,
)
from flax_attn.functional import Array, checks

# The default of PyTorch's linear and convolutional layers: uniform within
# 1 / sqrt(fan-in) of zero.
_TORCH_UNIFORM: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)
_KAIMING_FAN_OUT: Initializer = nn.initializers.variance_scaling(
    2.0, "fan_out", "normal"
)

_Block = TypeVar("_Block", bound=nn.Module)


def _documented(preset: partial[_Block], doc: str) -> partial[_Block]:
    """``preset`` with a docstring of its own instead of the one of ``partial``."""
    preset.__doc__ = doc
    return preset


article_se: partial[SE] = _documented(
    partial(SE, reduction=16, pool="avg", use_bias=False),
    """``SEBlock("avg", channels, 16)`` of the article.""",
)

article_se_max: partial[SE] = _documented(
    partial(SE, reduction=16, pool="max", use_bias=False),
    """``SEBlock("max", channels, 16)`` of the article.""",
)

article_eca: partial[ECA] = _documented(
    partial(ECA, gamma=2, b=1, padding="zeros", use_bias=False),
    """``ECABlock(channels, 2, 1)`` of the article.""",
)

article_channel: partial[ChannelAttention] = _documented(
    partial(ChannelAttention, excite="mlp", reduction=16, use_bias=False),
    """``Channel_Attention_Module_FC(channels, 16)`` of the article.""",
)

article_channel_conv: partial[ChannelAttention] = _documented(
    partial(
        ChannelAttention, excite="conv", gamma=2, b=1, padding="zeros", use_bias=False
    ),
    """``Channel_Attention_Module_Conv(channels, 2, 1)`` of the article.""",
)

article_spatial: partial[SpatialAttention] = _documented(
    partial(SpatialAttention, kernel_size=7, norm=None, use_bias=False),
    """``Spatial_Attention_Module(7)`` of the article.""",
)

article_cbam: partial[CBAM] = _documented(
    partial(
        CBAM,
        excite="mlp",
        reduction=16,
        spatial_kernel_size=7,
        spatial_norm=None,
        use_bias=False,
    ),
    """``CBAMBlock("FC", 7, channels=channels, ratio=16)`` of the article.""",
)

article_cbam_conv: partial[CBAM] = _documented(
    partial(
        CBAM,
        excite="conv",
        gamma=2,
        b=1,
        spatial_kernel_size=7,
        spatial_norm=None,
        use_bias=False,
    ),
    """``CBAMBlock("Conv", 7, channels=channels, gamma=2, b=1)`` of the article.""",
)

official_se: partial[SE] = _documented(
    partial(SE, reduction=16, pool="avg", use_bias=True),
    """SENet's block: biases in both layers, whose initial values its files do not have.

    https://github.com/hujie-frank/SENet
    """,
)


def official_eca(widths: Mapping[int, int]) -> partial[ECA]:
    """ECA-Net's block, whose width is fixed for each stage of the network.

    https://github.com/BangguWu/ECANet. The kernel starts from PyTorch's uniform draw::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> attention = presets.official_eca({64: 3, 128: 3, 256: 5, 512: 7})
      >>> x = jnp.ones((1, 4, 4, 256))
      >>> params = jax.eval_shape(attention().init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'conv': {'kernel': (5, 1, 1)}}

    Args:
      widths: the kernel's width for each number of channels that a stage has.

    Returns:
      ``ECA`` with these widths. Its first call raises ``ValueError`` for an input with
      another number of channels.

    Raises:
      ValueError: there are no widths, or one is not odd.
    """
    if not isinstance(widths, Mapping):
        raise ValueError(
            "`widths` must be a dict from numbers of channels to widths, got "
            f"{widths!r}; pass e.g. {{256: 3, 512: 5, 1024: 5, 2048: 7}}."
        )
    if not widths:
        raise ValueError(
            "`widths` must name at least one number of channels, got none; pass e.g. "
            "{256: 3, 512: 5, 1024: 5, 2048: 7}."
        )
    for features, width in widths.items():
        checks.check_positive("widths", features)
        checks.check_odd("widths", width)
    return partial(
        ECA,
        kernel_size=partial(_width_of, tuple(widths.items())),
        padding="zeros",
        use_bias=False,
        kernel_init=_TORCH_UNIFORM,
    )


def _width_of(stages: tuple[tuple[int, int], ...], features: int) -> int:
    widths = dict(stages)
    if features not in widths:
        raise ValueError(
            f"`x` must have {' or '.join(map(str, widths))} channels, for which this "
            f"ECA-Net has fixed widths, got {features}; pass those of your network to "
            "`flax_attn.presets.official_eca`, or use `flax_attn.ECA`, which has a "
            "width for any number."
        )
    return widths[features]


official_eca50: partial[ECA] = _documented(
    official_eca({256: 3, 512: 5, 1024: 5, 2048: 7}),
    """ECA-Net50's block, for the four stages of a ResNet-50.""",
)

official_eca101: partial[ECA] = _documented(
    official_eca({256: 3, 512: 3, 1024: 5, 2048: 7}),
    """The block of ECA-Net101 and ECA-Net152, for the four stages of their ResNets.""",
)


def official_cbam(*, train: bool) -> partial[CBAM]:
    """CBAM as its authors' code has it, https://github.com/Jongchan/attention-module.

    The MLP has biases; a BatchNorm follows the 7x7 convolution, with PyTorch's momentum
    0.01, which Flax calls 0.99. Its scale starts at zero, so the spatial gate starts at
    one half everywhere. The convolution starts from a normal draw by its fan-out, the
    MLP from PyTorch's uniform draw, the biases from zero::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = presets.official_cbam(train=True)()
      >>> variables = jax.jit(block.init)(jax.random.key(0), x)
      >>> variables["params"]["spatial"]["norm"]["scale"].tolist()
      [0.0]
      >>> jax.tree.map(jnp.shape, variables["batch_stats"]["spatial"])
      {'norm': {'mean': (1,), 'var': (1,)}}

    Args:
      train: whether to normalize by the batch, and update the running averages, or by
        those averages.

    Returns:
      ``CBAM`` with the fields of the official code.
    """
    return partial(
        CBAM,
        excite="mlp",
        reduction=16,
        spatial_kernel_size=7,
        spatial_norm=partial(
            _batch_norm(train=train, momentum=0.99),
            scale_init=nn.initializers.zeros_init(),
        ),
        use_bias=True,
        kernel_init=_official_cbam_init,
    )


def _official_cbam_init(key: PRNGKey, shape: Shape, dtype: Dtype) -> Array:
    # The official ResNet's initialization looks for "conv" in a name: it finds the 7x7
    # and not the linear layers of the MLP; it would find a convolution in their place.
    draw = _KAIMING_FAN_OUT if len(shape) > 2 else _TORCH_UNIFORM
    return draw(key, shape, dtype)


def _batch_norm(*, train: bool, momentum: float) -> partial[nn.BatchNorm]:
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-5,
        # As PyTorch: the logits are one channel, so a second pass costs nothing, and
        # where they are nearly equal the difference of two squares is mostly rounding.
        use_fast_variance=False,
    )


def _timm_eca_width(features: int) -> int:
    return max(functional.eca_kernel_size(features, gamma=2, b=1), 3)


timm_se: partial[SE] = _documented(
    partial(
        SE,
        reduction=16,
        divisor=8,
        pool="avg",
        use_bias=True,
        kernel_init=_TORCH_UNIFORM,
    ),
    """timm's ``se``, ``timm.layers.SEModule``.

    Both layers have biases; the hidden width is C / 16 rounded to a multiple of 8, at
    least 8.
    """,
)

timm_ese: partial[ESE] = _documented(
    partial(
        ESE,
        pool="avg",
        gate=nn.hard_sigmoid,
        use_bias=True,
        kernel_init=_TORCH_UNIFORM,
    ),
    """timm's ``ese``, ``timm.layers.EffectiveSEModule``: a bias and a hard sigmoid.""",
)

timm_eca: partial[ECA] = _documented(
    partial(
        ECA,
        kernel_size=_timm_eca_width,
        padding="zeros",
        use_bias=False,
        kernel_init=_TORCH_UNIFORM,
    ),
    """timm's ``eca``, ``timm.layers.EcaModule``: width by the formula, at least 3.""",
)

timm_ceca: partial[ECA] = _documented(
    partial(ECA, **{**timm_eca.keywords, "padding": "circular"}),
    """timm's ``ceca``, ``timm.layers.CecaModule``.

    It is ``timm_eca`` with the first channel and the last as neighbors.
    """,
)


def timm_cbam(*, train: bool) -> partial[CBAM]:
    """timm's ``cbam``, ``timm.layers.CbamModule``.

    The MLP has no biases, and a hidden width of C / 16 rounded to the nearest integer,
    at least 1. A BatchNorm follows the 7x7 convolution, with PyTorch's momentum 0.1,
    which Flax calls 0.9. All kernels start from PyTorch's uniform draw::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> x = jnp.ones((2, 8, 8, 24))
      >>> block = presets.timm_cbam(train=False)()
      >>> params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params["channel"])
      {'expand': {'kernel': (2, 24)}, 'reduce': {'kernel': (24, 2)}}
      >>> jax.tree.map(jnp.shape, params["spatial"])
      {'conv': {'kernel': (7, 7, 2, 1)}, 'norm': {'bias': (1,), 'scale': (1,)}}

    Args:
      train: whether to normalize by the batch, and update the running averages, or by
        those averages.

    Returns:
      ``CBAM`` with the fields of timm.
    """
    return partial(
        CBAM,
        excite="mlp",
        reduction=16,
        divisor=1,
        spatial_kernel_size=7,
        spatial_norm=_batch_norm(train=train, momentum=0.9),
        use_bias=False,
        kernel_init=_TORCH_UNIFORM,
    )


def timm_lcbam(*, train: bool) -> partial[LightCBAM]:
    """timm's ``lcbam``, ``timm.layers.cbam.LightCbamModule``.

    Widths, norm and start are those of ``timm_cbam``::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> x = jnp.ones((2, 8, 8, 24))
      >>> block = presets.timm_lcbam(train=False)()
      >>> params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params["spatial"])
      {'conv': {'kernel': (7, 7, 1, 1)}, 'norm': {'bias': (1,), 'scale': (1,)}}

    Args:
      train: whether to normalize by the batch, and update the running averages, or by
        those averages.

    Returns:
      ``LightCBAM`` with the fields of timm.
    """
    return partial(LightCBAM, **timm_cbam(train=train).keywords)


__all__ = sorted(
    n for n in globals() if n.startswith(("article_", "official_", "timm_"))
)
