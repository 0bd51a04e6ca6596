"""Attention in an NNX model that somebody else wrote, without changing its code."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal

import jax
from flax import nnx

from flax_attn.insertion import Site, Sites
from flax_attn.insertion.selection import (
    check_batch_axis,
    check_map,
    described,
    listed,
    most_axes,
    selector,
)
from flax_attn.insertion.trees import separate_arrays
from flax_attn.nnx._blocks import Attention, Place, become, joined, modules


def insert(
    model: nnx.Module,
    attention: Callable[..., nnx.Module],
    where: Any,
    *args: Any,
    rngs: nnx.Rngs,
    init: Literal["identity"] | None = None,
    name: str = "attention",
    **kwargs: Any,
) -> Sites:
    """Inserts ``attention`` after the submodules of ``model`` that ``where`` selects.

    The model is changed in place, but its code is not. Its variables keep their paths,
    so pretrained variables can be loaded before or after::

      >>> from flax import nnx
      >>> import flax_attn.nnx
      >>> import jax.numpy as jnp
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
      ...         self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.second(nnx.relu(self.first(x)))
      >>> x, rngs = jnp.ones((2, 8, 8, 3)), nnx.Rngs(0)
      >>> model = Model(rngs)
      >>> print(insert(model, flax_attn.nnx.SE, nnx.Conv, x, rngs=rngs))
      path    type  output          parameters
      first   Conv  (2, 8, 8, 16)           32
      second  Conv  (2, 8, 8, 32)          128
      total                                160
      >>> model.first.attention.reduce.kernel.shape
      (16, 1)

    What counts as a map, and where none is inserted, is as in ``flax_attn.insert``.

    Args:
      model: any NNX module; it is traced once for shapes and keeps its state.
      attention: called as ``attention(features, rngs=rngs)`` for each submodule, such
        as ``flax_attn.nnx.SE`` or a ``functools.partial`` of it.
      where: the submodules: a subclass of ``nnx.Module`` or a tuple of them, or a
        pattern, a regular expression or a function as in ``flax_attn.insert``.
      *args: the arguments of a call of ``model``; ``jax.ShapeDtypeStruct`` is enough.
      rngs: initializes the parameters.
      init: ``"identity"`` passes ``identity_init=True`` to ``attention``, so that the
        initial output is unchanged (default: None).
      name: the attribute of each submodule that holds the attention (default:
        "attention").
      **kwargs: keyword arguments of the call of ``model``.

    Returns:
      The sites in the order of their calls; as a string, a table.

    Raises:
      ValueError: an argument is out of range, ``where`` selects no submodule that is
        called, a selected submodule returns no map with at least 3 axes, is inside
        ``nnx.scan`` or ``nnx.vmap``, or already has ``name``, or ``attention`` changes
        the shape. The model is then not changed.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"`model` must be an NNX module, got {model!r}; pass e.g. Model(rngs)."
        )
    if init not in (None, "identity"):
        raise ValueError(f"`init` must be 'identity' or None, got {init!r}.")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"`name` must be the name of an attribute, got {name!r}; leave it out for "
            "'attention'."
        )
    select = selector(where, nnx.Module, "nnx.Module")
    inside = dict(_submodules(model))
    chosen = {path for path, m in inside.items() if select(m, joined(path))}
    outputs = _outputs(model, chosen, args, kwargs)
    if not outputs:
        seen = (f"{joined(path)} ({type(m).__name__})" for path, m in inside.items())
        raise ValueError(
            f"`where` must select a submodule that {type(model).__name__} calls, got "
            f"{where!r}; its submodules are {listed(seen)}."
        )
    fields = {"identity_init": True} if init else {}
    axes = most_axes((args, kwargs))
    made: dict[Place, tuple[nnx.Module, Site]] = {}
    for path, y in outputs.items():
        module = inside[path]
        site = f"{joined(path)} ({type(module).__name__})"
        if hasattr(module, name):
            raise ValueError(
                f"`name` must be unused in {site}, which already has {name!r}; pass "
                "another name."
            )
        block = _made(attention, y.shape[-1], rngs=rngs, **fields)
        dims = block.linen.spatial_dims if isinstance(block, Attention) else None
        check_batch_axis(dims, y.shape, axes, site)
        size = sum(a.size for a in jax.tree.leaves(nnx.state(block, nnx.Param)))
        made[path] = block, Site(joined(path), type(module).__name__, y.shape, size)
    blocks = {path: block for path, (block, _) in made.items()}
    probe = nnx.clone(model)
    _attach(modules(probe), nnx.clone(blocks), name)
    try:
        _trace(probe, args, kwargs)
    except Exception as error:
        raise ValueError(
            f"`attention` cannot run after {listed(map(joined, blocks))} "
            f"({type(error).__name__}: {error}); inside nnx.scan and nnx.vmap, add the "
            "block in the model's code."
        ) from error
    _attach(inside, blocks, name)
    return Sites(site for _, site in made.values())


def _attach(inside: Any, blocks: Mapping[Place, nnx.Module], name: str) -> None:
    for path, block in blocks.items():
        kind: Any = type(inside[path])
        setattr(inside[path], name, block)
        become(inside[path], _attended(kind, name))


