"""The blocks of the article that the README names."""

from functools import partial

from flax_attn.blocks import CBAM, ECA, SE, ChannelAttention, SpatialAttention
from flax_attn.presets._parts import documented

article_se: partial[SE] = documented(
    partial(SE, reduction=16, pool="avg", use_bias=False),
    """``SEBlock("avg", channels, 16)`` of the article.""",
)

article_se_max: partial[SE] = documented(
    partial(SE, reduction=16, pool="max", use_bias=False),
    """``SEBlock("max", channels, 16)`` of the article.""",
)

article_eca: partial[ECA] = documented(
    partial(ECA, gamma=2, b=1, padding="zeros", use_bias=False),
    """``ECABlock(channels, 2, 1)`` of the article.""",
)

article_channel: partial[ChannelAttention] = documented(
    partial(ChannelAttention, excite="mlp", reduction=16, use_bias=False),
    """``Channel_Attention_Module_FC(channels, 16)`` of the article.""",
)

article_channel_conv: partial[ChannelAttention] = documented(
    partial(
        ChannelAttention, excite="conv", gamma=2, b=1, padding="zeros", use_bias=False
    ),
    """``Channel_Attention_Module_Conv(channels, 2, 1)`` of the article.""",
)

article_spatial: partial[SpatialAttention] = documented(
    partial(SpatialAttention, kernel_size=7, norm=None, use_bias=False),
    """``Spatial_Attention_Module(7)`` of the article.""",
)

article_cbam: partial[CBAM] = documented(
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

article_cbam_conv: partial[CBAM] = documented(
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
