"""The base class of the blocks, and their shared code other than the arithmetic."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from flax_attn import functional
from flax_attn.functional import Array, Implementation, checks

GateFn = Callable[[Array], Array]
ModuleDef = Callable[..., Any]
Width = int | Callable[[int], int]


class Attention(nn.Module, kw_only=True):
    """An attention block: maps ``(..., H, W, C)`` to the same shape.

    A subclass adds fields, defines ``multiplier`` (the factor for the input) and
    declares the gates that it sows in ``gates``::

      >>> class Energy(Attention, kw_only=True):
      ...     def multiplier(self, x, mask=None):
      ...         x, _ = self.validated(x, mask)
      ...         return self.gate_from(x**2)
      >>> Energy().apply({}, jnp.zeros((4, 4, 8))).shape
      (4, 4, 8)

    ``multiplier`` lets one map gate another: ``low * block.multiplier(high)`` inside a
    module, or from outside::

      >>> block, low, high = Energy(), jnp.ones((8, 8, 8)), jnp.zeros((8, 8, 8))
      >>> (low * block.apply({}, high, method="multiplier")).mean().item()
      0.5

    All fields are keyword-only. Every block has these:

    Attributes:
      gate: function from logits to the gate (default: nn.sigmoid).
      use_bias: whether the layers add a bias (default: False; for BAM: True).
      dtype: the dtype of the result (default: infer from input and params). Means are
        always accumulated in float32 or wider.
      param_dtype: the dtype passed to parameter initializers (default: float32).
      precision: numerical precision of the products, see ``jax.lax.Precision``.
      kernel_init: initializer of all kernels.
      bias_init: initializer of all biases.
      implementation: ``"fast"``, or ``"plain"`` for forward-mode differentiation
        (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) (default: "fast").
      identity_init: whether the block is initially the identity. The last kernel and
        bias, or the scale and bias of a norm after them, are initialized to zero, and
        each gate is ``2 * gate(logits)``, initially 1 (default: False).
      spatial_dims: number of spatial axes: 1 for ``(..., L, C)``, 2, or 3 for
        ``(..., D, H, W, C)`` (default: 2).
      gates: class attribute, a dict from method name to the name of the gate that the
        method sows. Blocks inside this one declare their own.

    Raises:
      ValueError: at the first call, if a field or an input is out of range.
    """

    gates: ClassVar[Mapping[str, str]] = {}

    gate: GateFn = nn.sigmoid
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    implementation: Implementation = "fast"
    identity_init: bool = False
    spatial_dims: int = 2

    def __post_init__(self) -> None:
        """Makes blocks with equal fields compare equal, to avoid recompilation."""
        for name, value in vars(self).copy().items():
            if type(value) is partial:
                object.__setattr__(self, name, _comparable(value))
        super().__post_init__()

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns ``x`` of shape ``(..., H, W, C)`` times its gates.

        ``mask`` is boolean, ``(..., H, W)``, and True at valid positions. Other
        positions are ignored and are zero in the output, and a spatial gate is zero
        there.
        """
        x, _ = self.validated(x, mask)
        return self.scaled(x, self.multiplier(x, mask))

    def multiplier(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the factor by which ``x`` is multiplied: all gates in one.

        Shape ``(..., 1, 1, C)``, ``(..., H, W, 1)`` or ``(..., H, W, C)``. A block with
        one gate inherits it if the method in ``gates`` takes ``x, mask``.
        """
        if len(self.gates) != 1:
            name = type(self).__name__
            raise NotImplementedError(f"{name} must define `multiplier`.")
        (method,) = self.gates
        gate: Array = getattr(self, method)(x, mask)
        return gate

    @nn.nowrap
    def validated(self, x: Any, mask: Any = None) -> tuple[Array, Array | None]:
        """Returns the input, zero where masked, and the mask as ``(..., H, W, 1)``.

        Raises:
          ValueError: ``x`` is not a feature map, or ``mask`` does not fit it.
        """
        x = checks.check_feature_map(x, spatial_dims=self.spatial_dims)
        mask = checks.check_mask(mask, x)
        return functional.apply_mask(x, mask), mask

    @nn.nowrap
    def scaled(self, x: Array, gate: Array) -> Array:
        """Returns ``x * gate`` in the block's dtype; ``x`` must be validated."""
        x, gate = promote_dtype(x, gate, dtype=self.dtype)
        return functional.scale(x, gate, **self.map_options)

    @property
    def map_options(self) -> dict[str, Any]:
        """The options that functions of a map take."""
        return {
            "spatial_dims": self.spatial_dims,
            "implementation": self.implementation,
        }

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """The spatial axes of a map, counted from its last."""
        return functional.spatial_axes(self.spatial_dims)

    @nn.nowrap
    def shared_fields(self, kind: type["Attention"]) -> dict[str, Any]:
        """The fields that a block of the class ``kind`` has too, for one inside."""
        names = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
        own = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in own if name in names}

    @nn.nowrap
    def make_layer(self, kind: ModuleDef, *, is_last: bool = False) -> ModuleDef:
        """``kind``, such as nn.Dense, with the dtypes, bias and so on of the block.

        ``is_last``: it makes the logits, so it starts at zero with ``identity_init``.
        """
        return partial(
            kind,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            **(self.last_layer() if is_last else self.first_layer()),
        )

    @nn.nowrap
    def first_layer(self) -> dict[str, Any]:
        """The initializers of a layer before the last one."""
        return {"kernel_init": self.kernel_init, "bias_init": self.bias_init}

    @nn.nowrap
    def last_layer(self) -> dict[str, Any]:
        """The initializers of the layer that computes the logits."""
        # Before a norm, zeros would be amplified or get no gradient, so the norm's
        # scale is initialized to zero instead.
        if self.identity_init and getattr(self, "norm", None) is None:
            return {name: zeros_like(init) for name, init in self.first_layer().items()}
        return self.first_layer()

    @nn.nowrap
    def gate_from(self, logits: Array) -> Array:
        """The gate for ``logits``; at zero logits it is 1 with ``identity_init``."""
        checks.check_callable("gate", self.gate)
        if not self.identity_init:
            return self.gate(logits)
        if isinstance(self.gate, nn.Module):
            raise ValueError(
                "`identity_init` doubles the gate, so `gate` must be a function that "
                f"is 0.5 at 0, got the module {type(self.gate).__name__}, whose "
                "parameters may change that; pass nn.sigmoid, or identity_init=False."
            )
        self._check_gate_at_zero(logits.shape)
        return 2 * self.gate(logits)

    @nn.nowrap
    def _check_gate_at_zero(self, shape: tuple[int, ...]) -> None:
        # A gate may be a function of all channels, such as a softmax.
        zeros = np.zeros((*(1,) * len(shape[:-1]), *shape[-1:]), np.float32)
        try:
            with jax.ensure_compile_time_eval():
                # Jitted, since jax 0.7 traces here what has a custom rule, such as
                # `relu`.
                at_zero = np.asarray(jax.jit(self.gate)(zeros))
        except jax.errors.TracerArrayConversionError:
            return  # In a shard_map without jit nothing has a value.
        if (wrong := at_zero[at_zero != 0.5]).size:
            raise ValueError(
                "`identity_init` doubles the gate, so `gate` must be 0.5 at 0, got "
                f"{wrong[0]}; pass a gate such as nn.sigmoid, or identity_init=False."
            )

    @nn.nowrap
    def normalized(
        self,
        field: str,
        x: Array,
        mask: Array | None,
        *,
        name: str,
        is_last: bool = True,
    ) -> Array:
        """Applies the norm in ``field``, if any, to ``x`` where ``mask`` is True.

        ``is_last``: its output is the logits, so with ``identity_init`` its scale and
        bias are initialized to zero.
        """
        norm = getattr(self, field)
        if norm is None:
            return x
        check_norm(field, norm)
        made = self._make_norm(norm, name, is_last=is_last, field=field)
        return self.over_valid(made, x, mask)

    @nn.nowrap
    def over_valid(self, norm: Any, x: Array, mask: Array | None) -> Array:
        """Applies the module ``norm`` to ``x`` where ``mask`` is True."""
        lead = x.ndim - self.spatial_dims - 1
        if lead != 1:
            # A norm takes the first axis for the batch, and may reduce all others.
            flat = partial(_with_one_batch_axis, lead=lead)
            y = self.over_valid(norm, flat(x), None if mask is None else flat(mask))
            return _with_batch_axes(y, x.shape[:lead])
        if mask is None:
            return norm(x)
        # Without any valid position the mask is ignored, since the mean of nothing is
        # NaN: for the whole batch if the norm shares statistics over it, otherwise for
        # each group that the norm reduces, such as the channels of a padded position.
        axes = getattr(norm, "reduction_axes", None) or self.spatial_axes
        shared = hasattr(norm, "use_running_average")
        valid = mask.any(None if shared else axes, keepdims=True)
        # GroupNorm wants the shape of `x`.
        return norm(x, mask=jnp.broadcast_to(mask | ~valid, x.shape))

    @nn.nowrap
    def _make_norm(
        self, norm: ModuleDef, name: str, *, is_last: bool, field: str
    ) -> Any:
        if not (self.identity_init and is_last):
            return norm(name=name)
        inits = dict.fromkeys(("scale_init", "bias_init"), _ZEROS)
        message = _NO_SCALE.format(field=field, kind=type(self).__name__, norm=norm)
        try:
            module = norm(name=name, **inits)
        except TypeError as error:
            if not any(f"'{name}'" in str(error) for name in inits):
                raise
            raise ValueError(message) from error
        if not getattr(module, "use_scale", True):
            raise ValueError(message)
        return module