def _made(attention: Any, features: int, **fields: Any) -> nnx.Module:
    try:
        block = attention(features, **fields)
    except TypeError as error:
        names = ", ".join(f"{field}=..." for field in fields)
        raise ValueError(
            f"`attention` must be callable as attention({features}, {names}), got "
            f"{attention!r}, which raises {error}; pass e.g. flax_attn.nnx.SE."
        ) from error
    if not isinstance(block, nnx.Module):
        raise ValueError(
            f"`attention` must return an NNX module, got {attention!r}, which returns "
            f"{block!r}; pass e.g. flax_attn.nnx.SE."
        )
    return block


def attention_params(model: nnx.Module) -> Any:
    """Returns an NNX filter for all attention parameters in ``model``.

    For an optimizer that trains only the attention, or excludes it::

      >>> from flax import nnx
      >>> import flax_attn.nnx
      >>> model = nnx.Sequential(
      ...     nnx.Conv(3, 64, (3, 3), rngs=nnx.Rngs(0)),
      ...     flax_attn.nnx.ECA(64, rngs=nnx.Rngs(1)),
      ... )
      >>> wrt = attention_params(model)
      >>> [path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))]
      [('layers', 1, 'conv', 'kernel')]

    Pass it as ``nnx.Optimizer(model, tx, wrt=wrt)`` and
    ``nnx.grad(loss, argnums=nnx.DiffState(0, wrt))``; the rest is
    ``nnx.All(nnx.Param, nnx.Not(wrt))``.

    Args:
      model: any NNX module with blocks of flax_attn or inserted attention.

    Raises:
      ValueError: there is no attention in ``model``.
    """
    roots = []
    for path, module in modules(model).items():
        if isinstance(module, Attention):
            roots.append(path)
        roots += [(*path, name) for name in getattr(module, "_attention_names", ())]
    if not roots:
        raise ValueError(
            f"`model` must contain attention, got {type(model).__name__} without any; "
            "add a block, such as flax_attn.nnx.SE."
        )

    def inside(path: Place, value: Any) -> bool:
        return any(path[: len(root)] == root for root in roots)

    return nnx.All(nnx.Param, inside)


def _submodules(model: nnx.Module) -> Iterator[tuple[Place, nnx.Module]]:
    """All modules in ``model`` but itself and those of attention."""
    closed: list[Place] = []
    for path, module in modules(model).items():
        if any(path[: len(root)] == root for root in closed):
            continue
        if isinstance(module, Attention):
            closed.append(path)
            continue
        closed += [(*path, name) for name in getattr(module, "_attention_names", ())]
        if path:
            yield path, module


def _outputs(model: nnx.Module, chosen: set[Place], args: Any, kwargs: Any) -> Any:
    """The maps that the chosen submodules return, in the order of their calls."""
    probe = nnx.clone(model)
    outputs: dict[Place, jax.ShapeDtypeStruct] = {}
    for path, module in modules(probe).items():
        if path in chosen:
            become(module, _recording(type(module), path, _shapes(module), outputs))
    _trace(probe, args, kwargs)
    return outputs


def _trace(model: nnx.Module, args: Any, kwargs: Any) -> None:
    """Calls ``model`` without computing anything."""
    arrays, arguments = separate_arrays(args, kwargs)

    def call(model: Any, arrays: list[Any]) -> Any:
        args, kwargs = arguments(arrays)
        return model(*args, **kwargs)

    nnx.eval_shape(call, model, arrays)


def _recording(
    kind: Any, path: Place, shapes: Any, outputs: dict[Place, jax.ShapeDtypeStruct]
) -> type:
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        y = result[0] if isinstance(result, tuple) and result else result
        site = f"{joined(path)} ({kind.__name__})"
        check_map(y, site)
        if _shapes(self) != shapes:
            raise ValueError(
                "`where` must select submodules outside nnx.scan and nnx.vmap, got "
                f"{site}, whose parameters are stacked; add the block in its code."
            )
        outputs.setdefault(path, jax.ShapeDtypeStruct(y.shape, y.dtype))
        return result

    return type(kind.__name__, (kind,), {"__call__": call})


@cache
def _attended(kind: Any, name: str) -> type:
    """The class of a submodule that has attention: one for each, so that jit knows it.

    The module itself changes, not its place, so that the paths of variables stay.
    """

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, *args, **kwargs)
        if not isinstance(y, tuple):
            return _attend(getattr(self, name), y)
        first = _attend(getattr(self, name), y[0])
        make = type(y)._make if hasattr(y, "_make") else type(y)
        return make((first, *y[1:]))

    names = (*getattr(kind, "_attention_names", ()), name)
    # With methods of its own, since the tabulate of Flax 0.11 leaves those changed that
    # one class in a model inherits from another.
    methods = {
        method: function
        for method in dir(kind)
        if not method.startswith("_")
        and inspect.isfunction(function := inspect.getattr_static(kind, method))
    }
    members = {
        "__call__": call,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "_attention_names": names,
    }
    return type(kind.__name__, (kind,), methods | members)


def _attend(block: Any, y: Any) -> Any:
    out = block(y)
    if getattr(out, "shape", None) != y.shape:
        raise ValueError(
            f"`attention` must keep the shape {y.shape} of its input, but "
            f"{type(block).__name__} returns {described(out)}."
        )
    return out.astype(y.dtype)


def _shapes(module: nnx.Module) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
