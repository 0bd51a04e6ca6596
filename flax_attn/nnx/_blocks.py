"""NNX modules made from the Linen blocks: the state is NNX's, the rest is theirs."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.bridge.variables import to_nnx_var
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_attn import blocks
from flax_attn.blocks.base import ModuleDef
from flax_attn.functional import Array, checks

Path = tuple[str, ...]
Place = tuple[Any, ...]
"""The path of a module in a model, in which positions in lists are integers."""


class Layer(nnx.Module):
    """Parameters and layers by name, such as ``block.reduce`` of an SE block."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Keeps arrays as ``nnx.Param``, mappings as layers and modules as they are.

        Args:
          values: arrays (``nn.Partitioned`` keeps its sharding), mappings of such
            values or modules, by their names.
        """
        _fill(self, values)


# No subclass of Layer: of two classes in one model, the tabulate of Flax 0.11 leaves
# the methods changed that one inherits from the other.
class Attention(nnx.Module):
    """An attention block: maps ``(..., H, W, C)`` to the same shape.

    Attributes:
      block: class attribute, the Linen block that defines fields and arithmetic.
      features: number of channels C.
      linen: the Linen block with this block's fields, such as ``linen.reduction``.
      sow_gates: whether each call sows its gates as ``nnx.Intermediate``, for
        ``nnx.pop``. Only needed if Flax has no ``nnx.capture``, under which gates are
        always sown. Set it with ``model.set_attributes(sow_gates=True)``.
    """

    block: ClassVar[type[blocks.Attention]]

    features: int
    linen: blocks.Attention
    sow_gates: bool

    def __init__(self, features: int, *, rngs: nnx.Rngs, **fields: Any) -> None:
        """Creates the block and its parameters.

        Args:
          features: number of channels C, at least 1.
          rngs: its ``params`` stream initializes the parameters; not stored.
          **fields: the fields of the Linen block. A norm field takes an NNX class such
            as ``nnx.BatchNorm``, called with the number of channels and ``rngs=``.

        Raises:
          ValueError: ``features`` or a field is out of range.
        """
        checks.check_positive("features", features)
        # Without a parent it does not join a Linen module that is being called.
        self.linen = self.block(**fields, parent=None)
        self.features = features
        self.sow_gates = False
        _fill(self, _initial(self.linen, features, rngs))

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns ``x`` of shape ``(..., H, W, C)``, gated.

        Args:
          x: floating-point array ``(..., H, W, C)``.
          mask: boolean array ``(..., H, W)``, True where ``x`` is valid (default:
            None, everywhere).

        Raises:
          ValueError: ``x`` is not a feature map of C channels, or ``mask`` does not
            fit.
        """
        return self._run("__call__", x, mask)

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which the block multiplies ``x``, e.g. for another map.

        Arguments and errors are the same as for a call.
        """
        return self._run("multiplier", x, mask)

    def _run(self, method: str, x: Array, mask: Array | None) -> Array:
        if (shape := jnp.shape(x))[-1:] not in ((), (self.features,)):
            raise ValueError(
                f"`x` must have {self.features} channels on its last axis, got shape "
                f"{shape}; make the block with features={shape[-1]}."
            )
        variables = {"params": _params(self)}
        linen = self._callee()
        y: Any
        if not (self.sow_gates or hasattr(self, "__captures__")):
            y = linen.apply(variables, x, mask, method=method)
            return y
        y, sown = linen.apply(
            variables, x, mask, method=method, mutable=["intermediates"]
        )
        for path, values in flatten_dict(sown["intermediates"]).items():
            for value in values:
                self._at(path[:-1]).sow(nnx.Intermediate, path[-1], value)
        return y

    def _callee(self) -> nn.Module:
        """The Linen block that a call applies."""
        return _with_norms(self.linen, lambda norm: self._at(norm.path))

    def _at(self, path: Path) -> Any:
        module: Any = self
        for name in path:
            module = getattr(module, name)
        return module


def modules(model: nnx.Module) -> dict[Place, nnx.Module]:
    """All modules in ``model`` by their paths, itself too; those nearer first."""
    nodes = nnx.iter_graph(model)  # Flax 0.11 has no nnx.iter_modules.
    found = [(path, node) for path, node in nodes if isinstance(node, nnx.Module)]
    return dict(sorted(found, key=lambda item: len(item[0])))


def become(module: nnx.Module, kind: type) -> None:
    """Makes ``module`` an instance of ``kind``, a subclass of its class."""
    object.__setattr__(module, "__class__", kind)


def joined(place: Place) -> str:
    """``place`` with slashes."""
    return "/".join(map(str, place))


def native(make: Callable[..., nn.Module]) -> Any:
    """Returns the NNX class of a Linen block, always the same one.

      >>> from flax import nnx
      >>> import flax_attn
      >>> SE = native(flax_attn.SE)
      >>> SE(64, rngs=nnx.Rngs(0)).expand.kernel.shape
      (4, 64)

    Args:
      make: a subclass of ``flax_attn.blocks.Attention``, including your own, or a
        ``functools.partial`` of one, whose keywords are kept.

    Returns:
      The class, a subclass of ``Attention``, or a ``functools.partial`` of it.

    Raises:
      ValueError: ``make`` is neither.
    """
    if isinstance(make, partial):
        return partial(native(make.func), *make.args, **make.keywords)
    if not (isinstance(make, type) and issubclass(make, blocks.Attention)):
        raise ValueError(
            "`make` must be a subclass of flax_attn.blocks.Attention, got "
            f"{make!r}; pass the class itself, such as flax_attn.SE."
        )
    block: Any = make
    return _class_of(block)


@cache
def _class_of(block: Any) -> type[Attention]:
    return type(
        block.__name__,
        (Attention,),
        {
            "block": block,
            "__doc__": _doc(block),
            "__module__": __package__,
            "__signature__": _signature(block),
        },
    )


def _doc(block: type[blocks.Attention]) -> str:
    """The Linen block's documentation without its example."""
    summary, _, rest = (inspect.getdoc(block) or "").partition("\n")
    _, _, fields = rest.partition("All fields are keyword-only")
    return (
        f"{summary}\n\nCreate it with ``{block.__name__}(features, rngs=rngs)``.\n"
        "Norm fields take NNX classes, such as "
        f"``nnx.BatchNorm``.\n\nAll fields are keyword-only{fields}"
    )


