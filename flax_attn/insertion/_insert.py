"""``insert``: its arguments, and what runs after the submodules that it selects."""

import functools
from collections.abc import Callable
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
    path_of,
    recorded_once,
    with_hook,
)
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

    The result is called as ``model`` is, with the same arguments and methods. Its
    variables are those of ``model`` with new ones among them: those of each attention
    are below its submodule's, as ``name``. A submodule that is called twice has one
    attention. ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit`` transform a
    submodule's attention with it, so a scan has one for every step. Attention is never
    inserted into inserted attention, nor after ``model`` itself. Each result has the
    dtype of the output that it replaces.

    A submodule may return a tuple whose first entry is its map, such as a map and
    weights: the attention is applied to that entry and the others stay.

    An output with 3 axes is read as one map ``(H, W, C)`` only if ``model`` was given
    an array with 3 axes. If ``model`` was given a batch of images it is tokens
    ``(N, L, C)``, as in a ViT, which need a block with ``spatial_dims=1``.

    Args:
      model: any Linen module.
      attention: a module that maps ``(..., H, W, C)`` to the same shape, or a function
        without arguments that returns one, such as a class or a
        ``functools.partial`` of one. Each submodule gets a copy.
      where: the submodules, by one of

        * a subclass of ``nn.Module`` or a tuple of them: their instances;
        * a pattern that the whole path must match, names joined by slashes (see
          ``fnmatch``). Without a slash, such as ``"ResBlock_*"``, it matches a
          submodule of ``model`` itself and nothing inside; in one with a slash, such
          as ``"stage*/norm2"``, ``*`` matches slashes too;
        * a compiled regular expression, which the whole path must match;
        * a function from the module and its path to a bool.
      init: ``"identity"`` for gates that are exactly 1 at the start, so that each
        attention returns its input bit for bit; it sets ``identity_init`` of
        ``attention`` (default: None, which leaves ``attention`` as it is). The output
        is then that of ``model``, without jit to the last bit; under jit the compiler
        may sum in another order around a site.
      name: the name of the attention below each submodule, without slashes (default:
        "attention").

    Returns:
      A Linen module. To give it pretrained variables see ``merge``.

    Raises:
      ValueError: for an argument out of its range. Also, when the result is first
        initialized or applied: if ``where`` selects no submodule that is called, if
        the output of one that it selects is not a map with at least 3 axes or a tuple
        that starts with one, if it is tokens and ``attention`` needs maps, if
        ``attention`` changes its shape, or if ``name`` is taken there.
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
    """A model with attention in it, as ``insert`` returns it.

    Attributes:
      hook: the model, the attention and where it is inserted.
    """


def _instance(attention: Any) -> nn.Module:
    made = attention
    if callable(attention) and not isinstance(attention, nn.Module):
        # Without a parent: a module made inside another's method becomes a part of it.
        keywords = {"parent": None} if makes_module(attention) else {}
        try:
            made = attention(**keywords)
        except TypeError as error:
            raise ValueError(
                f"`attention` must need no arguments, got {attention!r}, whose call "
                f"raises {error}; pass them, as in presets.official_cbam(train=True) "
                "or functools.partial(SE, reduction=4)."
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
            "`init='identity'` needs an attention with a field `identity_init`, got "
            f"{type(block).__name__}; pass a block of flax_attn, or init=None and an "
            "attention that starts as the identity by itself."
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
        if not selected and not self.may_meet_no_site(model):
            raise ValueError(
                "`where` must select a submodule that "
                f"{type(innermost(model)).__name__}.{method} calls, got "
                f"{self.where!r}, which selects none of "
                f"{listed(f'{path} ({kind})' for path, kind in seen.items())}."
            )
        return result

    def may_meet_no_site(self, model: nn.Module) -> bool:
        """Whether a call without a site is valid.

        A program that nn.jit compiled runs without calls, and a method may use a part
        of the model without sites. The variables decide where they can, as this object
        may be new and its history empty.
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
        return any(self.name in path for path in paths)

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
                f"`name` must be free below {site}, which has a {self.name!r} "
                "already; pass another name."
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
