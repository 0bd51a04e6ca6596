"""The kernel size of ECA's convolution."""

import math
import numbers

from flax_attn.functional.checks import check_positive


def eca_kernel_size(features: int, *, gamma: float = 2, b: float = 1) -> int:
    """The kernel size of ECA, https://arxiv.org/abs/1910.03151, eq. 12.

    ``t = int(abs((log2(features) + b) / gamma))``, or ``t + 1`` where ``t`` is even::

      >>> [eca_kernel_size(c) for c in (16, 54, 64, 128, 512, 2048)]
      [3, 3, 3, 5, 5, 7]

    Args:
      features: number of channels C, at least 1. The result is exact up to at least
        2**20.
      gamma: slope divisor, a finite number other than 0 (default: 2).
      b: offset, a finite number (default: 1).

    Returns:
      An odd integer of at least 1.

    Raises:
      ValueError: an argument is out of range.

    Deviations: none from the paper; timm uses at least 3, which differs only for C < 8.
    """
    check_positive("features", features)
    for field, value in (("gamma", gamma), ("b", b)):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"`{field}` must be a finite number, got {value!r}.")
    if gamma == 0:
        raise ValueError("`gamma` must not be 0; the paper uses 2.")
    # math.log2 is exact for powers of two, which math.log(features, 2) is not.
    t = int(abs((math.log2(features) + b) / gamma))
    return t if t % 2 else t + 1
