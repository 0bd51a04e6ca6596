"""What a block is, and what the blocks share beside the arithmetic."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

from flax_attn.functional import Array, checks

GateFn = Callable[[Array], Array]
ModuleDef = Callable[..., Any]
Width = int | Callable[[int], int]


class Attention(nn.Module):
    """An attention block: maps ``(..., H, W, C)`` to the same shape.

    Attributes:
      gates: the gates that a class itself sows: the name of each by the method that
        sows it. Those of the blocks inside it are theirs to declare.
    """

    gates: ClassVar[Mapping[str, str]] = {}


def width_of(field: str, value: Width, features: int) -> int:
    """The width that a field asks for at ``features`` channels, an integer."""
    if not callable(value):
        return value
    width = value(features)
    if not checks.is_int(width):
        raise ValueError(
            f"`{field}` is a function, which must return an integer, got {width!r} for "
            f"{features} channels; return an int."
        )
    return width


def last_layer(module: Any) -> dict[str, Any]:
    """The initializers of the layer that makes the logits."""
    # Before a norm, zeros would be amplified or leave nothing to learn from: there the
    # norm's scale starts at zero instead.
    if module.identity_init and getattr(module, "norm", None) is None:
        return {"kernel_init": _ZEROS, "bias_init": _ZEROS}
    return {"kernel_init": module.kernel_init, "bias_init": module.bias_init}


def gate_of(module: Any, logits: Array) -> Array:
    """The gate for ``logits``; at zero logits it is 1 with ``identity_init``."""
    if not module.identity_init:
        return module.gate(logits)
    with jax.ensure_compile_time_eval():
        # Jitted, since jax 0.7 traces here what has a custom rule, such as `relu`.
        at_zero = float(jax.jit(module.gate)(jnp.zeros(())))
    if at_zero != 0.5:
        raise ValueError(
            "`identity_init` doubles the gate, so `gate` must be 0.5 at 0, got "
            f"{at_zero}; pass a gate such as nn.sigmoid, or identity_init=False."
        )
    return 2 * module.gate(logits)


def normalise(module: Any, x: Array, mask: Array | None, name: str) -> Array:
    """``x`` through the norm of ``module``, if any, over what ``mask`` admits."""
    if module.norm is None:
        return x
    norm = _make_norm(module, name)
    if mask is None:
        return norm(x)
    # What has nothing valid is normalised as it is, since the mean of nothing is NaN:
    # a row, or for statistics of the batch, the whole of it.
    axes = tuple(range(-1 - module.spatial_dims, -1))
    shared = isinstance(norm, nn.BatchNorm)
    valid = mask.any(None if shared else axes, keepdims=True)
    return norm(x, mask=mask | ~valid)


def _make_norm(module: Any, name: str) -> Any:
    if not module.identity_init:
        return module.norm(name=name)
    try:
        norm = module.norm(name=name, scale_init=_ZEROS, bias_init=_ZEROS)
    except TypeError as error:
        raise ValueError(_NO_SCALE.format(module.norm)) from error
    if not getattr(norm, "use_scale", True):
        raise ValueError(_NO_SCALE.format(module.norm))
    return norm


_ZEROS = nn.initializers.zeros_init()
_NO_SCALE = (
    "`identity_init` starts the scale and the bias of `norm` at zero, so `norm` must "
    "have the fields `scale_init` and `bias_init` and use a scale, got {}; pass a norm "
    "such as nn.BatchNorm, or identity_init=False."
)


class Conv(nn.Module):
    """A convolution to one channel: its parameters, named as ``nn.Conv`` names them.

    Attributes:
      compute: function from the input and the kernel to the result.
      kernel_shape: shape of the kernel; its last axis has size 1.
      use_bias: whether to add a bias, (1,).
      dtype: the dtype of the result (default: infer from input and params).
      param_dtype: the dtype passed to parameter initializers.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
    """

    compute: Callable[[Array, Array], Array]
    kernel_shape: tuple[int, ...]
    use_bias: bool
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the convolution of ``x``."""
        arrays: list[Array] = [
            x,
            self.param("kernel", self.kernel_init, self.kernel_shape, self.param_dtype),
        ]
        if self.use_bias:
            arrays.append(self.param("bias", self.bias_init, (1,), self.param_dtype))
        x, kernel, *bias = promote_dtype(*arrays, dtype=self.dtype)
        y = self.compute(x, kernel)
        return y + bias[0][0] if bias else y
