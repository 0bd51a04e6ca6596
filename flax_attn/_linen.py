"""What the modules share beside the arithmetic: types, a convolution's parameters."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

from flax_attn.functional import Array

GateFn = Callable[[Array], Array]
ModuleDef = Callable[..., Any]


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
