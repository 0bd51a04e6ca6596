"""The blocks of PyTorch Image Models."""

from functools import partial

from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks import (
    CBAM,
    ECA,
    ESE,
    SE,
    CoordinateAttention,
    GlobalContext,
    LightCBAM,
)
from flax_attn.presets._parts import TORCH_UNIFORM, batch_norm, documented


def _timm_eca_width(features: int) -> int:
    return max(functional.eca_kernel_size(features, gamma=2, b=1), 3)


timm_se: partial[SE] = documented(
    partial(
        SE,
        reduction=16,
        divisor=8,
        pool="avg",
        use_bias=True,
        kernel_init=TORCH_UNIFORM,
    ),
    """timm's ``se``, ``timm.layers.SEModule``.

    Both layers have biases; the hidden width is C / 16 rounded to a multiple of 8, at
    least 8.
    """,
)

timm_ese: partial[ESE] = documented(
    partial(
        ESE,
        pool="avg",
        gate=nn.hard_sigmoid,
        use_bias=True,
        kernel_init=TORCH_UNIFORM,
    ),
    """timm's ``ese``, ``timm.layers.EffectiveSEModule``: a bias and a hard sigmoid.""",
)

timm_eca: partial[ECA] = documented(
    partial(
        ECA,
        kernel_size=_timm_eca_width,
        padding="zeros",
        use_bias=False,
        kernel_init=TORCH_UNIFORM,
    ),
    """timm's ``eca``, ``timm.layers.EcaModule``.

    The kernel size follows the formula, but is at least 3.
    """,
)

timm_ceca: partial[ECA] = documented(
    partial(ECA, **{**timm_eca.keywords, "padding": "circular"}),
    """timm's ``ceca``, ``timm.layers.CecaModule``.

    ``timm_eca`` with circular padding along the channels.
    """,
)


def _timm_gc_width(features: int) -> int:
    """C / 8 to the nearest integer, halves up, and at least 1."""
    return max((features + 4) // 8, 1)


timm_gc: partial[GlobalContext] = documented(
    partial(
        GlobalContext,
        fuse="scale",
        hidden_features=_timm_gc_width,
        use_bias=True,
        epsilon=1e-6,
        kernel_init=TORCH_UNIFORM,
    ),
    """timm's ``gc``, ``timm.layers.GlobalContext``: x is scaled by a gate; biases.""",
)

timm_gca: partial[GlobalContext] = documented(
    partial(
        GlobalContext, **{**timm_gc.keywords, "fuse": "add", "identity_init": True}
    ),
    """timm's ``gca``: the context is added, and starts at zero.""",
)


def _timm_coordinate_width(features: int) -> int:
    """C / 24 to the nearest multiple of 8, halves up, and at least 8."""
    return max((features + 96) // 192 * 8, 8)


def timm_coordinate(*, train: bool) -> partial[CoordinateAttention]:
    """timm's ``coord``, ``timm.layers.coord_attn.CoordAttn``.

    The hidden width is C / 24 rounded to a multiple of 8, at least 8; a BatchNorm
    follows the first layer, and no layer has a bias::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> block = presets.timm_coordinate(train=False)()
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params["reduce"])
      {'kernel': (64, 8)}

    Args:
      train: whether to normalize with batch statistics instead of running averages.
    """
    return partial(
        CoordinateAttention,
        hidden_features=_timm_coordinate_width,
        hidden_norm=batch_norm(train=train, momentum=0.9),
        use_bias=False,
        kernel_init=TORCH_UNIFORM,
    )


def timm_cbam(*, train: bool) -> partial[CBAM]:
    """timm's ``cbam``, ``timm.layers.cbam.CbamModule``.

    The MLP has no biases, and a hidden width of C / 16 rounded to the nearest integer,
    at least 1. BatchNorm follows the 7x7 convolution, with momentum 0.9 (0.1 in
    PyTorch's convention). All kernels use PyTorch's default uniform initialization::

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
      train: whether to normalize with batch statistics instead of running averages.
    """
    return partial(
        CBAM,
        excite="mlp",
        reduction=16,
        divisor=1,
        spatial_kernel_size=7,
        spatial_norm=batch_norm(train=train, momentum=0.9),
        use_bias=False,
        kernel_init=TORCH_UNIFORM,
    )


def timm_lcbam(*, train: bool) -> partial[LightCBAM]:
    """timm's ``lcbam``, ``timm.layers.cbam.LightCbamModule``.

    Widths, norm and initializers are those of ``timm_cbam``::

      >>> import jax, jax.numpy as jnp
      >>> from flax_attn import presets
      >>> x = jnp.ones((2, 8, 8, 24))
      >>> block = presets.timm_lcbam(train=False)()
      >>> params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params["spatial"])
      {'conv': {'kernel': (7, 7, 1, 1)}, 'norm': {'bias': (1,), 'scale': (1,)}}

    Args:
      train: whether to normalize with batch statistics instead of running averages.
    """
    return partial(LightCBAM, **timm_cbam(train=train).keywords)
