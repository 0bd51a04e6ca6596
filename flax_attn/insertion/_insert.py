"""``insert``: its arguments, and what runs after the submodules that it selects."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
from flax import linen as nn
from flax import traverse_util

from flax_attn.insertion._linen import (
    Call,
    Hook,
    Intercepted,
    Path,
    attached,
    field_names,
    innermost,
    intercepting,
    recorded_once,
    with_hook,
)
from flax_attn.insertion._scopes import path_of
from flax_attn.insertion.selection import (
    Select,
    Where,
    check_batch_axis,
    check_map,
    described,
    is_map,
    listed,
    makes_module,
    most_axes,
    selector,
)
from flax_attn.insertion.trees import to_dicts


def insert(
    model: nn.Module,
    attention: nn.Module | Callable[..., nn.Module],
    where: Where,
    *,
    init: Literal["identity"] | None = None,
    name: str = "attention",
) -> nn.Module:
    """Returns ``model`` with ``attention`` after the submodules that ``where`` selects.

    The model's code is not changed::

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

    The result has the same arguments and methods as ``model``. Its variables are those
    of ``model`` plus those of each attention block, stored under ``name`` within its
    submodule's variables. A submodule that is called twice shares one block.
    ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit`` also transform the inserted
    blocks, so a scan has one per step. Attention is never inserted into inserted
    attention or after ``model`` itself. The block's output is cast to the dtype of the
    output that it replaces.

    If a submodule returns a tuple whose first entry is a feature map, the attention is
    applied to that entry and the others are unchanged.

    An output with 3 axes is treated as one map ``(H, W, C)`` only if the input of
    ``model`` has 3 axes. For a batch of images it is treated as tokens ``(N, L, C)``,
    as in a ViT, which need a block with ``spatial_dims=1``.

    Args:
      model: any Linen module.
      attention: a module that maps ``(..., H, W, C)`` to the same shape, or a function
        without arguments that returns one, such as a class or a
        ``functools.partial`` of one. Each submodule gets a copy.
      where: selects the submodules; one of

        * a subclass of ``nn.Module`` or a tuple of them, which selects their instances;
        * a pattern (see ``fnmatch``) that must match the whole path, names joined by
          slashes. Without a slash, such as ``"ResBlock_*"``, it matches only direct
          submodules of ``model``; with a slash, such as ``"stage*/norm2"``, ``*`` also
          matches slashes;
        * a compiled regular expression that must match the whole path;
        * a function ``(module, path) -> bool``.
      init: ``"identity"`` sets ``identity_init`` of ``attention``, so that every gate
        is initially exactly 1 and each block returns its input (default: None, which
        leaves ``attention`` unchanged). The initial output equals that of ``model`` bit
        for bit without jit; under jit the compiler may change the summation order
        around a site.
      name: the name of the attention below each submodule, without slashes (default:
        "attention").

    Returns:
      A Linen module. To give it pretrained variables see ``merge``.

    Raises:
      ValueError: an argument is out of range. Also when the result is first initialized
        or applied: if ``where`` selects no submodule that is called, or if, for a
        selected submodule, the output is not a map with at least 3 axes or a tuple that
        starts with one, the output is tokens but ``attention`` needs maps,
        ``attention`` changes the shape, or ``name`` is already in use.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "`model` must be an instance of a Linen module, got "
            f"{model!r}; pass e.g. Model()."
        )
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(
            "`name` must be a non-empty string without slashes, got "
            f"{name!r}; leave it out for 'attention'."
        )
    block = _instance(attention)
    if init is not None:
        block = _starting_as(init, block)
    hook = _Insertion(model, block, selector(where), where, name)
    return with_hook(Inserted, hook)


class Inserted(Intercepted):
    """A model with inserted attention, returned by ``insert``.

    Attributes:
      hook: the model, the attention and where it is inserted.
    """


