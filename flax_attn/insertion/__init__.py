"""Attention in a Linen model that somebody else wrote, without touching its code.

``insert`` runs a block after the submodules of one's choice; ``sites`` says where,
``assert_active`` that the gates act, ``merge`` moves pretrained variables in and
``parameter_labels`` tells an optimiser which parameters are the attention's.
"""

import dataclasses
import fnmatch
import functools
import re
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import freeze, meta
from flax.core.scope import Scope
from flax.linen import module as linen_module

from flax_attn.blocks.bam import BAM
from flax_attn.blocks.cbam import CBAM
from flax_attn.blocks.channel import ECA, SE, ChannelAttention
from flax_attn.blocks.scse import scSE
from flax_attn.blocks.spatial import SpatialAttention
from flax_attn.functional import Array

Path = tuple[str, ...]
Select = Callable[[nn.Module, str], bool]
Where = type | tuple[type, ...] | str | re.Pattern[str] | Select

# Flags of a scope go down to all scopes below it, and nn.jit's cache tells them apart.
_HOOKS = "flax_attn.hooks"
_SITE = "flax_attn.site"

_GATES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((SE, ECA, ChannelAttention), "channel_gate"),
    ((SpatialAttention,), "gate_of"),
    ((scSE,), "spatial_gate"),
    ((BAM,), "element_gate"),
)
_BLOCKS = (SE, ECA, ChannelAttention, SpatialAttention, CBAM, BAM, scSE)


