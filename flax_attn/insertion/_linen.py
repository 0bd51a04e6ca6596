"""What insertion does with Linen's internals: hooks and interceptors.

``Intercepted`` runs a model's methods with a ``Hook``, which sees each call of a
submodule as a ``Call``. ``watch`` does so for an observer; ``attached`` binds an
attention below a submodule.
"""

import dataclasses
import functools
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flax import linen as nn
from flax.core import freeze
from flax.linen import module as linen_module

from flax_attn.blocks import Attention
from flax_attn.insertion._scopes import Path as Path
from flax_attn.insertion._scopes import flagged, path_of, placed, scope_of

_SITE = "flax_attn.site"
"""The flag of scopes of inserted attention."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a method of a bound module.

    Attributes:
      module: the module.
      method: the name of the method.
      args: its positional arguments.
    """

    module: nn.Module
    method: str
    args: tuple[Any, ...]

    @property
    def path(self) -> Path:
        """The module's path in the tree of variables."""
        return path_of(self.module)

    @property
    def gate(self) -> str | None:
        """The name under which the method sows a gate, if it does."""
        if not isinstance(self.module, Attention):
            return None
        return self.module.gates.get(self.method)

    @property
    def in_attention(self) -> bool:
        """Whether the module is an inserted attention or inside one."""
        return scope_of(self.module).has_flag(_SITE)

    @property
    def site(self) -> str | None:
        """The class name of the submodule that this inserted attention follows.

        None for all other calls, including those inside inserted attention.
        """
        scope = scope_of(self.module)
        if self.method != "__call__" or not scope.has_flag(_SITE):
            return None
        if scope.parent is None or scope.parent.has_flag(_SITE):
            return None
        return scope.get_flag(_SITE)


Watcher = Callable[[Call, Callable[[], Any]], Any]


@contextmanager
def intercepting(watcher: Watcher) -> Iterator[None]:
    """Replaces each call of a bound module's method by ``watcher(call, run)``.

    ``run()`` makes the call. Modules without a path are left alone.
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        run = functools.partial(next_fun, *args, **kwargs)
        scope = context.module.scope
        # Transformations check setup in a scope of its own, without a place.
        if scope is None or isinstance(scope.root, linen_module.TestScope):
            return run()
        with placed(context.module):
            return watcher(Call(context.module, context.method_name, args), run)

    with nn.intercept_methods(interceptor):
        yield


@contextmanager
def recorded_once(model: nn.Module) -> Iterator[None]:
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


def attached(
    attention: nn.Module, module: nn.Module, name: str, token: str
) -> nn.Module | None:
    """``attention`` bound below ``module`` as ``name``, or None if that is taken.

    It has a scope and is no submodule, which Linen forbids outside compact methods.
    ``token`` tells a second call of the module from a name that the module uses itself.
    """
    scope = scope_of(module)
    taken = scope.reservations.get(name, set())
    if taken and token not in taken:
        return None
    child = scope.push(name, reuse=True)
    scope.reservations[name].add(token)
    child.flags = freeze({**child.flags, _SITE: type(module).__name__})
    return attention.clone(parent=child, name=name)


class Hook:
    """A model, and what an ``Intercepted`` does besides calling its methods.

    Hashable by identity alone and not by contents: nn.jit caches what it compiled by
    hash, and two hooks must differ however alike they look. Neither a dataclass nor,
    for Linen, a submodule, so the model has the scope of the ``Intercepted``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.token: str = str(uuid.uuid4())

    def __hash__(self) -> int:
        return hash(self.token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hook) and self.token == other.token

    def run(self, model: nn.Module, method: str, call: "functools.partial[Any]") -> Any:
        """Returns ``call()``, of a ``method`` of the bound model, and does its part."""
        raise NotImplementedError


