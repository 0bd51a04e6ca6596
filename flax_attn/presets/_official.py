"""The blocks as the papers' authors released them."""

from collections.abc import Mapping
from functools import partial

from flax import linen as nn
from flax.typing import Dtype, Initializer, PRNGKey, Shape

from flax_attn.blocks import BAM, CBAM, ECA, SE, SimAM
from flax_attn.functional import Array, checks
from flax_attn.presets._parts import TORCH_UNIFORM, batch_norm, documented

_KAIMING_FAN_OUT: Initializer = nn.initializers.variance_scaling(
    2.0, "fan_out", "normal"
)

official_se: partial[SE] = documented(
    partial(SE, reduction=16, pool="avg", use_bias=True),
    """SENet's block: biases in both layers. The released files have no initializers.

    https://github.com/hujie-frank/SENet
    """,
)


def official_eca(widths: Mapping[int, int]) -> partial[ECA]:
    """ECA-Net's block, with a fixed kernel size for each stage of the network.

    https://github.com/BangguWu/ECANet. The kernel uses PyTorch's default initializer::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> attention = presets.official_eca({64: 3, 128: 3, 256: 5, 512: 7})
      >>> x = jnp.ones((1, 4, 4, 256))
      >>> params = jax.eval_shape(attention().init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'conv': {'kernel': (5, 1, 1)}}

    Args:
      widths: the kernel size for each stage's number of channels.

    Returns:
      ``ECA`` with these kernel sizes. Its first call raises ``ValueError`` for other
      numbers of channels.

    Raises:
      ValueError: ``widths`` is not a dict or is empty, a number of channels is not
        positive, or a kernel size is not odd.
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
        kernel_init=TORCH_UNIFORM,
    )


def _width_of(stages: tuple[tuple[int, int], ...], features: int) -> int:
    widths = dict(stages)
    if features not in widths:
        raise ValueError(
            f"`x` must have {' or '.join(map(str, widths))} channels, for which this "
            f"ECA-Net has kernel sizes, got {features}; pass those of your network to "
            "`flax_attn.presets.official_eca`, or use `flax_attn.ECA`, which has a "
            "kernel size for any number."
        )
    return widths[features]


official_eca50: partial[ECA] = documented(
    official_eca({256: 3, 512: 5, 1024: 5, 2048: 7}),
    """ECA-Net50's block, for the four stages of a ResNet-50.""",
)

official_eca101: partial[ECA] = documented(
    official_eca({256: 3, 512: 3, 1024: 5, 2048: 7}),
    """The block of ECA-Net101 and ECA-Net152, for the four stages of their ResNets.""",
)


def official_cbam(*, train: bool) -> partial[CBAM]:
    """CBAM in the authors' code, https://github.com/Jongchan/attention-module.

    The MLP has biases, and BatchNorm follows the 7x7 convolution, with momentum 0.99
    (0.01 in PyTorch's convention). Its scale is initialized to zero, so the spatial
    gate is initially 0.5 everywhere. The convolution uses Kaiming normal initialization
    (fan-out), the MLP PyTorch's default uniform initialization, and biases are zero::

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
      train: whether to normalize with batch statistics instead of running averages.
    """
    return partial(
        CBAM,
        excite="mlp",
        reduction=16,
        spatial_kernel_size=7,
        spatial_norm=partial(
            batch_norm(train=train, momentum=0.99),
            scale_init=nn.initializers.zeros_init(),
        ),
        use_bias=True,
        kernel_init=_official_cbam_init,
    )


def official_bam(*, train: bool) -> partial[BAM]:
    """BAM in the authors' code, https://github.com/Jongchan/attention-module.

    The logits are the product of the two branches. Each branch has BatchNorm and ReLU
    after every layer except the last::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = presets.official_bam(train=True)()
      >>> variables = jax.eval_shape(block.init, jax.random.key(0), x)
      >>> for name in variables["batch_stats"]:
      ...     print(name)
      reduce_norm
      spatial_conv1_norm
      spatial_conv2_norm
      spatial_reduce_norm

    Args:
      train: whether to normalize with batch statistics instead of running averages.
    """
    return partial(
        BAM,
        reduction=16,
        dilation=4,
        combine="multiply",
        hidden_norm=batch_norm(train=train, momentum=0.9),
        spatial_act=nn.relu,
        use_bias=True,
        kernel_init=_official_cbam_init,
    )


def _official_cbam_init(key: PRNGKey, shape: Shape, dtype: Dtype) -> Array:
    # The official ResNet's initialization looks for "conv" in a name: it finds the 7x7
    # and not the linear layers of the MLP; it would find a convolution in their place.
    draw = _KAIMING_FAN_OUT if len(shape) > 2 else TORCH_UNIFORM
    return draw(key, shape, dtype)


official_simam: partial[SimAM] = documented(
    partial(SimAM, lam=1e-4, ddof=1),
    """SimAM's code, https://github.com/ZjjConan/SimAM: the unbiased variance.""",
)
