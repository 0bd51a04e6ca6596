"""Linen's scopes: where a module's variables are, and flags for what it compiles."""

from collections.abc import Iterator
from contextlib import contextmanager

from flax import linen as nn
from flax.core import freeze
from flax.core.scope import Scope

Path = tuple[str, ...]

# A scope's flags are inherited by all scopes below it and are part of nn.jit's cache
# key.
_HOOKS = "flax_attn.hooks"
_PLACE = "flax_attn.place"


@contextmanager
def flagged(model: nn.Module, token: str) -> Iterator[None]:
    """Keeps what nn.jit compiles in here apart from what it compiles elsewhere."""
    scope = scope_of(model)
    flags = scope.flags
    scope.flags = freeze({**flags, _HOOKS: (*flags.get(_HOOKS, ()), token)})
    try:
        yield
    finally:
        # A compact method leaves its module with another scope, of the same flags.
        scope.flags = scope_of(model).flags = flags


@contextmanager
def placed(module: nn.Module) -> Iterator[None]:
    """Corrects paths and sets flags in ``module`` before transformations copy them.

    nn.jit needs the flags of all: fields are bound before the hooks are known, and
    modules with equal fields and flags share a program wherever they are.
    """
    hooks = scope_of(module).flags.get(_HOOKS, ())
    before = []

    def place(inside: nn.Module) -> None:
        scope = scope_of(inside)
        before.append((inside, scope, scope.flags))
        own = {_HOOKS: hooks, _PLACE: path_of(inside)}
        scope.flags = freeze({**scope.flags, **own})
        for child in inside._state.children.values():
            if isinstance(child, nn.Module) and child.scope is not None:
                place(child)

    place(module)
    try:
        yield
    finally:
        for inside, scope, flags in reversed(before):
            # A compact method leaves its module with another scope.
            scope.flags = scope_of(inside).flags = flags


def scope_of(module: nn.Module) -> Scope:
    if module.scope is None:
        raise ValueError(
            f"`model` must be bound, but {type(module).__name__} in it is not; call it "
            "in init or apply."
        )
    return module.scope


def path_of(module: nn.Module) -> Path:
    """Where the variables of a bound module lie, unlike ``module.path``.

    nn.share_scope gives scopes another parent and leaves them their old paths.
    """
    return _correct_path(scope_of(module))


def _correct_path(scope: Scope) -> Path:
    # Without a parent, it is that of the model or a copy that a transformation made.
    if scope.parent is not None and scope.name is not None:
        scope.path = (*_correct_path(scope.parent), scope.name)
    return scope.path
