"""The cost of a block: parameters, arithmetic and memory traffic.

Nothing is run or allocated: the parameters come from the shapes that ``init`` returns,
the rest from the traced forward pass.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.extend import core

from flax_attn.blocks import Attention

# One operation for each element. A logistic is 1 / (1 + exp(-z)).
_SINGLE = frozenset(
    "abs add add_any and ceil clamp div eq floor ge gt is_finite le lt max "
    "min mul ne neg not or rem round select_n sign square sub xor".split()
)
_TRANSCENDENTAL = frozenset(
    "atan2 cbrt cos erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow "
    "rsqrt sin sqrt tan tanh".split()
)
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod "
    "reduce_sum".split()
)
_WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum".split())
_FREE = frozenset(
    "bitcast_convert_type broadcast_in_dim concatenate copy copy_p device_put "
    "dynamic_slice expand_dims gather iota pad reduce_precision reshape rev "
    "sharding_constraint slice split squeeze stack stop_gradient transpose "
    "unstack".split()
)
_CONVERSION = "convert_element_type"
_POWER = "integer_pow"
# These leave the bytes and their order unchanged.
_VIEWS = frozenset(
    "copy copy_p device_put expand_dims reshape squeeze stop_gradient".split()
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one forward pass.

    Attributes:
      parameters: number of elements in the collection ``params``.
      multiply_adds: multiply-add pairs in matrix products and convolutions. Taps on
        padding are not counted.
      operations: all other elementwise operations and reductions, one per element:
        additions, multiplications, comparisons, dtype conversions and so on.
      transcendentals: exponentials, logarithms, roots and the like, one per element. A
        sigmoid, ``1 / (1 + exp(-z))``, counts as one, plus three operations.
      bytes: memory traffic, assuming everything that can be fused is fused. See
        ``cost``.
    """

    parameters: int
    multiply_adds: int
    operations: int
    transcendentals: int
    bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations as XLA counts them, a multiply-add as two."""
        return 2 * self.multiply_adds + self.operations

    def __str__(self) -> str:
        """All counts in one line."""
        fields = dataclasses.asdict(self).items()
        return ", ".join(f"{n:,} {name.replace('_', '-')}" for name, n in fields)


def cost(
    module: nn.Module,
    shape: Sequence[int],
    *,
    dtype: Dtype = jnp.float32,
    **kwargs: Any,
) -> Cost:
    """Counts the cost of a forward pass of ``module`` for an input of ``shape``.

    All blocks are counted with the plain implementation, regardless of their field::

      >>> import flax_attn
      >>> print(flax_attn.cost(flax_attn.ECA(), (1, 32, 32, 64)))
      3 parameters, 190 multiply-adds, 131,264 operations, 64 transcendentals,
      787,468 bytes

    Here the mean is 64 × 1023 additions and 64 divisions, the convolution 3 × 64 taps
    without the two beyond the ends, the sigmoid 64 × 3 operations and the product with
    the gate 65,536 multiplications.

    Bytes are counted as follows. Reductions, matrix products and convolutions write
    their results; everything else is fused into its users. Each of the former, and the
    output, is a pass that reads its operands, and passes that depend on the same
    results share a read. So mean and maximum over H and W read a map once, SE moves
    three maps (read for the mean, read for the product, written) and CBAM four. A sum
    of two maps that is used twice, as after a residual addition, is also written.

    ``flops`` is XLA's count for the lowered program (``jax.jit(f).lower(...)``'s
    ``cost_analysis()``); a few functions that no block uses by default, such as
    ``nn.softplus`` and ``argmax``, are lowered to another number of operations. A
    compiled program can cost more: it may recompute the product of a map and a gate
    instead of storing it, and read a map once for each squeeze.

    Args:
      module: an attention block, or any module of convolutions, products, reductions
        and elementwise operations.
      shape: shape of the input, such as (N, H, W, C).
      dtype: dtype of the input (default: float32).
      **kwargs: keyword arguments of the call, such as ``train=False``.

    Returns:
      A ``Cost``.

    Raises:
      ValueError: if ``module`` is not a module, ``shape`` is not integers of at least
        1 or not valid for the module, or an operation cannot be counted: a loop, a
        branch, a random draw.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            "`module` must be an instance of a Linen module, got "
            f"{module!r}; call a class or a preset first, e.g. flax_attn.SE()."
        )
    shape = tuple(shape) if isinstance(shape, Iterable) else shape
    if not isinstance(shape, tuple) or not all(
        isinstance(n, int | np.integer) and n >= 1 for n in shape
    ):
        raise ValueError(
            f"`shape` must be integers of at least 1, got {shape!r}; pass the shape "
            "of the input, such as (1, 32, 32, 64)."
        )
    x = jax.ShapeDtypeStruct(shape, dtype)
    with nn.intercept_methods(_run_plain):
        variables = jax.eval_shape(
            lambda x: module.init(jax.random.key(0), x, **kwargs), x
        )
        state = [name for name in variables if name != "params"]
        try:
            traced = jax.make_jaxpr(
                lambda variables, x: module.apply(variables, x, mutable=state, **kwargs)
            )(variables, x)
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                "`module` must use operations that can be counted, got a random draw "
                f"({error}); leave it out, e.g. with train=False."
            ) from error
    counted = _Count()
    counted.program(traced)
    return Cost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables.get("params"))),
        multiply_adds=counted.multiply_adds,
        operations=counted.operations,
        transcendentals=counted.transcendentals,
        bytes=counted.bytes,
    )


