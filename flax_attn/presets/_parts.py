"""What presets of several sources are made of."""

from functools import partial
from typing import TypeVar

from flax import linen as nn
from flax.typing import Initializer

Block = TypeVar("Block", bound=nn.Module)

# The default of PyTorch's linear and convolutional layers: uniform within
# 1 / sqrt(fan-in) of zero.
TORCH_UNIFORM: Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)


def documented(preset: partial[Block], doc: str) -> partial[Block]:
    """``preset`` with a docstring of its own instead of the one of ``partial``."""
    preset.__doc__ = doc
    return preset


def batch_norm(*, train: bool, momentum: float) -> partial[nn.BatchNorm]:
    """PyTorch's BatchNorm; its momentum is 1 minus this one."""
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-5,
        # As in PyTorch. For nearly equal values, the difference of two squares is
        # mostly rounding, and a second pass over arrays this small costs little.
        use_fast_variance=False,
    )
