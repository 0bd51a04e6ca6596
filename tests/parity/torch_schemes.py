"""Blocks and a ResNet in PyTorch with the names that other packages have, NCHW.

Written anew from their definitions; the sources are beside the rules of
``flax_attn.convert``.
"""

import torch
from torch import nn


class EfficientNetSE(nn.Module):
    """``conv_reduce`` and ``conv_expand``: timm's EfficientNet and MobileNet."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        hidden = nn.functional.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.conv_expand(hidden))


class MonaiSE(nn.Module):
    """``fc.0`` and ``fc.2``, linear layers: MONAI's ChannelSELayer."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class SmpSCSE(nn.Module):
    """``cSE.1``, ``cSE.3`` and ``sSE.0``: segmentation_models_pytorch."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class ChannelGate(nn.Module):
    """``fc1`` and ``fc2``, or ``fc.0`` and ``fc.2``, on the mean and the maximum."""

    def __init__(self, channels, hidden, sequential):
        super().__init__()
        down = nn.Conv2d(channels, hidden, 1, bias=False)
        up = nn.Conv2d(hidden, channels, 1, bias=False)
        if sequential:
            self.fc = nn.Sequential(down, nn.ReLU(), up)
        else:
            self.fc1, self.fc2 = down, up

    def layers(self, v):
        return self.fc(v) if hasattr(self, "fc") else self.fc2(torch.relu(self.fc1(v)))

    def forward(self, x):
        pools = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return torch.sigmoid(sum(map(self.layers, pools)))


class SpatialGate(nn.Module):
    """``conv1`` on [mean, max]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        maps = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.sigmoid(self.conv1(torch.cat(maps, 1)))


class CaSa(nn.Module):
    """``ca`` and ``sa``: the common reimplementation of CBAM."""

    def __init__(self, channels, hidden, sequential=False):
        super().__init__()
        self.ca = ChannelGate(channels, hidden, sequential)
        self.sa = SpatialGate()

    def forward(self, x):
        x = self.ca(x) * x
        return self.sa(x) * x


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
