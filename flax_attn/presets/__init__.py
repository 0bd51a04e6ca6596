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

Presets with BatchNorm are functions of ``train``; ``official_eca`` takes ``widths``.

==============================  ======================================================
``article_se``                  no bias, hidden width C // 16
``article_se_max``              the same, squeezed by the maximum
``article_eca``                 kernel size by the formula
``article_channel``             channel half of CBAM, MLP without bias
``article_channel_conv``        channel half of CBAM, 1-D convolution
``article_spatial``             spatial half of CBAM, 7x7, neither bias nor norm
``article_cbam``                ``article_channel``, then ``article_spatial``
``article_cbam_conv``           ``article_channel_conv``, then ``article_spatial``
``official_se``                 SENet: biases, hidden width C // 16
``official_eca(widths)``        ECA-Net: a fixed kernel size per number of channels
``official_eca50``              ECA-Net50: 3, 5, 5, 7 in the stages
``official_eca101``             ECA-Net101 and ECA-Net152: 3, 3, 5, 7
``official_bam(train=...)``     BAM: branches multiplied, with BatchNorm inside
``official_cbam(train=...)``    CBAM: MLP with biases, BatchNorm after the 7x7
``official_simam``              SimAM: variance divided by H * W - 1
``timm_se``                     ``se``: biases, hidden width a multiple of 8
``timm_eca``                    ``eca``: kernel size by the formula, at least 3
``timm_ceca``                   ``ceca``: the same with circular padding
``timm_ese``                    ``ese``: bias, hard sigmoid
``timm_cbam(train=...)``        ``cbam``: hidden width rounded, BatchNorm after the 7x7
``timm_lcbam(train=...)``       ``lcbam``: the same with one squeeze in each half
``timm_coordinate(train=...)``  ``coord``: hidden width a multiple of 8, BatchNorm
``timm_gc``                     ``gc``: the global context gates x
``timm_gca``                    ``gca``: the global context is added to x
==============================  ======================================================

"article" is the web article linked in the README, which follows the papers' equations.
"official" is the code released by the papers' authors. "timm" is PyTorch Image Models
1.x, with its names for the blocks.

Deviations, common to all:

- If elements tie for a maximum, the first one gets the gradient, as in the article's
  and the official code; timm's ``amax`` splits it evenly.
- ``timm_cbam`` stacks [max, mean], like all blocks here; timm stacks [mean, max], so
  weight conversion swaps the two inputs of its spatial kernel.
- Flax's BatchNorm averages the biased variance of the n logits of a batch, PyTorch's
  the unbiased one, which is n / (n - 1) times as large.
- Biases are initialized to zero; timm uses PyTorch's default uniform initialization.
"""

# Sorted, each name would get a statement of its own.
# isort: skip_file
from flax_attn.presets._article import (
    article_cbam as article_cbam,
    article_cbam_conv as article_cbam_conv,
    article_channel as article_channel,
    article_channel_conv as article_channel_conv,
    article_eca as article_eca,
    article_se as article_se,
    article_se_max as article_se_max,
    article_spatial as article_spatial,
)
from flax_attn.presets._official import (
    official_bam as official_bam,
    official_cbam as official_cbam,
    official_eca as official_eca,
    official_eca50 as official_eca50,
    official_eca101 as official_eca101,
    official_se as official_se,
    official_simam as official_simam,
)
from flax_attn.presets._timm import (
    timm_cbam as timm_cbam,
    timm_ceca as timm_ceca,
    timm_coordinate as timm_coordinate,
    timm_eca as timm_eca,
    timm_ese as timm_ese,
    timm_gc as timm_gc,
    timm_gca as timm_gca,
    timm_lcbam as timm_lcbam,
    timm_se as timm_se,
)

__all__ = sorted(
    n for n in globals() if n.startswith(("article_", "official_", "timm_"))
)