def _signature(block: type[blocks.Attention]) -> inspect.Signature:
    make = inspect.Parameter
    fields = [
        make(field.name, make.KEYWORD_ONLY, default=field.default)
        for field in dataclasses.fields(block)
        if field.name not in ("parent", "name")
    ]
    return inspect.Signature(
        [
            make("features", make.POSITIONAL_OR_KEYWORD, annotation=int),
            make("rngs", make.KEYWORD_ONLY, annotation=nnx.Rngs),
            *fields,
        ]
    )


def _fill(module: nnx.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = Layer(value)
        elif not isinstance(value, nnx.Module):
            value = to_nnx_var("params", value)
        setattr(module, name, value)


def _params(layer: nnx.Module) -> dict[str, Any]:
    """The arrays of all parameters but a norm's, as Linen nests them."""
    values: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Layer):
            values[name] = _params(value)
        elif isinstance(value, nnx.Param):
            values[name] = value[...]
    return values


def _initial(linen: blocks.Attention, features: int, rngs: nnx.Rngs) -> dict[str, Any]:
    """The values of a new block: parameters from Linen's init, and NNX norms."""
    norms: dict[Path, nnx.Module] = {}

    def make(place: _Norm) -> Callable[..., Array]:
        def create(x: Array) -> Array:
            owner: Any = place.parent
            factory = _Factory(place.factory, x.shape[-1], rngs)
            norms[place.path] = owner._make_norm(
                factory,
                place.name,
                is_last=place.scale_init is not None,
                field=place.field,
            )
            return x  # Not normalized: the statistics are to start as they are.

        return create

    for field in _norm_fields(linen):
        _check_norm(field, getattr(linen, field))
    # No parameter depends on the size of a map.
    x = jnp.zeros((*(1,) * linen.spatial_dims, features))
    values = _with_norms(linen, make).init(rngs.params(), x).get("params", {})
    return unflatten_dict(flatten_dict(values) | norms)


class _Norm(nn.Module):
    """What stands in the Linen block where the NNX block has a norm."""

    field: str
    factory: ModuleDef
    find: Callable[["_Norm"], Any]
    scale_init: Any = None
    bias_init: Any = None

    def __call__(self, x: Array, **mask: Array) -> Array:
        return self.find(self)(x, **mask)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        if name in ("use_running_average", "reduction_axes"):
            return getattr(self.find(self), name)
        return super().__getattr__(name)


@dataclasses.dataclass(frozen=True)
class _Factory:
    """Makes the NNX norm as a Linen block asks for one."""

    factory: ModuleDef
    features: int
    rngs: nnx.Rngs

    def __call__(self, *, name: str, **inits: Any) -> nnx.Module:
        return self.factory(self.features, rngs=self.rngs, **inits)

    def __repr__(self) -> str:
        return repr(self.factory)


def _norm_fields(linen: blocks.Attention) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(linen)
        if field.type == ModuleDef | None and getattr(linen, field.name) is not None
    ]


def _with_norms(
    linen: blocks.Attention, find: Callable[[_Norm], Any]
) -> blocks.Attention:
    """``linen`` with what ``find`` returns in the places of its norms."""
    norms: dict[str, Any] = {
        field: partial(_Norm, field=field, factory=getattr(linen, field), find=find)
        for field in _norm_fields(linen)
    }
    return linen.clone(**norms) if norms else linen


def _check_norm(field: str, norm: Any) -> None:
    made = norm.func if isinstance(norm, partial) else norm
    of_linen = isinstance(made, type) and issubclass(made, nn.Module)
    if of_linen or isinstance(made, nnx.Module | nn.Module) or not callable(made):
        raise ValueError(
            f"`{field}` must make an NNX module, such as nnx.BatchNorm or a "
            f"functools.partial of it, got {norm!r}; pass "
            "partial(nnx.BatchNorm, momentum=0.9)."
        )
