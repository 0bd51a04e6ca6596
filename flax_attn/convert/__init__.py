"""PyTorch weights to Flax variables and back, for the blocks and for whole ResNets.

There is also a command, which needs no model::

  python -m flax_attn.convert resnet.safetensors flax.safetensors --to flax

Modules are matched by name. ``naming`` selects the naming scheme on the PyTorch side:

* ``"timm"``: SE's ``fc1`` and ``fc2`` are 1x1 convolutions, as in most SENets in
  PyTorch; CBAM is ``channel.fc1``, ``spatial.conv.conv`` and ``spatial.conv.bn``, with
  the inputs [mean, max], which are swapped here. The global context is ``conv_attn``
  with ``mlp_scale.fc1`` (``gc``) or ``mlp_add.fc1`` (``gca``), coordinate attention
  ``conv1``, ``bn1``, ``conv_h`` and ``conv_w``, Gather-Excite ``gather.conv1`` and
  ``mlp.fc1``. In a residual block all of it is under ``se``, and ESE is ``se.fc``.
* ``"torchvision"``: ResNets without attention, and ``torchvision.ops``'s
  ``SqueezeExcitation``.
* ``"article"``: the classes of the article, with ``fc_layers.0``, ``fc_layers.2`` and
  ``conv``; in CBAM under ``channel_attention_block`` and ``spatial_attention_block``;
  in a residual block under ``attention``.
* ``"official"``: CBAM as its authors released it, ``ChannelGate.mlp.1``,
  ``SpatialGate.spatial.conv``, in a residual block under ``cbam``; ECA-Net's ``conv``,
  there under ``eca``.
* ``"official_bam"``: BAM as its authors released it, for ``presets.official_bam``:
  ``channel_att.gate_c.gate_c_fc_0``, ``spatial_att.gate_s.gate_s_conv_reduce0``.
* ``"efficientnet"``: the SE of timm's EfficientNets and MobileNets, ``conv_reduce`` and
  ``conv_expand``.
* ``"monai"``: MONAI's ``ChannelSELayer`` and other SE with the linear layers ``fc.0``
  and ``fc.2``; in a residual block under ``se``.
* ``"smp"``: segmentation_models_pytorch's scSE, ``cSE.1``, ``cSE.3`` and ``sSE.0``.
* ``"ca_sa"``: the common reimplementation of CBAM, ``ca.fc1``, ``ca.fc2`` (``ca.fc.0``
  and ``ca.fc.2`` are read, too) and ``sa.conv1`` with the inputs [mean, max].

ResNets have the same names in all naming schemes: ``conv1``, ``bn1``,
``layer1.0.conv1``, ``layer1.0.downsample.0``, ``fc``; here they are ``conv_stem``,
``norm_stem``, ``stage1_block1/conv1``, ``conv_shortcut`` and ``head``. ``linear`` is
also read as ``fc``, and ``shortcut`` as ``downsample``, since PyTorch code for CIFAR
often uses these names. timm's deep stem, pooled shortcut (its "d" variants) and
convolution instead of max pooling are also supported.

A PyTorch file is safetensors with dotted keys; a Flax file is safetensors with keys
like ``params/head/kernel``. Files of PyTorch's own format (``.pth``, ``.pt``,
``.pth.tar``, ``.bin``, ``.ckpt``) are read with ``weights_only=True``, which runs no
code from them, and are never written. Checkpoints are unwrapped: weights under
``state_dict`` or ``model`` are used, and the prefixes ``module.`` and ``_orig_mod.``
are removed; each of these steps prints a line.
"""

from collections.abc import Sequence

from flax_attn.convert._files import load, save
from flax_attn.convert._mapping import to_flax, to_torch
from flax_attn.convert._report import ConversionError, Report
from flax_attn.convert._rules import Naming

__all__ = [
    "ConversionError",
    "Naming",
    "Report",
    "load",
    "main",
    "save",
    "to_flax",
    "to_torch",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts a file; the command line is ``python -m flax_attn.convert --help``.

    Args:
      arguments: the command-line arguments (default: None, those of the process).

    Returns:
      The exit code: 0, or 1 after an error, which is printed to stderr. Invalid
      arguments exit with 2.

    Raises:
      ImportError: tyro is not installed.
    """
    # Imported here: a module that the package has imported cannot be run by `-m`.
    from flax_attn.convert import __main__ as command

    return command.main(arguments)