def _instance(attention: Any) -> nn.Module:
    made = attention
    if callable(attention) and not isinstance(attention, nn.Module):
        # No parent: a module created inside another module's method becomes part of it.
        keywords = {"parent": None} if makes_module(attention) else {}
        try:
            made = attention(**keywords)
        except TypeError as error:
            raise ValueError(
                f"`attention` must need no arguments, got {attention!r}, which "
                f"raises {error}; set them first, as in "
                "official_cbam(train=True) or functools.partial(SE, reduction=4)."
            ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(
            "`attention` must be a Linen module, or a function that returns one, got "
            f"{attention!r}; pass e.g. flax_attn.SE()."
        )
    return made.clone(parent=None, name=None)


def _starting_as(init: str, block: nn.Module) -> nn.Module:
    if init != "identity":
        raise ValueError(
            f"`init` must be 'identity' or None, got {init!r}; leave it out to use "
            "`attention` as it is."
        )
    if "identity_init" not in field_names(block):
        raise ValueError(
            "`init='identity'` needs a block with a field `identity_init`, got "
            f"{type(block).__name__}; pass a flax_attn block, or pass init=None and a "
            "block that is initially the identity."
        )
    return block.clone(identity_init=True)


class _Insertion(Hook):
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
        # The attentions that ran, those with parameters by their paths.
        self.found: set[Path] = set()
        self.ran_without_params = False

    def __repr__(self) -> str:
        return (
            f"{type(self.attention).__name__} as {self.name!r} after {self.where!r} "
            f"in {self.model!r}"
        )

    def run(self, model: nn.Module, method: str, call: "functools.partial[Any]") -> Any:
        """Returns ``call()`` with the attentions in it."""
        base = path_of(model)
        axes = most_axes((call.args, call.keywords))
        seen: dict[str, str] = {}
        running: set[Path] = set()
        selected = False

        def watcher(inner: Call, run: Callable[[], Any]) -> Any:
            nonlocal selected
            module, path = inner.module, inner.path
            if (
                inner.method != "__call__"
                or path == base
                # A module that calls super().__call__, or wraps one in its own scope.
                or path in running
                or inner.in_attention
            ):
                return run()
            below = path[len(base) :] if path[: len(base)] == base else path
            place = "/".join(below)
            seen[place] = type(module).__name__
            if not self.select(module, place):
                return run()
            selected = True
            running.add(path)
            try:
                y = run()
            finally:
                running.discard(path)
            return self.attend(module, place, y, axes)

        with intercepting(watcher), recorded_once(model):
            result = call()
        if not selected and not self.may_meet_no_site(model, seen):
            raise ValueError(
                "`where` must select a submodule that "
                f"{type(innermost(model)).__name__}.{method} calls, got "
                f"{self.where!r}, which selects none of "
                f"{listed(f'{path} ({kind})' for path, kind in seen.items())}."
            )
        return result

    def may_meet_no_site(self, model: nn.Module, seen: Iterable[str]) -> bool:
        """Whether a call without a site is valid that called the submodules ``seen``.

        A program that nn.jit compiled runs without calls, and a method may use a part
        of the model without sites. The variables decide where they can, as this object
        may be new and its history empty: there is attention after a submodule that was
        not called.
        """
        if self.ran_without_params:
            return True
        params = to_dicts(model.variables.get("params", {}))
        paths = traverse_util.flatten_dict(params)
        if model.is_initializing():
            # The model itself may have a submodule of that name.
            return any(
                path[: len(site)] == site for path in paths for site in self.found
            )
        owners = {
            "/".join(path[:i])
            for path in paths
            for i, name in enumerate(path)
            if i > 0 and name == self.name
        }
        return not owners <= set(seen)

    def attend(self, module: nn.Module, path: str, y: Any, axes: int) -> Any:
        """Returns ``y``, the output of ``module``, after an attention of its own.

        ``axes`` is the largest number of axes among the arrays given to the model.
        """
        if isinstance(y, tuple) and y and is_map(y[0]):
            first = self.attend(module, path, y[0], axes)
            if hasattr(y, "_fields"):  # A NamedTuple.
                return type(y)(first, *y[1:])
            return (first, *y[1:])
        site = f"{path} ({type(module).__name__})"
        check_map(y, site)
        dims = getattr(self.attention, "spatial_dims", None)
        check_batch_axis(dims, y.shape, axes, site)
        block = attached(self.attention, module, self.name, self.token)
        if block is None:
            raise ValueError(
                f"`name` must be unused in {site}, which already has {self.name!r}; "
                "pass another name."
            )
        out = block(y)
        if not isinstance(out, jax.Array) or out.shape != y.shape:
            raise ValueError(
                f"`attention` must keep the shape {y.shape} of its input at {path}, "
                f"but {type(self.attention).__name__} returns {described(out)}."
            )
        if block.variables.get("params"):
            self.found.add((*path.split("/"), self.name))
        else:
            self.ran_without_params = True
        return out.astype(y.dtype)
