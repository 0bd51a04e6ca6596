"""The official code's blocks in PyTorch, NCHW, reimplemented from their definitions.

Parameters have the names of the published files. Those of SENet are Caffe's; its
layers are ``fc1`` and ``fc2`` in PyTorch.

Sources: https://github.com/hujie-frank/SENet (models/SE-ResNet-50.prototxt),
https://github.com/BangguWu/ECANet (models/eca_module.py),
https://github.com/Jongchan/attention-module (MODELS/cbam.py and MODELS/bam.py),
https://github.com/ZjjConan/SimAM (networks/attentions/simam_module.py).
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class SENet(nn.Module):
    """Two 1x1 convolutions with biases on the mean, C -> C // 16 -> C."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x):
        mean = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))


class ECANet(nn.Module):
    """One kernel, whose width the network sets for each stage."""

    def __init__(self, k):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding="same", bias=False)

    def forward(self, x):
        mean = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.conv(mean.unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(logits)[:, :, None, None]


class ChannelGate(nn.Module):
    """One MLP with biases, on the mean and on the maximum (by max pooling)."""

    def __init__(self, channels, ratio):
        super().__init__()
        hidden = channels // ratio
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
        )

    def forward(self, x):
        size = x.shape[2:]
        logits = self.mlp(F.avg_pool2d(x, size)) + self.mlp(F.max_pool2d(x, size))
        return x * torch.sigmoid(logits)[:, :, None, None]


class SpatialGate(nn.Module):
    """A 7x7 convolution of [max, mean] over channels, then BatchNorm."""

    def __init__(self):
        super().__init__()
        layers = OrderedDict(
            conv=nn.Conv2d(2, 1, 7, padding=3, bias=False),
            bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01),
        )
        self.spatial = nn.Sequential(layers)

    def forward(self, x):
        maximum, _ = x.max(dim=1, keepdim=True)
        maps = torch.cat([maximum, x.mean(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.spatial(maps))


class CBAM(nn.Module):
    """Channel, then spatial attention."""

    def __init__(self, channels, ratio=16):
        super().__init__()
        self.ChannelGate = ChannelGate(channels, ratio)
        self.SpatialGate = SpatialGate()

    def forward(self, x):
        return self.SpatialGate(self.ChannelGate(x))


class BAM(nn.Module):
    """Two branches with BatchNorm inside, whose product is one logit an element."""

    def __init__(self, channels, ratio=16, dilation=4):
        super().__init__()
        hidden = channels // ratio
        channel = OrderedDict(
            flatten=nn.Flatten(),
            gate_c_fc_0=nn.Linear(channels, hidden),
            gate_c_bn_1=nn.BatchNorm1d(hidden),
            gate_c_relu_1=nn.ReLU(),
            gate_c_fc_final=nn.Linear(hidden, channels),
        )
        spatial = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(channels, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for i in range(2):
            wide = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            spatial[f"gate_s_conv_di_{i}"] = wide
            spatial[f"gate_s_bn_di_{i}"] = nn.BatchNorm2d(hidden)
            spatial[f"gate_s_relu_di_{i}"] = nn.ReLU()
        spatial["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.channel_att = nn.ModuleDict({"gate_c": nn.Sequential(channel)})
        self.spatial_att = nn.ModuleDict({"gate_s": nn.Sequential(spatial)})

    def forward(self, x):
        channel = self.channel_att["gate_c"](F.avg_pool2d(x, x.shape[2:]))
        logits = channel[:, :, None, None] * self.spatial_att["gate_s"](x)
        return (1 + torch.sigmoid(logits)) * x


class SimAM(nn.Module):
    """The sigmoid of the inverse energy, with the unbiased variance."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=1)
        return x * torch.sigmoid((x - mean) ** 2 / (4 * (variance + 1e-4)) + 0.5)
