"""The article's blocks in PyTorch, NCHW, reimplemented from its equations.

Parameters have the names of the article's classes.
"""

import math

import torch
from torch import nn


class Channel(nn.Module):
    """sigmoid of the summed logits of the pools, from one MLP or one convolution.

    The MLP is C -> C // ratio -> C without biases; without a ratio it is a convolution
    along C, whose width grows with the logarithm of C.
    """

    def __init__(self, pools, channels, ratio=None):
        super().__init__()
        self.pools = pools
        if ratio is None:
            t = int(abs((math.log2(channels) + 1) / 2))
            k = t + (t + 1) % 2
            self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        else:
            self.fc_layers = nn.Sequential(
                nn.Linear(channels, channels // ratio, bias=False),
                nn.ReLU(),
                nn.Linear(channels // ratio, channels, bias=False),
            )

    def logits(self, descriptor):
        if hasattr(self, "conv"):
            return self.conv(descriptor[:, None])[:, 0]
        return self.fc_layers(descriptor)

    def forward(self, x):
        logits = sum(self.logits(pool(x, dim=(2, 3))) for pool in self.pools)
        return x * torch.sigmoid(logits)[:, :, None, None]


class Spatial(nn.Module):
    """sigmoid of a k x k convolution of the maximum and the mean over channels."""

    def __init__(self, k):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        maps = torch.stack([x.amax(dim=1), x.mean(dim=1)], dim=1)
        return x * torch.sigmoid(self.conv(maps))


class CBAM(nn.Module):
    """Channel, then spatial attention."""

    def __init__(self, channel, spatial):
        super().__init__()
        self.channel_attention_block = channel
        self.spatial_attention_block = spatial

    def forward(self, x):
        return self.spatial_attention_block(self.channel_attention_block(x))


AVG, MAX = (torch.mean,), (torch.amax,)


def build(block, channels, *, ratio, k):
    """The block that ``tests.cases`` calls ``block``, for ``channels`` channels."""
    make = {
        "se": lambda: Channel(AVG, channels, ratio),
        "se-max": lambda: Channel(MAX, channels, ratio),
        "eca": lambda: Channel(AVG, channels),
        "channel": lambda: Channel(AVG + MAX, channels, ratio),
        "channel-conv": lambda: Channel(AVG + MAX, channels),
        "spatial": lambda: Spatial(k),
        "cbam": lambda: CBAM(make["channel"](), Spatial(k)),
        "cbam-conv": lambda: CBAM(make["channel-conv"](), Spatial(k)),
    }
    return make[block]()
