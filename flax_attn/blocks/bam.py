"""BAM: channel and spatial attention side by side, in one gate."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention, ModuleDef, Width
from flax_attn.blocks.channel import channel_logits, hidden_width, normalized_mlp
from flax_attn.functional import Array, checks

Combine = Literal["add", "multiply"]

COMBINATIONS: tuple[Combine, ...] = ("add", "multiply")


class BAM(Attention, kw_only=True):
    """Bottleneck Attention Module, https://arxiv.org/abs/1807.06514, eqs. 1-5.

    ``y = x * (1 + gate(channel(x) + spatial(x)))``, where ``channel`` is an MLP of the
    mean over H and W, and ``spatial`` is four convolutions: 1 x 1 to C // r channels,
    two dilated 3 x 3, and 1 x 1 to one channel. The sum has one logit per element::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.BAM().init(jax.random.key(0), x)["params"]
      >>> for name, layer in jax.tree.map(jnp.shape, params).items():
      ...     print(name, layer["kernel"])
      expand (4, 64)
      reduce (64, 4)
      spatial_conv1 (3, 3, 4, 4)
      spatial_conv2 (3, 3, 4, 4)
      spatial_expand (1, 1, 4, 1)
      spatial_reduce (1, 1, 64, 4)

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., H, W, C)``, is sown as
    ``intermediates/element_gate``; the output is ``x * (1 + gate)``, or ``x * gate``
    with ``identity_init``. Use it between the stages of a network, not in residual
    branches.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: of both branches, see ``SE.reduction`` (default: 16).
      dilation: dilation of the 3 x 3 convolutions, at least 1 (default: 4).
      hidden_features: see ``SE.hidden_features`` (default: None).
      norm: module at the end of each branch, ``partial(nn.BatchNorm,
        use_running_average=not train)`` in the paper; called like Flax's norm layers,
        with ``mask=`` if the block gets a mask (default: None).
      combine: how to combine the branches, ``"add"`` as in the paper or ``"multiply"``
        as in the released code (default: "add").
      hidden_norm: module after every layer of both branches except the last, like
        ``norm`` (default: None).
      act: activation between the MLP's layers (default: nn.relu).
      spatial_act: activation after every convolution except the last (default: None).
      use_bias: whether all layers add a bias (default: True, as in the paper).

    Deviations: the paper's BatchNorm must be passed as ``norm``, since blocks have no
    ``train`` argument. The released code multiplies the branches and has norms and
    activations inside them, but no norms at their ends: see
    ``flax_attn.presets.official_bam``. With ``combine="multiply"``, ``identity_init``
    initializes only the channel branch to zero; if both were zero, neither would get a
    gradient.

    References: Park, Woo, Lee, Kweon. BAM: Bottleneck Attention Module.
    https://arxiv.org/abs/1807.06514, 2018.
    """

    gates: ClassVar[Mapping[str, str]] = {"element_gate": "element_gate"}

    reduction: int | float = 16
    dilation: int = 4
    hidden_features: Width | None = None
    norm: ModuleDef | None = None
    combine: Combine = "add"
    hidden_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.relu
    spatial_act: Callable[[Array], Array] | None = None
    use_bias: bool = True

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``.

        It is ``1 + gate``, or with ``identity_init`` the gate.
        """
        gate = self.element_gate(x, mask)
        return gate if self.identity_init else 1 + gate

    @nn.compact
    def element_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., H, W, C)``."""
        checks.check_choice("combine", self.combine, COMBINATIONS)
        x, valid = self.validated(x, mask)
        rows = None if valid is None else valid.any(self.spatial_axes, keepdims=True)
        excite = normalized_mlp(self, x, mask)
        channel = channel_logits(self, x, mask, pools=("avg",), excite=excite)
        channel = self.normalized("norm", channel, rows, name="channel_norm")
        spatial = self._spatial_logits(x, valid)
        logits = channel + spatial if self.combine == "add" else channel * spatial
        gate = functional.apply_mask(self.gate_from(logits), valid)
        self.sow("intermediates", "element_gate", gate)
        return gate

    def _spatial_logits(self, x: Array, mask: Array | None) -> Array:
        checks.check_positive("dilation", self.dilation)
        if self.spatial_act is not None:
            checks.check_callable("spatial_act", self.spatial_act)
        hidden = hidden_width(self, x.shape[-1])
        conv, ones = self.make_layer(nn.Conv), (1,) * self.spatial_dims
        inner = partial(conv, hidden, ones)
        threes = (3,) * self.spatial_dims
        wide = partial(conv, hidden, threes, kernel_dilation=self.dilation)
        y = x
        for place, layer in {"reduce": inner, "conv1": wide, "conv2": wide}.items():
            name = f"spatial_{place}"
            # A bias makes masked positions nonzero, which the next convolution would
            # see.
            y = layer(name=name)(functional.apply_mask(y, mask))
            y = self.normalized(
                "hidden_norm", y, mask, name=f"{name}_norm", is_last=False
            )
            y = y if self.spatial_act is None else self.spatial_act(y)
        is_last = self.combine == "add"
        expand = self.make_layer(nn.Conv, is_last=is_last)
        y = expand(1, ones, name="spatial_expand")(y)
        return self.normalized("norm", y, mask, name="spatial_norm", is_last=is_last)