def _run_plain(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Runs a method of a block in its plain implementation, wherever the block is."""
    module = context.module
    if not isinstance(module, Attention) or module.implementation == "plain":
        return run(*args, **kwargs)
    # Fields are frozen, and a clone of a bound module would not be in its place.
    object.__setattr__(module, "implementation", "plain")
    try:
        return run(*args, **kwargs)
    finally:
        object.__setattr__(module, "implementation", "fast")


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """An array in memory, and the number of passes before it is complete."""

    bytes: int
    level: int = 0


@dataclasses.dataclass(frozen=True)
class _Value:
    """The stored arrays that a value is computed from, element by element.

    ``stored``: it is itself that array.
    """

    roots: frozenset[_Stored] = frozenset()
    stored: bool = False


class _Count:
    """Walks a traced program and adds up."""

    def __init__(self) -> None:
        self.multiply_adds = self.operations = self.transcendentals = self.written = 0
        self.reads: set[tuple[_Stored, int]] = set()

    @property
    def bytes(self) -> int:
        return self.written + sum(array.bytes for array, _ in self.reads)

    def program(self, closed: core.ClosedJaxpr) -> None:
        arguments = [_in_memory(_Stored(_bytes(v))) for v in closed.jaxpr.invars]
        results = self.walk(closed, arguments)
        for variable, value in zip(closed.jaxpr.outvars, results, strict=True):
            if not value.stored:
                self.store(_bytes(variable), [value])

    def walk(self, closed: core.ClosedJaxpr, arguments: list[_Value]) -> list[_Value]:
        """Counts the equations; returns the values of the results."""
        jaxpr = closed.jaxpr
        constants = [_in_memory(_Stored(_bytes(v))) for v in jaxpr.constvars]
        known = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], constants + arguments, strict=True)
        )

        def read(atom: Any) -> _Value:
            return _Value() if isinstance(atom, core.Literal) else known[atom]

        uses = Counter(
            atom
            for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
            for atom in atoms
            if not isinstance(atom, core.Literal)
        )
        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            for variable, value in zip(eqn.outvars, results, strict=True):
                size = _bytes(variable)
                large = [root for root in value.roots if root.bytes >= size]
                if len(large) > 1 and uses[variable] > 1:
                    value = self.store(size, [value])
                known[variable] = value
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, operands: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if count := _PASSES.get(name):
            multiply_adds, operations = count(eqn)
            self.multiply_adds += multiply_adds
            self.operations += operations
            return [self.store(_bytes(v), operands) for v in eqn.outvars]
        if name not in _SINGLE | _TRANSCENDENTAL | _FREE | {_CONVERSION, _POWER}:
            return self.walk(_called(eqn), operands)
        size = sum(_size(v) for v in eqn.outvars)
        if name in _TRANSCENDENTAL:
            self.transcendentals += size
            self.operations += 3 * size if name == "logistic" else 0
        elif name == _POWER:
            self.operations += size * _products(eqn.params["y"])
        elif name in _SINGLE or (
            name == _CONVERSION and _converts(eqn.invars[0], eqn.outvars[0])
        ):
            self.operations += size
        if name in _VIEWS:
            return operands
        roots = frozenset[_Stored]().union(*(value.roots for value in operands))
        return [_Value(roots)] * len(eqn.outvars)

    def store(self, size: int, operands: Iterable[_Value]) -> _Value:
        """A pass that reads the arrays of ``operands`` and writes a result."""
        roots = frozenset[_Stored]().union(*(value.roots for value in operands))
        level = 1 + max((root.level for root in roots), default=0)
        self.reads |= {(root, level) for root in roots}
        self.written += size
        return _in_memory(_Stored(size, level))


def _in_memory(array: _Stored) -> _Value:
    return _Value(frozenset([array]), stored=True)


def _called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """The program that an equation calls, such as a jitted function's."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if isinstance(inner, core.Jaxpr) and not inner.constvars:
        inner = core.ClosedJaxpr(inner, ())
    if not isinstance(inner, core.ClosedJaxpr) or eqn.primitive.name == "scan":
        raise ValueError(
            "`module` must use operations that can be counted, got "
            f"`{eqn.primitive.name}`; remove loops, branches and random draws, and "
            'pass implementation="plain" to functions of flax_attn.functional.'
        )
    return inner


def _converts(old: Any, new: Any) -> bool:
    """Whether a conversion counts: one that changes only the weak type does not."""
    return old.aval.dtype != new.aval.dtype


def _products(exponent: int) -> int:
    """The operations of an integer power by repeated squaring."""
    bits = f"{abs(exponent):b}"
    return max(len(bits) + bits.count("1") - 2, 0) + (exponent < 0)


def _product(eqn: core.JaxprEqn) -> tuple[int, int]:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    length = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
    return _size(eqn.outvars[0]) * length, 0


def _convolution(eqn: core.JaxprEqn) -> tuple[int, int]:
    image, kernel = map(_shape, eqn.invars)
    result, p = _shape(eqn.outvars[0]), eqn.params
    dims = p["dimension_numbers"]
    per_position = result[dims.out_spec[0]] * result[dims.out_spec[1]]
    per_position *= kernel[dims.rhs_spec[1]]
    taps = [
        _taps_inside(
            image[dims.lhs_spec[2 + i]],
            kernel[dims.rhs_spec[2 + i]],
            result[dims.out_spec[2 + i]],
            stride=p["window_strides"][i],
            before=p["padding"][i][0],
            spread=p["lhs_dilation"][i],
            dilation=p["rhs_dilation"][i],
        )
        for i in range(len(image) - 2)
    ]
    return per_position * math.prod(taps), 0


def _taps_inside(
    size: int,
    taps: int,
    results: int,
    *,
    stride: int,
    before: int,
    spread: int,
    dilation: int,
) -> int:
    """The number of pairs of a result and a tap inside the input, along one axis."""
    places = np.arange(results)[:, None] * stride + np.arange(taps) * dilation - before
    inside = (places >= 0) & (places <= (size - 1) * spread) & (places % spread == 0)
    return int(inside.sum())


def _reduction(eqn: core.JaxprEqn) -> tuple[int, int]:
    return 0, _size(eqn.invars[0]) - _size(eqn.outvars[0])


def _windowed(eqn: core.JaxprEqn) -> tuple[int, int]:
    window = math.prod(eqn.params["window_dimensions"])
    return 0, _size(eqn.outvars[0]) * (window - 1)


# The primitives that are passes: their multiply-adds and other operations.
_PASSES: dict[str, Callable[[core.JaxprEqn], tuple[int, int]]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_WINDOWS, _windowed),
}


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _size(atom: Any) -> int:
    return math.prod(_shape(atom))


def _bytes(atom: Any) -> int:
    return _size(atom) * atom.aval.dtype.itemsize
