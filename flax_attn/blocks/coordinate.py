"""Coordinate attention: one gate along each spatial axis."""

from collections.abc import Callable
from functools import reduce

import jax.numpy as jnp
from flax import linen as nn

from flax_attn import functional
from flax_attn.blocks.base import Attention, ModuleDef, Width
from flax_attn.blocks.channel import hidden_width
from flax_attn.functional import Array, checks


class CoordinateAttention(Attention, kw_only=True):
    """Coordinate attention, https://arxiv.org/abs/2103.02907, eqs. 4-9.

    ``y = x * gate(expand_h(f(mean_w(x)))) * gate(expand_w(f(mean_h(x))))``, where ``f``
    is ``act(reduce(s))``, the same for both, so each position knows its row and its
    column::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = flax_attn.CoordinateAttention()
      >>> params = block.init(jax.random.key(0), x)["params"]
      >>> for name, layer in jax.tree.map(jnp.shape, params).items():
      ...     print(name, layer["kernel"])
      expand_h (2, 64)
      expand_w (2, 64)
      reduce (64, 2)

    Maps ``(..., H, W, C)`` to the same shape. The product of the gates,
    ``(..., H, W, C)``, is sown as ``intermediates/element_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: divisor r; the hidden width is ``max(C // r, 1)`` (default: 32).
      hidden_features: see ``SE.hidden_features`` (default: None).
      hidden_norm: module between ``reduce`` and ``act``, with shared statistics for
        rows and columns, such as ``partial(nn.BatchNorm, use_running_average=not
        train)``; called like Flax's norm layers, with ``mask=`` if the block gets a
        mask (default: None).
      act: activation between the layers (default: nn.hard_swish).

    Deviations: the paper covers two axes; here a signal has one gate, from
    ``expand_l``, and a volume has three, each from the mean over the other axes. The
    released code and timm use BatchNorm as ``hidden_norm``, and other hidden widths.

    References: Hou, Zhou, Feng. Coordinate Attention for Efficient Mobile Network
    Design. https://arxiv.org/abs/2103.02907, 2021.
    """

    gates = {"element_gate": "element_gate"}

    reduction: int = 32
    hidden_features: Width | None = None
    hidden_norm: ModuleDef | None = None
    act: Callable[[Array], Array] = nn.hard_swish

    @nn.compact
    def element_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the product of the gates, ``(..., H, W, C)``."""
        x, mask = self.validated(x, mask)
        checks.check_callable("act", self.act)
        hidden = hidden_width(self, x.shape[-1])
        squeeze = self.make_layer(nn.Dense)(hidden, name="reduce")
        last_layer = self.make_layer(nn.Dense, is_last=True)
        # Each axis in turn stands first, and the others have size 1.
        axes = self.spatial_axes
        first = axes[0]
        maps = [jnp.moveaxis(x, axis, first) for axis in axes]
        masks = [None if mask is None else jnp.moveaxis(mask, a, first) for a in axes]
        hiddens = [
            squeeze(self._profile(*pair)) for pair in zip(maps, masks, strict=True)
        ]
        if self.hidden_norm is not None:
            hiddens = self._normalized_together(hiddens, masks)
        gates = []
        names = checks.LAYOUTS[self.spatial_dims].lower().split(", ")
        for axis, name, h in zip(axes, names, hiddens, strict=True):
            expand = last_layer(x.shape[-1], name=f"expand_{name}")
            gate = self.gate_from(expand(self.act(h)))
            gates.append(jnp.moveaxis(gate, first, axis))
        gate = functional.apply_mask(reduce(jnp.multiply, gates), mask)
        self.sow("intermediates", "element_gate", gate)
        return gate

    def _profile(self, x: Array, mask: Array | None) -> Array:
        """The mean over all spatial axes but the first."""
        if self.spatial_dims > 1:
            mean = functional.squeeze_spatial(
                x,
                mask=mask,
                spatial_dims=self.spatial_dims - 1,
                implementation=self.implementation,
            )
            x = mean.astype(x.dtype)
        return x.astype(self.dtype or x.dtype)

    def _normalized_together(
        self, hiddens: list[Array], masks: list[Array | None]
    ) -> list[Array]:
        first, *others = self.spatial_axes
        valid = [m.any(tuple(others), keepdims=True) for m in masks if m is not None]

        def join(arrays: list[Array]) -> Array:
            whole = (functional.replicated_along(a, first) for a in arrays)
            return jnp.concatenate(list(whole), first)

        joined = self.normalized(
            "hidden_norm",
            join(hiddens),
            join(valid) if valid else None,
            name="hidden_norm",
            is_last=False,
        )
        sizes = [h.shape[first] for h in hiddens]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return jnp.split(joined, ends, first)
