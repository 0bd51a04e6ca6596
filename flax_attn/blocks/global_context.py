"""GlobalContext: attention-pooled context, added to a map or gating it."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax

from flax_attn import functional
from flax_attn.blocks.base import Attention, Width
from flax_attn.blocks.channel import hidden_width
from flax_attn.functional import Array, checks

Fuse = Literal["add", "scale"]

FUSIONS: tuple[Fuse, ...] = ("add", "scale")


class GlobalContext(Attention, kw_only=True):
    """The block of GCNet, https://arxiv.org/abs/1904.11492, eq. 5.

    ``y = x + expand(act(norm(reduce(context))))``, where ``context`` is the mean of
    ``x`` over H and W, weighted by ``softmax_hw(x @ pool)``, and ``norm`` is a
    LayerNorm::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> params = flax_attn.GlobalContext().init(jax.random.key(0), x)["params"]
      >>> for name, layer in jax.tree.map(jnp.shape, params).items():
      ...     print(name, layer)
      expand {'kernel': (16, 64)}
      norm {'bias': (16,), 'scale': (16,)}
      pool {'kernel': (64, 1)}
      reduce {'kernel': (64, 16)}

    Maps ``(..., H, W, C)`` to the same shape. The added term, ``(..., 1, 1, C)``, is
    sown as ``intermediates/channel_shift``; with ``fuse="scale"``, the gate is sown as
    ``intermediates/channel_gate``.

    All fields are keyword-only. In addition to those of ``Attention``:

    Attributes:
      reduction: divisor r; the hidden width is ``max(C // r, 1)``. The paper uses 16
        and 4. With a width of 1, LayerNorm removes all information (default: 4).
      hidden_features: see ``SE.hidden_features`` (default: None).
      fuse: ``"add"`` the result to x, or ``"scale"`` x by its gate (default: "add").
      act: activation between the two layers (default: nn.relu).
      epsilon: epsilon of the LayerNorm (default: 1e-5).

    Deviations: none from the paper. The layer ``pool`` has no bias, since the softmax
    would cancel it. timm's ``gc`` scales, and its ``gca`` adds; both have biases, r = 8
    and an epsilon of 1e-6.

    References: Cao, Xu, Lin, Wei, Hu. GCNet: Non-local Networks Meet Squeeze-Excitation
    Networks and Beyond. https://arxiv.org/abs/1904.11492, 2019.
    """

    gates = {"channel_gate": "channel_gate", "channel_shift": "channel_shift"}

    reduction: int = 4
    hidden_features: Width | None = None
    fuse: Fuse = "add"
    act: Callable[[Array], Array] = nn.relu
    epsilon: float = 1e-5

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """As ``Attention``: ``x`` with its context, or times its gate."""
        x, valid = self.validated(x, mask)
        if self.fuse == "scale":
            return self.scaled(x, self.multiplier(x, mask))
        x, shift = promote_dtype(x, self.channel_shift(x, mask), dtype=self.dtype)
        return functional.apply_mask(x + shift, valid)

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the gate by which ``fuse="scale"`` multiplies ``x``.

        Raises:
          ValueError: ``fuse`` is ``"add"``, which has no multiplier.
        """
        if self.fuse == "add":
            raise ValueError(
                '`fuse` must be "scale" for a multiplier, got "add", which adds to x; '
                'pass fuse="scale", or add the result of `channel_shift` instead.'
            )
        return self.channel_gate(x, mask)

    def channel_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., 1, 1, C)``."""
        gate = self.gate_from(self._transformed(x, mask))
        self.sow("intermediates", "channel_gate", gate)
        return gate

    def channel_shift(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the term that ``fuse="add"`` adds, ``(..., 1, 1, C)``."""
        shift = self._transformed(x, mask)
        self.sow("intermediates", "channel_shift", shift)
        return shift

    @nn.compact
    def _transformed(self, x: Array, mask: Array | None) -> Array:
        x, valid = self.validated(x, mask)
        checks.check_choice("fuse", self.fuse, FUSIONS)
        checks.check_callable("act", self.act)
        checks.check_positive_number("epsilon", self.epsilon, usual=1e-5)
        first_layer = self.make_layer(nn.Dense)
        last_layer = self.make_layer(nn.Dense, is_last=True)
        pool = first_layer(1, use_bias=False, name="pool")
        reduce = first_layer(hidden_width(self, x.shape[-1]), name="reduce")
        expand = last_layer(x.shape[-1], name="expand")
        context = self._pooled(x, pool(x), valid).astype(self.dtype or x.dtype)
        h = reduce(context)
        norm = _LayerNorm(
            epsilon=self.epsilon,
            param_dtype=self.param_dtype,
            bias_init=self.bias_init,
            name="norm",
        )
        return expand(self.act(norm(h)))

    def _pooled(self, x: Array, logits: Array, mask: Array | None) -> Array:
        """The mean of ``x`` weighted by the softmax of ``logits``."""
        axes = self.spatial_axes
        logits = logits.astype(functional.accumulator(logits))
        valid: bool | Array = True if mask is None else mask
        some = True if mask is None else mask.any(axes, keepdims=True)
        # No infinity, at which `jax_debug_infs` would stop.
        lowest = jnp.finfo(logits.dtype).min
        # The quotient does not depend on the maximum, so neither does its gradient.
        candidates = jnp.where(valid, lax.stop_gradient(logits), lowest)
        largest = candidates.max(axes, keepdims=True)
        shifted = jnp.where(valid, logits - jnp.where(some, largest, 0), 0)
        weights = functional.apply_mask(jnp.exp(shifted), mask)
        options = self.map_options
        weighted = functional.scale(x.astype(weights.dtype), weights, **options)
        mean = functional.squeeze_spatial(weighted, **options)
        weight = functional.squeeze_spatial(weights, **options)
        return mean / jnp.where(some, weight, 1)


class _LayerNorm(nn.Module):
    """LayerNorm in float32 or wider, with casts that strict promotion accepts."""

    epsilon: float
    param_dtype: Dtype
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, dtype = x.shape[-1:], functional.accumulator(x)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        centered = x.astype(dtype) - x.mean(-1, dtype=dtype, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        y = centered * lax.rsqrt(variance + self.epsilon)
        axes = tuple(range(x.ndim - 1))
        scale, bias = (jnp.expand_dims(p.astype(dtype), axes) for p in (scale, bias))
        return (y * scale + bias).astype(x.dtype)
