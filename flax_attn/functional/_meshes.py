"""Helpers that let one implementation work on every mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = jax.Array


def on_auto_axes(
    function: Callable[..., Any], specs: Callable[..., Any], *arrays: Array
) -> Any:
    """``function(*arrays)``, with the explicit axes of their mesh left to the compiler.

    On explicit axes every reshape of a sharded dimension, and every branch for a
    platform, would have to say how its result is laid out. Only the results do.

    Args:
      function: from the arrays to an array or a tuple of arrays.
      specs: from the arrays' partitions, one entry per dimension, to the results'.
      *arrays: what ``function`` takes.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    explicit = [m for m in meshes if AxisType.Explicit in m.axis_types]
    if not explicit:
        return function(*arrays)
    partitions = [
        (*jax.typeof(a).sharding.spec, *(None,) * a.ndim)[: a.ndim] for a in arrays
    ]
    out = jax.tree.map(
        lambda spec: NamedSharding(explicit[0], PartitionSpec(*spec)),
        specs(*partitions),
        is_leaf=lambda spec: isinstance(spec, list),
    )
    return jax.sharding.auto_axes(function, out_sharding=out)(*arrays)


def replicated_along(x: Array, axis: int) -> Array:
    """``x`` with all of ``axis`` on every device, where the mesh's axes are explicit.

    For small arrays. XLA doubles the kernel's gradient of a convolution whose batch and
    width are both sharded (seen on CPU with jax 0.10.2).
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [*sharding.spec, *(None,) * x.ndim][: x.ndim]
    spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, all varying over the manual axes that one of them varies over.

    In ``shard_map`` a gradient by a replicated array is a sum over the devices; that is
    the transpose of this cast, so no rule stated by hand has to know about it.
    """
    axes = [_varying(a) for a in arrays]
    union = frozenset().union(*axes)
    return tuple(
        _vary(a, tuple(sorted(union - own))) if union - own else a
        for a, own in zip(arrays, axes, strict=True)
    )


def _varying(x: Array) -> frozenset[str]:
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return frozenset(getattr(aval, "vma", ()))


def _vary(x: Array, axes: tuple[str, ...]) -> Array:
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axes, to="varying")
    return getattr(lax, "pvary")(x, axes)  # noqa: B009 - Before there was pcast.
