"""Selection of submodules, and descriptions for error messages."""

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flax_attn.insertion._linen import unwrapped

Select = Callable[[nn.Module, str], bool]
Where = type | tuple[type, ...] | str | re.Pattern[str] | Select


def selector(
    where: Any, base: type = nn.Module, name: str = "nn.Module"
) -> Callable[[Any, str], bool]:
    """``where`` as a ``Select``, for modules of the class ``base``, called ``name``."""
    kinds = where if isinstance(where, tuple) else (where,)
    if kinds and all(isinstance(k, type) and issubclass(k, base) for k in kinds):
        return lambda module, path: isinstance(module, kinds)
    if isinstance(where, str):
        # fnmatch's * matches slashes, and "Block_*" would match all that is inside too.
        deep = "/" in where
        return lambda module, path: (
            (deep or "/" not in path) and fnmatch.fnmatchcase(path, where)
        )
    if isinstance(where, re.Pattern):
        return lambda module, path: where.fullmatch(path) is not None
    if callable(where) and not isinstance(where, type | base):
        return lambda module, path: bool(where(module, path))
    raise ValueError(
        f"`where` must be a subclass of {name} or a tuple of them, a pattern of paths, "
        f"or a function (module, path) -> bool, got {where!r}; pass several classes as "
        "a tuple."
    )


def makes_module(value: Any) -> bool:
    """Whether ``value`` is a class of modules."""
    value = unwrapped(value)
    return isinstance(value, type) and issubclass(value, nn.Module)


def is_map(value: Any) -> bool:
    """Whether ``value`` may be a feature map."""
    return isinstance(value, jax.Array | np.ndarray) and value.ndim >= 3


def check_map(value: Any, site: str) -> None:
    """Raises unless ``value``, which the submodule ``site`` returns, is a map."""
    if not is_map(value):
        raise ValueError(
            "`where` must select submodules that return a feature map (..., H, W, C) "
            f"or a tuple that starts with one, but {site} returns {described(value)}; "
            "select others, e.g. with a function of the path."
        )


def most_axes(tree: Any) -> int:
    """The largest number of axes among the arrays in ``tree``."""
    return max((getattr(leaf, "ndim", 0) for leaf in jax.tree.leaves(tree)), default=0)


def check_batch_axis(
    spatial_dims: int | None, shape: tuple[int, ...], axes: int, site: str
) -> None:
    """Raises if a block would read the batch axis of an output as a spatial axis.

    Args:
      spatial_dims: that of the block; None if it has no such field.
      shape: of the output.
      axes: the largest number of axes among the arrays given to the model. An output
        with as many is one map without a batch axis.
      site: the submodule, for the message.
    """
    if spatial_dims == len(shape) - 1 and axes != len(shape):
        raise ValueError(
            f"`attention` with spatial_dims={spatial_dims} would treat the batch axis "
            f"of {shape}, the output of {site}, as a spatial axis; pass "
            f"spatial_dims={spatial_dims - 1}, or, if the output has no batch axis, "
            "add one to the input of the model."
        )


def described(value: Any) -> str:
    """What ``value`` is, for a message."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    shapes = [np.shape(x) for x in jax.tree.leaves(value) if hasattr(x, "shape")]
    return f"a {type(value).__name__} of arrays of shapes {shapes}"


def listed(items: Iterable[str], *, most: int = 30) -> str:
    """The items separated by commas; beyond ``most`` their number."""
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none at all") + more