class Intercepted(nn.Module):
    """A model whose methods run with a hook; its variables are those of the model.

    Attributes:
      hook: the model, and what happens besides.
    """

    hook: Hook

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
            for cls in type(innermost(self)).__mro__
            if cls not in nn.Module.__mro__
            for value in vars(cls).values()
        )
        if method is None or all(unwrapped(unbound) is not f for f in functions):
            return method
        return lambda self, *args, **kwargs: self._run(unbound, args, kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """The fields of the model, and its methods, run with the hook."""
        if "hook" not in vars(self) or name.startswith("_"):
            return super().__getattr__(name)
        model = innermost(self)
        is_field = name in field_names(model)
        value = getattr(model if is_field else type(model), name, None)
        if is_field and not isinstance(value, nn.Module):
            return value
        if not callable(value):
            kind = type(model).__name__
            raise AttributeError(
                f"The {type(self).__name__} {kind} has no attribute {name!r}, only the "
                f"fields and methods of {kind}; access attributes of setup from a "
                f"method of {kind}."
            )

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return types.MethodType(method, self)

    def _run(self, method: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        unnamed = getattr(unwrapped(method), "__name__", repr(method))
        name = method if isinstance(method, str) else unnamed
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
        with flagged(model, self.hook.token):
            return self.hook.run(model, name, functools.partial(call, *args, **kwargs))


def with_hook(kind: type[Intercepted], hook: Hook, **fields: Any) -> Intercepted:
    """An ``Intercepted`` of the class ``kind`` for ``hook``."""
    module = kind(hook, **fields)
    if module.parent is None and hook.model.scope is not None:
        # Bound by bind and not made in a method: its variables are not the call's.
        hook.model = hook.model.copy(parent=None)
    return module


class _Watch(Hook):
    """Gives each call to a watcher."""

    def __init__(self, model: nn.Module, watcher: Watcher) -> None:
        super().__init__(model)
        self.watcher = watcher

    def run(self, model: nn.Module, method: str, call: "functools.partial[Any]") -> Any:
        """Returns ``call()``."""
        with intercepting(self.watcher):
            return call()


class _Watched(Intercepted):
    """A model that is watched."""

    @nn.nowrap
    def _hooked(self, method: Any) -> Any:
        """``method``, run on the model itself, any function of the user's included."""
        if method is None or isinstance(method, str):
            return method
        if isinstance(method, types.MethodType) and isinstance(
            method.__self__, nn.Module
        ):
            method = method.__func__
        return lambda self, *args, **kwargs: self._run(method, args, kwargs)


def watch(model: nn.Module, watcher: Watcher) -> Intercepted:
    """Returns ``model`` with every method call of a submodule passed to ``watcher``.

    Functions compiled by nn.jit are traced again, so no call is missed::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax_attn.insertion import watch
      >>> def watcher(call, run):
      ...     result = run()
      ...     if call.gate:
      ...         print("/".join(call.path), call.gate, result.shape)
      ...     return result
      >>> watched = watch(flax_attn.CBAM(), watcher)
      >>> x = jnp.ones((2, 8, 8, 64))
      >>> variables = jax.eval_shape(watched.init, jax.random.key(0), x)
      channel channel_gate (2, 1, 1, 64)
      spatial spatial_gate (2, 8, 8, 1)

    Args:
      model: any Linen module.
      watcher: function of a ``Call`` and ``run`` that returns the result to use.
        ``run()`` makes the call and returns its result.

    Returns:
      A Linen module with the same interface and variables as ``model``.
    """
    return with_hook(_Watched, _Watch(model, watcher), parent=None)


def innermost(model: nn.Module) -> nn.Module:
    """The model without the ``Intercepted`` around it."""
    while isinstance(model, Intercepted):
        model = model.hook.model
    return model


def field_names(module: nn.Module) -> set[str]:
    """The names of a module's fields."""
    return {field.name for field in dataclasses.fields(module)}


def unwrapped(function: Any) -> Any:
    """The function inside a ``functools.partial``, or ``function`` itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function