def _with_one_batch_axis(x: Array, lead: int) -> Array:
    """``x``, of whose ``lead`` batch axes one is made."""

    def flat(x: Array) -> Array:
        return x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:])

    return functional.on_auto_axes(
        flat, lambda x: [*(x[:lead] or [None])[:1], *x[lead:]], x
    )


def _with_batch_axes(y: Array, batch: tuple[int, ...]) -> Array:
    """``y``, whose one batch axis becomes those of the shape ``batch``."""

    def split(y: Array) -> Array:
        return y.reshape(*batch, *y.shape[1:])

    others = [None] * (len(batch) - 1)
    return functional.on_auto_axes(
        split, lambda y: [*[y[0]][: len(batch)], *others, *y[1:]], y
    )


def check_norm(field: str, norm: Any) -> None:
    """Raises ``ValueError`` unless ``norm`` can be called to make a module."""
    if isinstance(norm, nn.Module) or not callable(norm):
        raise ValueError(
            f"`{field}` must make a module, such as nn.BatchNorm or a "
            f"functools.partial of it, got {norm!r}; pass partial(nn.BatchNorm, "
            "use_running_average=not train)."
        )


class _Partial(partial[Any]):
    """A ``functools.partial`` that compares equal by function and arguments."""

    def _key(self) -> tuple[Any, ...]:
        return self.func, self.args, frozenset(self.keywords.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Partial) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _comparable(made: partial[Any]) -> partial[Any]:
    same = _Partial(made.func, *made.args, **made.keywords)
    try:
        hash(same)
    except TypeError:  # An argument that is not hashable, such as an array.
        return made
    return same


