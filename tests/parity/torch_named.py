"""The article's blocks under the article's names, and a ResNet for CIFAR with them."""

import torch
from torch import nn

from tests.parity.torch_article import BOTH, MLP, AlongChannels, Spatial, pool


class Channel(nn.Module):
    """``fc_layers`` or ``conv`` on the pools ``modes``."""

    def __init__(self, channels, ratio, modes):
        super().__init__()
        self.modes = modes
        if ratio is None:
            self.conv = AlongChannels(channels).conv
        else:
            mlp = MLP(channels, ratio)
            self.fc_layers = nn.Sequential(mlp.reduce, nn.ReLU(), mlp.expand)

    def forward(self, x):
        pools = [pool(x, mode) for mode in self.modes]
        if hasattr(self, "conv"):
            logits = sum(self.conv(v[:, None])[:, 0] for v in pools)
        else:
            logits = sum(self.fc_layers(v) for v in pools)
        return x * torch.sigmoid(logits)[:, :, None, None]


class CBAM(nn.Module):
    """Both halves."""

    def __init__(self, channels, ratio, k):
        super().__init__()
        self.channel_attention_block = Channel(channels, ratio, BOTH)
        self.spatial_attention_block = Spatial(k)

    def forward(self, x):
        return self.spatial_attention_block(self.channel_attention_block(x))


def build(block, channels, *, ratio, k):
    """The block that ``tests.cases`` calls ``block``, for ``channels`` channels."""
    make = {
        "se": lambda: Channel(channels, ratio, ("avg",)),
        "se-max": lambda: Channel(channels, ratio, ("max",)),
        "eca": lambda: Channel(channels, None, ("avg",)),
        "channel": lambda: Channel(channels, ratio, BOTH),
        "channel-conv": lambda: Channel(channels, None, BOTH),
        "spatial": lambda: Spatial(k),
        "cbam": lambda: CBAM(channels, ratio, k),
        "cbam-conv": lambda: CBAM(channels, None, k),
    }
    return make[block]()


class Residual(nn.Module):
    """Two convolutions, the attention ``make``, and a shortcut called ``shortcut``."""

    def __init__(self, inputs, outputs, stride, make, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.attention = make(outputs)
        project = nn.Sequential()
        if inputs != outputs:
            project.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            project.append(nn.BatchNorm2d(outputs))
        self.project = shortcut
        self.add_module(shortcut, project)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.attention(self.bn2(self.conv2(y)))
        return torch.relu(y + getattr(self, self.project)(x))


class ResNet8(nn.Module):
    """Three blocks of 16, 32 and 64 filters; the last names differ between authors."""

    def __init__(self, make, *, shortcut="downsample", head="fc"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        sizes = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for i, size in enumerate(sizes):
            block = Residual(*size, make, shortcut)
            self.add_module(f"layer{i + 1}", nn.Sequential(block))
        self.head = head
        self.add_module(head, nn.Linear(64, 10))

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))