def insert(
    model: nn.Module,
    attention: nn.Module | Callable[..., nn.Module],
    where: Where,
    *,
    init: Literal["identity"] | None = None,
    name: str = "attention",
) -> nn.Module:
    """Returns ``model`` with ``attention`` after the submodules that ``where`` selects.

    The model's code stays as it is::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
      ...         x = nn.relu(nn.Conv(32, (3, 3), name="second")(x))
      ...         return nn.Dense(10)(x.mean((-3, -2)))
      >>> model = flax_attn.insert(Model(), flax_attn.SE(), nn.Conv)
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> print(flax_attn.sites(model, x))
      path    type  output          parameters
      first   Conv  (2, 8, 8, 16)           32
      second  Conv  (2, 8, 8, 32)          128
      total                                160
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> jax.tree.map(jnp.shape, params["first"]["attention"])
      {'expand': {'kernel': (1, 16)}, 'reduce': {'kernel': (16, 1)}}

    The result is called as ``model`` is, with the same arguments and by the same
    methods, and its variables are those of ``model`` with new ones between them: those
    of each attention lie under its submodule's, as ``name``. A submodule that is called
    twice has one attention. What ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit``
    do to a submodule they do to its attention, so a scan has one for every step.
    Attention is never inserted into attention that was inserted, nor after ``model``
    itself. Each result has the dtype of the output that it replaces.

    Args:
      model: any Linen module.
      attention: a module that maps ``(..., H, W, C)`` to the same shape, or a function
        without arguments that returns one, such as a class or a
        ``functools.partial`` of one. Each submodule gets a copy.
      where: the submodules, by one of

        * a subclass of ``nn.Module`` or a tuple of them: their instances;
        * a pattern such as ``"stage*/norm2"``, which the whole path has to match, names
          joined by slashes (see ``fnmatch``; ``*`` matches slashes too);
        * a compiled regular expression, which the whole path has to match;
        * a function from the module and its path to a bool.
      init: ``"identity"`` for gates that start at exactly 1, so that each site passes
        its map on bit for bit at first; it sets ``identity_init`` of ``attention``
        (default: None, which leaves ``attention`` as it is). The output is then that
        of ``model``, without jit to the last bit; under jit the compiler may sum in
        another order around a site.
      name: the name of the attention below each submodule, without slashes (default:
        "attention").

    Returns:
      A Linen module. To give it pretrained variables see ``merge``.

    Raises:
      ValueError: for an argument out of its range. Also, when the result is first
        initialised or applied: if ``where`` selects no submodule that is called, if
        the output of one that it selects is not one array of 3 axes or more, if
        ``attention`` changes its shape, or if ``name`` is taken there.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "`model` must be an instance of a Linen module, got "
            f"{model!r}; pass e.g. Model()."
        )
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(
            "`name` must be a string that is not empty and has no slash, got "
            f"{name!r}; leave it out for 'attention'."
        )
    block = _instance(attention)
    if init is not None:
        block = _starting_as(init, block)
    hook = _Insertion(model, block, _selector(where), where, name)
    return _with_hook(Inserted, hook)


def _instance(attention: Any) -> nn.Module:
    if isinstance(attention, nn.Module):
        return attention.clone(parent=None, name=None)
    made = attention
    if callable(attention):
        # A module made inside another one's method would become a part of that one.
        keywords = {"parent": None} if _is_module_def(attention) else {}
        try:
            made = attention(**keywords)
        except TypeError as error:
            raise ValueError(
                f"`attention` must need no arguments, got {attention!r}, whose call "
                f"raises {error}; give it them, as in presets.official_cbam(train=True)"
                " or functools.partial(SE, reduction=4)."
            ) from error
    if isinstance(made, nn.Module):
        return made.clone(parent=None, name=None)
    raise ValueError(
        "`attention` must be a Linen module, or a function that returns one, got "
        f"{attention!r}; pass e.g. flax_attn.SE()."
    )


def _is_module_def(value: Any) -> bool:
    value = _function(value)
    return isinstance(value, type) and issubclass(value, nn.Module)


def _function(value: Any) -> Any:
    while isinstance(value, functools.partial):
        value = value.func
    return value


def _fields(module: nn.Module) -> set[str]:
    return {field.name for field in dataclasses.fields(module)}


def _starting_as(init: str, block: nn.Module) -> nn.Module:
    if init != "identity":
        raise ValueError(
            f"`init` must be 'identity' or None, got {init!r}; leave it out for an "
            "attention that starts as its own fields say."
        )
    if "identity_init" not in _fields(block):
        raise ValueError(
            "`init='identity'` needs an attention with a field `identity_init`, got "
            f"{type(block).__name__}; pass a block of flax_attn, or init=None and an "
            "attention that starts as the identity by itself."
        )
    return block.clone(identity_init=True)


def _selector(where: Any) -> Select:
    """``where`` as a function from a module and its path."""
    kinds = where if isinstance(where, tuple) else (where,)
    if kinds and all(isinstance(k, type) and _is_module_def(k) for k in kinds):
        return lambda module, path: isinstance(module, kinds)
    if isinstance(where, str):
        return lambda module, path: fnmatch.fnmatchcase(path, where)
    if isinstance(where, re.Pattern):
        return lambda module, path: where.fullmatch(path) is not None
    if callable(where) and not isinstance(where, type | nn.Module):
        return lambda module, path: bool(where(module, path))
    raise ValueError(
        "`where` must be a subclass of nn.Module or a tuple of them, a pattern of "
        f"paths, or a function (module, path) -> bool, got {where!r}; several "
        "classes go into a tuple, such as (nn.Conv, nn.Dense)."
    )


class _Hook:
    """A model, and what an ``Intercepted`` does besides calling its methods.

    Neither a dataclass nor hashable by its contents: nn.jit keeps what it compiled by
    hashes, and those of two hooks must differ however alike the two look. For Linen it
    is no submodule either, so the model needs no scope but that of the ``Intercepted``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.token = str(uuid.uuid4())

    def __hash__(self) -> int:
        return hash(self.token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hook) and self.token == other.token

    def run(self, model: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Returns ``call()``, of a ``method`` of the bound model, and does its part."""
        raise NotImplementedError


@contextmanager
def _recorded_once(model: nn.Module) -> Iterator[None]:
    """Keeps ``capture_intermediates`` from recording what the wrapper records too."""
    stack = linen_module._context.capture_stack
    outer = stack[-1] if stack else None
    if not outer:
        yield
        return
    stack.append(lambda module, method: module is not model and outer(module, method))
    try:
        yield
    finally:
        stack.pop()


class _Insertion(_Hook):
    """Runs an attention after the submodules that a function selects."""

    def __init__(
        self,
        model: nn.Module,
        attention: nn.Module,
        select: Select,
        where: Where,
        name: str,
    ) -> None:
        super().__init__(model)
        self.attention = attention
        self.select = select
        self.where = where
        self.name = name
        # The attentions that have run, those with parameters by their paths.
        self.found: set[Path] = set()
        self.bare = False

    def __repr__(self) -> str:
        return (
            f"{type(self.attention).__name__} as {self.name!r} after {self.where!r} "
            f"in {self.model!r}"
        )

    def run(self, model: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Returns ``call()`` with the attentions in it."""
        base = _scope(model).path
        seen: dict[str, str] = {}
        within: set[Path] = set()
        sites: set[Path] = set()

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, context.module.path
            if (
                context.method_name != "__call__"
                or path == base
                # A module that calls super().__call__, or wraps one in its own scope.
                or path in within
                or _scope(module).has_flag(_SITE)
            ):
                return next_fun(*args, **kwargs)
            inner = path[len(base) :] if path[: len(base)] == base else path
            seen["/".join(inner)] = type(module).__name__
            if not self.select(module, "/".join(inner)):
                return next_fun(*args, **kwargs)
            within.add(path)
            sites.add(path)
            try:
                y = next_fun(*args, **kwargs)
            finally:
                within.discard(path)
            return self.attend(module, "/".join(inner), y)

        with nn.intercept_methods(_on_bound(interceptor)), _recorded_once(model):
            result = call()
        if not sites and not self.known(model):
            raise ValueError(
                f"`where` must select a submodule that {type(_inmost(model)).__name__}."
                f"{method} calls, got {self.where!r}, which selects none of "
                f"{_listed(f'{path} ({kind})' for path, kind in seen.items())}."
            )
        return result

    def known(self, model: nn.Module) -> bool:
        """Whether a call that meets no site is in order.

        What nn.jit has compiled runs without a call, but not before its first trace.
        And a call may use a part of the model that has none, if another part has. The
        variables tell, not what this object met before, which a new one has not.
        """
        if self.bare:
            return True
        params = _plain(_scope(model).variables().get("params", {}))
        paths = traverse_util.flatten_dict(params)
        if model.is_initializing():
            # Where the model itself may have a submodule of that name.
            return any(
                path[: len(site)] == site for path in paths for site in self.found
            )
        return any(self.name in path for path in paths)

    def attend(self, module: nn.Module, path: str, y: Any) -> Array:
        """Returns ``y``, the output of ``module``, after an attention of its own."""
        if not isinstance(y, jax.Array | np.ndarray) or y.ndim < 3:
            raise ValueError(
                "`where` must select submodules that return one feature map "
                f"(..., H, W, C), but {path} ({type(module).__name__}) returns "
                f"{_described(y)}; select others, e.g. by a function of the path."
            )
        scope = self.child(_scope(module), module, path)
        out = self.attention.clone(parent=scope, name=self.name)(y)
        if not isinstance(out, jax.Array) or out.shape != y.shape:
            raise ValueError(
                f"`attention` must keep the shape {y.shape} of its input at {path}, "
                f"but {type(self.attention).__name__} returns {_described(out)}."
            )
        if scope.variables().get("params"):
            self.found.add((*path.split("/"), self.name))
        else:
            self.bare = True
        return out.astype(y.dtype)

    def child(self, scope: Scope, module: nn.Module, path: str) -> Scope:
        """The attention's scope, below that of its module.

        A submodule is not to be had here: outside compact methods Linen forbids it.
        """
        taken = scope.reservations.get(self.name, set())
        # The mark tells a second call of the module from a name that it uses itself.
        if taken and self.token not in taken:
            raise ValueError(
                f"`name` must be free below {path} ({type(module).__name__}), which "
                f"has a {self.name!r} already; pass another name."
            )
        child = scope.push(self.name, reuse=True)
        scope.reservations[self.name].add(self.token)
        child.flags = freeze({**child.flags, _SITE: type(module).__name__})
        return child


class Intercepted(nn.Module):
    """A model whose methods run with a hook; its variables are those of the model.

    Attributes:
      hook: the model, and what happens besides.
    """

    hook: _Hook

    def __post_init__(self) -> None:
        """Takes over the scope of a model that a method of another module has made."""
        super().__post_init__()
        scope = self.hook.model.scope
        if isinstance(self.parent, nn.Module) and self.scope and scope:
            # Before any transformation, which is to lift this scope. Rewound, as the
            # model's own calls reserve the names of its submodules.
            object.__setattr__(self, "scope", scope.rewound())

    def setup(self) -> None:
        """Binds the model to this module's scope."""
        # Not as an attribute that Linen sees, which would name it below this module.
        bound = self.hook.model.clone(parent=self.scope)
        object.__setattr__(self, "_bound", bound)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns ``model(*args, **kwargs)``, run with the hook."""
        return self._run("__call__", args, kwargs)

    @nn.nowrap
    def apply(
        self, variables: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """As for any module; a ``method`` such as ``Model.encode`` has the hook too."""
        method = self._hooked(method)
        return super().apply(variables, *args, method=method, **kwargs)

    @nn.nowrap
    def init_with_output(
        self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any
    ) -> Any:
        """As ``apply``. ``init``, ``lazy_init`` and ``tabulate`` go through here."""
        method = self._hooked(method)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def _hooked(self, method: Any) -> Any:
        """``method``, run on the model and with the hook if it is of the model's class.

        Linen would call Model.encode with this module as self, hence without.
        """
        unbound = method.__func__ if isinstance(method, types.MethodType) else method
        functions = (
            value
            for cls in type(_inmost(self)).__mro__
            if cls not in nn.Module.__mro__
            for value in vars(cls).values()
        )
        if method is None or all(_function(unbound) is not f for f in functions):
            return method
        return lambda self, *args, **kwargs: self._run(unbound, args, kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """The fields of the model, and its methods, run with the hook."""
        if "hook" not in vars(self) or name.startswith("_"):
            return super().__getattr__(name)
        model = _inmost(self)
        value = getattr(model if name in _fields(model) else type(model), name, None)
        if name in _fields(model) and not isinstance(value, nn.Module):
            return value
        if not callable(value):
            kind = type(model).__name__
            raise AttributeError(
                f"The {type(self).__name__} {kind} has no attribute {name!r}, only the "
                f"fields and methods of {kind}; use what its setup makes in a method "
                f"of {kind}."
            )

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return types.MethodType(method, self)

    def _run(self, method: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = method if isinstance(method, str) else _function(method).__name__
        if self.scope is None:
            raise ValueError(
                f"`model` must be bound, but {name} is called outside of init and "
                "apply; call model.init, model.apply or model.bind."
            )
        model: nn.Module = vars(self)["_bound"]
        if isinstance(method, str):
            call = getattr(model, method)
        elif isinstance(model, Intercepted):
            call = types.MethodType(model._hooked(method), model)
        else:
            call = types.MethodType(method, model)
        with _flagged(model, self.hook.token):
            return self.hook.run(model, name, functools.partial(call, *args, **kwargs))


def _with_hook(kind: type[Intercepted], hook: _Hook) -> Intercepted:
    module = kind(hook)
    if module.parent is None and hook.model.scope is not None:
        # Not made in a method but by bind: its variables are not those of the call.
        hook.model = hook.model.copy(parent=None)
    return module


def _inmost(model: nn.Module) -> nn.Module:
    while isinstance(model, Intercepted):
        model = model.hook.model
    return model


class Inserted(Intercepted):
    """A model with attention in it, as ``insert`` returns it.

    Attributes:
      hook: the model, the attention and where it is to be.
    """


@contextmanager
def _flagged(model: nn.Module, token: str) -> Iterator[None]:
    """Keeps what nn.jit compiles in here apart from what it compiles elsewhere."""
    scope = _scope(model)
    flags = scope.flags
    scope.flags = freeze({**flags, _HOOKS: (*flags.get(_HOOKS, ()), token)})
    try:
        yield
    finally:
        # A compact method leaves its module with another scope, of the same flags.
        scope.flags = _scope(model).flags = flags


def _scope(module: nn.Module) -> Scope:
    if module.scope is None:
        raise ValueError(
            f"`model` must be bound, but {type(module).__name__} in it is not; call it "
            "in init or apply."
        )
    return module.scope


def _described(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    shapes = [np.shape(x) for x in jax.tree.leaves(value) if hasattr(x, "shape")]
    return f"a {type(value).__name__} of arrays of shapes {shapes}"


def _listed(items: Iterable[str], *, most: int = 30) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none at all") + more


class Site(NamedTuple):
    """One place at which attention was inserted.

    Attributes:
      path: of the submodule, names joined by slashes.
      type: name of the submodule's class.
      shape: of its output, as the attention sees it.
      parameters: how many the attention adds.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    parameters: int


class Sites(tuple[Site, ...]):
    """Sites in the order of the first calls; ``str`` makes a table of them."""

    @property
    def parameters(self) -> int:
        """How many parameters all of them add."""
        return sum(site.parameters for site in self)

    def __str__(self) -> str:
        """The sites, one a line, and their total."""
        rows = [("path", "type", "output", "parameters")]
        rows += [(s.path, s.type, str(s.shape), f"{s.parameters:,}") for s in self]
        rows += [("total", "", "", f"{self.parameters:,}")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


class _Watch(_Hook):
    """Intercepts the calls of a model with any function."""

    def __init__(self, model: nn.Module, interceptor: Callable[..., Any]) -> None:
        super().__init__(model)
        self.interceptor = interceptor

    def run(self, model: nn.Module, method: str, call: Callable[[], Any]) -> Any:
        """Returns ``call()``."""
        with nn.intercept_methods(_on_bound(self.interceptor)):
            return call()


def _watched(model: nn.Module, interceptor: Callable[..., Any]) -> Intercepted:
    return _with_hook(Intercepted, _Watch(model, interceptor))


def _on_bound(interceptor: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves alone the methods of modules without a scope, which have no path."""

    def on_bound(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is None:
            return next_fun(*args, **kwargs)
        return interceptor(next_fun, args, kwargs, context)

    return on_bound


def _is_inserted(context: Any) -> bool:
    """Whether this is the call of an inserted attention, not one inside it."""
    scope = context.module.scope
    return (
        context.method_name == "__call__"
        and scope.has_flag(_SITE)
        and scope.parent is not None
        and not scope.parent.has_flag(_SITE)
    )


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> Sites:
    """Returns where attention is inserted in ``model``, with shapes and parameters.

    Nothing is computed; ``print`` makes a table of the result::

      >>> import flax_attn, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> chain = nn.Sequential([nn.Conv(64, (3, 3)), nn.relu, nn.Conv(128, (3, 3))])
      >>> model = flax_attn.insert(chain, flax_attn.ECA(), nn.Conv)
      >>> found = flax_attn.sites(model, jnp.ones((2, 8, 8, 3)))
      >>> print(found)
      path      type  output           parameters
      layers_0  Conv  (2, 8, 8, 64)             3
      layers_2  Conv  (2, 8, 8, 128)            5
      total                                     8
      >>> found[0]
      Site(path='layers_0', type='Conv', shape=(2, 8, 8, 64), parameters=3)

    Args:
      model: a module that ``insert`` returned, or one with such modules in it.
      *args: the arguments of ``model.init`` after the keys; shapes are enough, as
        ``jax.ShapeDtypeStruct``.
      **kwargs: its keyword arguments.

    Returns:
      A tuple of ``Site``. Inside ``nn.scan`` and ``nn.vmap`` the shape is that of one
      step, while the parameters are those of all.

    Raises:
      ValueError: if nothing is inserted in ``model``, or whatever its call raises.
    """
    found: dict[Path, tuple[str, tuple[int, ...]]] = {}

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if _is_inserted(context):
            kind = context.module.scope.get_flag(_SITE)
            found.setdefault(context.module.path, (kind, args[0].shape))
        return next_fun(*args, **kwargs)

    params = _parameters(_watched(model, interceptor), args, kwargs)
    if not found:
        raise ValueError(
            "`model` must have attention inserted, got "
            f"{type(model).__name__} with none; make it with flax_attn.insert."
        )
    return Sites(
        Site("/".join(path[:-1]), kind, shape, _count(params, path))
        for path, (kind, shape) in found.items()
    )


def _parameters(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The shapes of the parameters that ``model.init`` gives."""
    dynamic, call = _split(args, kwargs)

    def init(dynamic: list[Any]) -> Any:
        args, kwargs = call(dynamic)
        return model.init(jax.random.key(0), *args, **kwargs)

    return jax.eval_shape(init, dynamic).get("params", {})


def _split(args: Any, kwargs: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays among the arguments, and the way back to all of the arguments."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def call(dynamic: list[Any]) -> Any:
        filled = list(leaves)
        for i, leaf in zip(places, dynamic, strict=True):
            filled[i] = leaf
        return jax.tree.unflatten(tree, filled)

    return [leaves[i] for i in places], call


def _count(params: Any, path: Path) -> int:
    for name in path:
        params = params.get(name, {})
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def assert_active(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> tuple[str, ...]:
    """Asserts that every gate of ``model`` moves its output.

    The gates of all blocks of flax_attn are found, inserted or written in by hand. To
    each in turn numbers between 0.5 and 1.5 are added, in the same compiled program::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> class Forgetful(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         y = flax_attn.SE(name="kept")(x)
      ...         flax_attn.SE(name="lost")(x)
      ...         return y
      >>> x, model = jnp.ones((2, 4, 4, 8)), Forgetful()
      >>> variables = model.init(jax.random.key(0), x)
      >>> flax_attn.assert_active(model, variables, x)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      AssertionError: The output does not depend on the gates of lost. ...

    An inserted attention of another kind counts as one gate, with its result for it. A
    gate inside ``nn.scan`` or ``nn.vmap`` is one gate for all steps.

    Args:
      model: any Linen module.
      variables: its variables.
      *args: the arguments of ``model.apply`` after the variables.
      **kwargs: its keyword arguments, such as ``train=False`` or ``rngs``.

    Returns:
      The paths of the gates, names joined by slashes.

    Raises:
      AssertionError: if the output stays the same, bit for bit, for any gate. That is
        also what a gate on a map of zeros does, for example after a normalisation
        whose scale starts at zero: pass trained variables.
      ValueError: if no gate is called, or if the output is not finite.
    """
    gates = _find_gates(model, variables, args, kwargs)
    if not gates:
        raise ValueError(
            "`model` must call a block of flax_attn or an inserted attention, got "
            f"{type(model).__name__}, which calls none."
        )
    run = _switchable(model, variables, args, kwargs, gates)
    expected = run(np.zeros(len(gates), np.float32))
    if not all(jnp.isfinite(x).all() for x in expected):
        raise ValueError(
            "`variables` must give a finite output, got NaN or infinity in it; pass "
            "trained variables, or smaller inputs."
        )
    dead = [
        gate
        for gate, switches in zip(gates, np.eye(len(gates), dtype="f"), strict=True)
        if all(map(np.array_equal, run(switches), expected))
    ]
    if dead:
        paths = _listed("/".join(path) or "the model itself" for path in dead)
        raise AssertionError(
            f"The output does not depend on the gates of {paths}. Either nothing uses "
            "them, or what they scale is zero, as after a scale that starts at zero; "
            "then pass trained variables."
        )
    return tuple("/".join(path) for path in gates)


def _find_gates(
    model: nn.Module, variables: Any, args: Any, kwargs: Any
) -> dict[Path, str]:
    """The gates' paths, and the methods that return them."""
    gates: dict[Path, str] = {}
    others: dict[Path, str] = {}

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        for kinds, method in _GATES:
            if isinstance(context.module, kinds) and context.method_name == method:
                gates[path] = method
        if _is_inserted(context):
            others[path] = context.method_name
        return next_fun(*args, **kwargs)

    dynamic, call = _split(args, kwargs)

    def apply(variables: Any, dynamic: list[Any]) -> Any:
        args, kwargs = call(dynamic)
        return _output(_watched(model, interceptor), variables, args, kwargs)

    jax.eval_shape(apply, variables, dynamic)
    with_gates = {path[:i] for path in gates for i in range(len(path) + 1)}
    return gates | {p: m for p, m in others.items() if p not in with_gates}


def _output(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> Any:
    """The arrays of the output alone, without the collections that come with it."""
    result: Any = model.apply(variables, *args, **kwargs)
    with_state = kwargs.get("mutable", False) is not False
    if with_state or kwargs.get("capture_intermediates", False):
        result = result[0]
    return [jnp.asarray(x) for x in jax.tree.leaves(result)]


def _switchable(
    model: nn.Module, variables: Any, args: Any, kwargs: Any, gates: dict[Path, str]
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The output as a function of one switch per gate, which moves it at 1.

    One program for all, as two compilations may differ in the last bits.
    """
    index = {path: i for i, path in enumerate(gates)}
    dynamic, call = _split(args, kwargs)

    @jax.jit
    def run(switches: Array, variables: Any, dynamic: list[Any]) -> Any:
        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            path = context.module.path
            if gates.get(path) != context.method_name:
                return y
            # Other at each element: the norms that follow undo a common factor.
            wave = 1 + jnp.sin(jnp.arange(y.size, dtype=jnp.float32)) / 2
            change = wave.reshape(y.shape).astype(y.dtype)
            return y + switches[index[path]].astype(y.dtype) * change

        args, kwargs = call(dynamic)
        return _output(_watched(model, interceptor), variables, args, kwargs)

    return lambda switches: jax.device_get(run(switches, variables, dynamic))


def merge(pretrained: Any, variables: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns ``variables`` with the values of ``pretrained``, and what is new in them.

    For a model with attention inserted and the variables that it had without::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x, model = jnp.ones((2, 8, 8, 3)), nn.Sequential([nn.Conv(16, (3, 3))])
      >>> pretrained = model.init(jax.random.key(0), x)
      >>> inserted = flax_attn.insert(model, flax_attn.SE(), nn.Conv, init="identity")
      >>> fresh = inserted.init(jax.random.key(1), x)
      >>> variables, new = flax_attn.merge(pretrained, fresh)
      >>> print(*new, sep="\\n")
      params/layers_0/attention/expand/kernel
      params/layers_0/attention/reduce/kernel
      >>> y = model.apply(pretrained, x)
      >>> bool((inserted.apply(variables, x) == y).all())
      True

    Args:
      pretrained: variables by collections, ``{"params": ...}``; those of a part of the
        model, or without a collection such as ``"batch_stats"``, will do.
      variables: variables of the new model, which have a place for each of them.

    Returns:
      The new tree, of plain dicts, and the paths of what is not in ``pretrained``, in
      order. Read them: a collection that was forgotten is among them. Pretrained
      values keep their dtype.

    Raises:
      ValueError: if values of ``pretrained`` have no place in ``variables`` or another
        shape there; it lists all of them.
    """
    old, new = (
        traverse_util.flatten_dict(_plain(tree)) for tree in (pretrained, variables)
    )
    wrong = [
        f"{'/'.join(path)} {_shape(value)} "
        + (f"against {_shape(new[path])}" if path in new else "has no place")
        for path, value in old.items()
        if path not in new or _shape(value) != _shape(new[path])
    ]
    if wrong:
        raise ValueError(
            "`pretrained` must have a place of the same shape in `variables` for each "
            f"value, got {_listed(wrong)}; pass variables of the same model, and drop "
            "from `pretrained` what is to be left out, such as another head."
        )
    merged = {
        path: _replaced(value, old[path]) if path in old else value
        for path, value in new.items()
    }
    added = sorted("/".join(path) for path in new if path not in old)
    return traverse_util.unflatten_dict(merged), tuple(added)


def _plain(tree: Any) -> Any:
    """``tree`` as dicts; FrozenDict and other mappings are opened."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree


def _shape(value: Any) -> tuple[int, ...]:
    return np.shape(meta.unbox(value))


def _replaced(value: Any, pretrained: Any) -> Any:
    # Boxes hold metadata such as the sharding, which is that of the new model.
    if isinstance(value, meta.AxisMetadata):
        return value.replace_boxed(meta.unbox(pretrained))
    return meta.unbox(pretrained)


def parameter_labels(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Returns the parameters' tree with a label for each, for an optimiser.

    The labels are ``"attention"`` for the kernels of all blocks of flax_attn and of
    all inserted attention, ``"attention_no_decay"`` for their other parameters, such
    as biases, and ``"backbone"`` for the rest::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x, model = jnp.ones((2, 8, 8, 3)), nn.Sequential([nn.Conv(16, (3, 3))])
      >>> model = flax_attn.insert(model, flax_attn.ECA(use_bias=True), nn.Conv)
      >>> labels = flax_attn.parameter_labels(model, x)
      >>> labels["layers_0"]["attention"]["conv"]
      {'bias': 'attention_no_decay', 'kernel': 'attention'}
      >>> labels["layers_0"]["kernel"]
      'backbone'

    With optax, a head start for the attention and a frozen backbone are ::

      optax.multi_transform(
          {
              "attention": optax.adamw(1e-3, weight_decay=1e-4),
              "attention_no_decay": optax.adam(1e-3),
              "backbone": optax.set_to_zero(),
          },
          labels,
      )

    and a mask, as ``optax.adamw`` and ``optax.masked`` take it, is
    ``jax.tree.map(lambda label: label == "attention", labels)``.

    Args:
      model: any Linen module.
      *args: the arguments of ``model.init`` after the keys; shapes are enough, as
        ``jax.ShapeDtypeStruct``.
      **kwargs: its keyword arguments.

    Returns:
      A tree of strings with the structure of ``model.init(key, ...)["params"]``.

    Raises:
      ValueError: if ``model`` calls no attention, or whatever its call raises.
    """
    roots: set[Path] = set()

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, _BLOCKS) or _is_inserted(context):
            roots.add(context.module.path)
        return next_fun(*args, **kwargs)

    params = _parameters(_watched(model, interceptor), args, kwargs)
    if not roots:
        raise ValueError(
            "`model` must call a block of flax_attn or an inserted attention, got "
            f"{type(model).__name__}, which calls none."
        )

    def label(keys: Any, leaf: Any) -> str:
        path = tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))
        if not any(path[:i] in roots for i in range(len(path) + 1)):
            return "backbone"
        return "attention" if path[-1] == "kernel" else "attention_no_decay"

    return jax.tree_util.tree_map_with_path(label, params)
