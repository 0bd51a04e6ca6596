"""Residual networks for CIFAR and ImageNet, with an attention block of your choice.

The attention block is placed after the last normalization of a residual branch and
before the addition, as in the official code and timm.

References: He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition.
https://arxiv.org/abs/1512.03385, 2015.
"""

from flax_attn.resnet._blocks import BasicBlock, BottleneckBlock
from flax_attn.resnet._network import (
    ATTENTIONS,
    IMAGENET_STAGES,
    ResNet,
    check_cifar_depth,
    check_imagenet_depth,
    cifar_resnet,
    imagenet_resnet,
)
from flax_attn.resnet._pretrained import Preprocessing, Pretrained, from_pretrained

__all__ = [
    "ATTENTIONS",
    "IMAGENET_STAGES",
    "BasicBlock",
    "BottleneckBlock",
    "Preprocessing",
    "Pretrained",
    "ResNet",
    "check_cifar_depth",
    "check_imagenet_depth",
    "cifar_resnet",
    "from_pretrained",
    "imagenet_resnet",
]
