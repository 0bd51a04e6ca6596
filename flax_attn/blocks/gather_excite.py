"""Gather-Excite: each position is gated by its local or global context."""

from collections.abc import Callable

from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention, ModuleDef, Width
from flax_attn.blocks.channel import mlp
from flax_attn.functional import Array, checks, neighborhoods


class GatherExcite(Attention, kw_only=True):
    """Gather-Excite, https://arxiv.org/abs/1810.12348, section 3.

    ``y = x * gate(resize(gather(x)))``, where ``gather`` is a mean over H and W or
    around every e-th position, and ``resize`` is nearest-neighbor upsampling. With
    ``extra_params``, ``gather`` is log2(e) depthwise 3 x 3 convolutions with stride 2;
    with ``use_mlp``, an MLP follows it::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> flax_attn.GatherExcite().init(jax.random.key(0), x)
      {}
      >>> plus = flax_attn.GatherExcite(extent=4, extra_params=True, use_mlp=True)
      >>> params = plus.init(jax.random.key(0), x)["params"]
      >>> for name, layer in jax.tree.map(jnp.shape, params).items():
      ...     print(name, layer["kernel"])
      expand (4, 64)
      gather1 (3, 3, 1, 64)
      gather2 (3, 3, 1, 64)
      reduce (64, 4)

    Maps ``(..., H, W, C)`` to the same shape. The gate is sown as
    ``intermediates/channel_gate``, ``(..., 1, 1, C)``, if the extent is global, and
    otherwise as ``intermediates/element_gate``, ``(..., H, W, C)``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      extent: e, at least 2, or 0 for all of H and W (default: 0).
      extra_params: whether to gather with convolutions, the paper's GE-θ; e must be a
        power of 2 (default: False).
      use_mlp: whether to excite with an MLP. With ``extra_params`` this is GE-θ+; with
        a global extent it is ``SE`` (default: False).
      reduction: divisor r; the MLP's hidden width is ``max(C // r, 1)`` (default: 16).
      hidden_features: see ``SE.hidden_features`` (default: None).
      hidden_norm: module after each convolution, such as ``partial(nn.BatchNorm,
        use_running_average=not train)``; called like Flax's norm layers, with ``mask=``
        if the block gets a mask. A convolution before it has no bias (default: None).
      act: activation between convolutions, and in the MLP (default: nn.relu).

    Raises:
      ValueError: at the first call, if a field or an input is out of range, or for
        ``identity_init`` without parameters.

    Deviations: a global extent with ``extra_params`` is not supported, since its kernel
    would be as large as the map. timm's module has the MLP and BatchNorm as
    ``hidden_norm`` by default.

    References: Hu, Shen, Albanie, Sun, Vedaldi. Gather-Excite: Exploiting Feature
    Context in Convolutional Neural Networks. https://arxiv.org/abs/1810.12348, 2018.
    """

    gates = {"channel_gate": "channel_gate", "element_gate": "element_gate"}

    extent: int = 0
    extra_params: bool = False
    use_mlp: bool = False
    reduction: int = 16
    hidden_features: Width | None = None
    hidden_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.relu

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``, its gate."""
        of = self.element_gate if self.extent else self.channel_gate
        return of(x, mask)

    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, for a global extent, ``(..., 1, 1, C)``."""
        gate = self.gate_from(self._logits(x, mask))
        self.sow("intermediates", "channel_gate", gate)
        return gate

    def element_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, for a local extent, ``(..., H, W, C)``."""
        x, valid = self.validated(x, mask)
        logits = neighborhoods.resize_nearest(
            self._logits(x, mask),
            x,
            self.extent,
            mask=valid,
            spatial_dims=self.spatial_dims,
        )
        gate = functional.apply_mask(self.gate_from(logits), valid)
        self.sow("intermediates", "element_gate", gate)
        return gate

    @nn.compact
    def _logits(self, x: Array, mask: Array | None) -> Array:
        """What is gathered, excited: ``(..., ceil(H / e), ceil(W / e), C)``."""
        x, mask = self.validated(x, mask)
        self._check_fields()
        checks.check_callable("act", self.act)
        if self.extent and mask is not None:
            # Every e-th position is counted from the first that is valid.
            x, mask = neighborhoods.align(x, mask, spatial_dims=self.spatial_dims)
        if self.extra_params:
            y = self._convolved(x, mask)
        elif self.extent:
            y = neighborhoods.local_mean(
                x, self.extent, mask=mask, spatial_dims=self.spatial_dims
            )
        else:
            y = functional.squeeze_spatial(x, mask=mask, **self.map_options)
        if not self.extra_params:
            y = y.astype(self.dtype or x.dtype)
        return mlp(self, x.shape[-1])(y) if self.use_mlp else y

    def _convolved(self, x: Array, mask: Array | None) -> Array:
        features, count = x.shape[-1], int(self.extent).bit_length() - 1
        for i in range(1, count + 1):
            is_last = i == count and not self.use_mlp
            has_norm = self.hidden_norm is not None
            conv = self.make_layer(nn.Conv, is_last=is_last and not has_norm)(
                features,
                (3,) * self.spatial_dims,
                strides=2,
                padding=1,
                feature_group_count=features,
                conv_general_dilated=neighborhoods.conv_depthwise,
                use_bias=self.use_bias and not has_norm,
                name=f"gather{i}",
            )
            x = conv(functional.apply_mask(x, mask))
            if mask is not None:
                mask = neighborhoods.every_second(mask, self.spatial_dims)
            x = self.normalized(
                "hidden_norm", x, mask, name=f"gather{i}_norm", is_last=is_last
            )
            x = x if i == count else self.act(x)
        return x

    def _check_fields(self) -> None:
        power = checks.is_int(self.extent) and self.extent & (self.extent - 1) == 0
        least = 2 if self.extra_params else 0
        if not checks.is_int(self.extent) or self.extent == 1 or self.extent < least:
            raise ValueError(
                f"`extent` must be an integer of at least 2, or 0 for all of the map "
                f"where `extra_params` is False, got {self.extent!r}; pass e.g. 4."
            )
        if self.extra_params and not power:
            raise ValueError(
                "`extent` must be a power of 2 with `extra_params`, which halve the "
                f"map, got {self.extent!r}; pass 2, 4 or 8."
            )
        if self.hidden_norm is not None and not self.extra_params:
            raise ValueError(
                "`hidden_norm` follows the convolutions of `extra_params`, which is "
                "False; leave `hidden_norm` out, or pass extra_params=True."
            )
        if self.identity_init and not (self.extra_params or self.use_mlp):
            raise ValueError(
                "`identity_init` must be False, got True: without `extra_params` and "
                "`use_mlp` there are no parameters that could start at zero."
            )
