"""SimAM: attention from an energy, without parameters."""

import math

import jax.numpy as jnp
from jax import lax

from flax_attn import functional
from flax_attn.blocks.base import Attention
from flax_attn.functional import Array, checks


class SimAM(Attention, kw_only=True):
    """Simple, parameter-free attention, ICML 2021, eqs. 5-6.

    Scales each element of ``x`` by ``gate(1 / energy)``, where the energy is low for
    elements far from their channel's mean, relative to the channel's variance: ``1 /
    energy = (x - mean_hw(x))**2 / (4 * (var_hw(x) + lam)) + 0.5``::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> block = flax_attn.SimAM()
      >>> block.init(jax.random.key(0), x)
      {}
      >>> print(f"{block.apply({}, x)[0, 0, 0, 0]:.4f}")  # sigmoid(0.5)
      0.6225

    Maps ``(..., H, W, C)`` to the same shape. The gate, ``(..., H, W, C)``, is sown as
    ``intermediates/element_gate``.

    All fields are keyword-only. SimAM has no parameters, so the initializer fields of
    ``Attention`` have no effect, and ``identity_init`` raises an error. In addition to
    those of ``Attention``:

    Attributes:
      lam: the regularization λ, a positive number (default: 1e-4).
      ddof: the variance is divided by the number of positions minus this, 0 as in the
        paper or 1 (default: 0).

    Deviations: none from the paper. The released code divides by H * W - 1; set
    ``ddof=1`` for it. For a single position the variance is 0 here, and NaN in the
    released code.

    References: Yang, Zhang, Li, Xie. SimAM: A Simple, Parameter-Free Attention Module
    for Convolutional Neural Networks. https://proceedings.mlr.press/v139/yang21o.html,
    2021.
    """

    gates = {"element_gate": "element_gate"}

    lam: float = 1e-4
    ddof: int = 0

    def element_gate(self, x: Array, mask: Array | None = None) -> Array:
        """Returns only the gate, ``(..., H, W, C)``."""
        self._check_fields()
        x, mask = self.validated(x, mask)
        # Subtracting the mean first avoids a difference of large squares in the
        # variance. `rest` corrects the rounding of that mean, which a small lam would
        # magnify. Its value is about zero, but the gradient of the variance needs it.
        mean = lax.stop_gradient(self._mean(x, mask))
        shifted = x.astype(mean.dtype) - mean
        rest = self._mean(shifted, mask)
        variance = self._mean(shifted**2, mask) - rest**2
        squares = functional.apply_mask((shifted - rest) ** 2, mask)
        if self.ddof:
            axes = self.spatial_axes
            size = math.prod(x.shape[axis] for axis in axes)
            valid = size if mask is None else mask.sum(axes, keepdims=True)
            n = jnp.asarray(valid, mean.dtype)
            variance *= n / (n - self.ddof).clip(1)
        logits = squares / (4 * (variance + self.lam)) + 0.5
        gate = self.gate_from(logits.astype(self.dtype or x.dtype))
        gate = functional.apply_mask(gate, mask)
        self.sow("intermediates", "element_gate", gate)
        return gate

    def _mean(self, x: Array, mask: Array | None) -> Array:
        return functional.squeeze_spatial(x, mask=mask, **self.map_options)

    def _check_fields(self) -> None:
        checks.check_positive_number("lam", self.lam, usual=1e-4)
        if not checks.is_int(self.ddof) or self.ddof not in (0, 1):
            raise ValueError(
                f"`ddof` must be 0 or 1, got {self.ddof!r}; pass 0 for the paper's "
                "variance, 1 for that of its code."
            )
        if self.identity_init:
            raise ValueError(
                "`identity_init` must be False, got True: SimAM has no parameters that "
                "could be zero; leave it out, or use a block with parameters."
            )