def zeros_like(init: Initializer) -> Initializer:
    """Zeros in the metadata boxes that ``init`` returns, such as ``nn.Partitioned``."""

    def zeros(*args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, init(*args, **kwargs))

    return zeros


def width_of(field: str, value: Width, features: int) -> int:
    """The width that a field asks for at ``features`` channels, an integer."""
    if not callable(value):
        return value
    width = value(features)
    if not checks.is_int(width):
        raise ValueError(
            f"`{field}` is a function and must return an integer, got {width!r} for "
            f"{features} channels; return an int."
        )
    return width


_ZEROS = nn.initializers.zeros_init()
_NO_SCALE = (
    "`identity_init` starts the scale and the bias of a norm at zero, so `{field}` of "
    "{kind} must have the fields `scale_init` and `bias_init` and use a scale, got "
    "{norm}; pass a norm such as nn.BatchNorm, or identity_init=False."
)


class Conv(nn.Module):
    """A convolution to one channel, with the fields and parameters of ``nn.Conv``.

    Attributes:
      compute: function from the input, the kernel and ``precision=`` to the result.
      kernel_shape: shape of the kernel; its last axis has size 1.
    """

    compute: Callable[..., Array]
    kernel_shape: tuple[int, ...]
    use_bias: bool
    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the convolution of ``x``."""
        arrays: list[Array] = [
            x,
            self.param("kernel", self.kernel_init, self.kernel_shape, self.param_dtype),
        ]
        if self.use_bias:
            arrays.append(self.param("bias", self.bias_init, (1,), self.param_dtype))
        x, kernel, *bias = promote_dtype(*arrays, dtype=self.dtype)
        y = self.compute(x, kernel, precision=self.precision)
        return y + bias[0][0] if bias else y
