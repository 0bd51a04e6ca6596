"""The article's blocks in PyTorch, NCHW, reimplemented from its equations."""

import math

import torch
from torch import nn


class MLP(nn.Module):
    """Two layers without bias, C -> C // ratio -> C, with a ReLU in between."""

    def __init__(self, channels, ratio):
        super().__init__()
        self.reduce = nn.Linear(channels, channels // ratio, bias=False)
        self.expand = nn.Linear(channels // ratio, channels, bias=False)

    def forward(self, descriptor):
        return self.expand(torch.relu(self.reduce(descriptor)))


class AlongChannels(nn.Module):
    """A 1-D convolution along C; the width grows with the logarithm of C."""

    def __init__(self, channels, gamma=2, b=1):
        super().__init__()
        t = int(abs((math.log2(channels) + b) / gamma))
        k = t + (t + 1) % 2
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, descriptor):
        return self.conv(descriptor[:, None])[:, 0]


def pool(x, mode):
    return {"avg": torch.mean, "max": torch.amax}[mode](x, dim=(2, 3))


class Channel(nn.Module):
    """sigmoid of the summed logits of the pools ``modes``, with one ``excite``."""

    def __init__(self, excite, modes):
        super().__init__()
        self.excite, self.modes = excite, modes

    def forward(self, x):
        logits = sum(self.excite(pool(x, mode)) for mode in self.modes)
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
        self.channel, self.spatial = channel, spatial

    def forward(self, x):
        return self.spatial(self.channel(x))


BOTH = ("avg", "max")


def build(block, channels, *, ratio, k):
    """The block that ``tests.cases`` calls ``block``, for ``channels`` channels."""
    make = {
        "se": lambda: Channel(MLP(channels, ratio), ("avg",)),
        "se-max": lambda: Channel(MLP(channels, ratio), ("max",)),
        "eca": lambda: Channel(AlongChannels(channels), ("avg",)),
        "channel": lambda: Channel(MLP(channels, ratio), BOTH),
        "channel-conv": lambda: Channel(AlongChannels(channels), BOTH),
        "spatial": lambda: Spatial(k),
        "cbam": lambda: CBAM(Channel(MLP(channels, ratio), BOTH), Spatial(k)),
        "cbam-conv": lambda: CBAM(Channel(AlongChannels(channels), BOTH), Spatial(k)),
    }
    return make[block]()
