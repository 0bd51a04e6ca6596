"""``grad_cam``: where in a map the evidence for a class lies."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_attn.blocks import ChannelsFirst
from flax_attn.functional import Array
from flax_attn.insertion import Call, watch
from flax_attn.insertion.selection import is_map, listed

# Collections of variables, which nn.remat and nn.jit carry in and out.
_OUTPUT = "grad_cam_output"
_SHIFT = "grad_cam_shift"
_NAME = "map"


def grad_cam(
    model: nn.Module,
    variables: Mapping[str, Any],
    x: Any,
    layer: str,
    label: Any,
    *args: Any,
    **kwargs: Any,
) -> Array:
    """Returns Grad-CAM: where a layer's output supports a class.

    With A the output of ``layer`` and ``y = model(x)[..., label]``, the result is
    ``relu(sum(w * A, -1))``, where ``w = mean(dy/dA, (-3, -2))``, one for each
    channel::

      >>> import flax_attn, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> conv, block, head = nn.Conv(8, (3, 3)), flax_attn.CBAM(), nn.Dense(10)
      >>> model = nn.Sequential([conv, block, lambda x: x.mean((-3, -2)), head])
      >>> x = jnp.ones((2, 16, 16, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> cam = flax_attn.inspect.grad_cam(model, variables, x, "layers_1", label=3)
      >>> cam.shape
      (2, 16, 16, 1)

    It can be jitted with ``model`` and ``layer`` static. The result has no fixed scale;
    to draw it over an image, divide it by its maximum unless that is zero, as ``plot``
    does.

    Args:
      model: any Linen module that returns logits ``(..., K)`` of K classes.
      variables: its variables. No collection is mutable in the call, so norm layers
        must use their running averages.
      x: its input, such as images ``(N, H, W, 3)``.
      layer: path of a submodule whose output is a map ``(..., h, w, C)``, names joined
        by slashes as in ``attention_maps``; usually the last one. Attention inserted
        after it by ``insert`` counts as part of it. Of a ``ChannelsFirst`` it is the
        module inside.
      label: the class, from 0 to K - 1: an integer, or an integer array ``(...)``, one
        for each input. Not checked if it is traced.
      *args: further arguments of the call.
      **kwargs: keyword arguments of ``model.apply``, such as ``train=False``,
        ``method="classify"`` or ``rngs={"dropout": key}``.

    Returns:
      Nonnegative array ``(..., h, w, 1)`` in float32, or in the layer's dtype if wider.

    Raises:
      ValueError: ``layer`` is not called exactly once, is inside nn.scan or nn.vmap, or
        does not return a map; ``label`` is not a class; the model does not return
        logits; or ``mutable`` is among the keyword arguments.

    References: Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra. Grad-CAM: Visual
    Explanations from Deep Networks via Gradient-based Localization.
    https://arxiv.org/abs/1610.02391, 2016. Equations 1 and 2.
    """
    if "mutable" in kwargs:
        raise ValueError(
            f"`mutable` must be left out, got {kwargs['mutable']!r}, since nothing is "
            "updated; call model.apply for other collections."
        )
    called: dict[str, list[Any]] = {}
    running: set[str] = set()
    lost = False

    def watcher(call: Call, run: Callable[[], Any]) -> Any:
        nonlocal lost
        path = "/".join(call.path)
        # A module that calls super().__call__ is called once; what ChannelsFirst
        # returns is no map (..., h, w, C), but the module inside returns one.
        inside = path in running or isinstance(call.module, ChannelsFirst)
        if call.method != "__call__" or inside:
            return run()
        running.add(path)
        try:
            y = run()
        finally:
            running.discard(path)
        called.setdefault(path, []).append(y)
        if path != layer or not is_map(y):
            return y
        module = call.module
        if not module.is_mutable_collection(_OUTPUT):
            lost = True
            return y
        module.put_variable(_OUTPUT, _NAME, y)
        if module.has_variable(_SHIFT, _NAME):
            y = y + module.get_variable(_SHIFT, _NAME)
        return y

    watched = watch(model, watcher)

    def apply(shift: Any) -> tuple[Any, Any]:
        given = {**variables, _SHIFT: shift}
        logits, state = watched.apply(given, x, *args, mutable=[_OUTPUT], **kwargs)
        return logits, state.get(_OUTPUT, {})

    shapes, output = jax.eval_shape(apply, {})
    _check_layer(layer, called, lost)
    labels = _labels(label, shapes)

    def evidence(shift: Any) -> tuple[Array, Any]:
        logits, output = apply(shift)
        chosen = jnp.take_along_axis(logits, labels[..., None], -1)
        # An input moves its own logits only, so a sum has the gradient of each.
        return chosen.sum(), output

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)
    gradient, output = jax.grad(evidence, has_aux=True)(zeros)
    (slopes,), (map_,) = jax.tree.leaves(gradient), jax.tree.leaves(output)
    dtype = jnp.promote_types(map_.dtype, jnp.float32)
    weights = slopes.mean((-3, -2), keepdims=True, dtype=dtype)
    return nn.relu((weights * map_.astype(dtype)).sum(-1, keepdims=True))


def _check_layer(layer: str, called: Mapping[str, list[Any]], lost: bool) -> None:
    """Raises ``ValueError`` unless ``layer`` is called once and returns a map."""
    found = called.get(layer, [])
    if lost:
        problem = f"{layer!r}, which is inside nn.scan or nn.vmap"
    elif not found:
        problem = f"{layer!r}, which is not called"
    elif len(found) > 1:
        problem = f"{layer!r}, which is called {len(found)} times"
    elif not is_map(found[0]):
        kind = getattr(found[0], "shape", type(found[0]).__name__)
        problem = f"{layer!r}, which returns {kind}"
    else:
        return
    maps = [
        path
        for path, outputs in called.items()
        if path and path != layer and len(outputs) == 1 and is_map(outputs[0])
    ]
    raise ValueError(
        "`layer` must be the path of a submodule that is called once and returns a map "
        f"(..., H, W, C), got {problem}; pass one of {listed(maps)}."
    )


def _labels(label: Any, logits: Any) -> Array:
    """The class of each input, of the shape of the logits but their last axis."""
    shape = getattr(logits, "shape", ())
    if not shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            "`model` must return logits (..., classes), got "
            f"{shape or type(logits).__name__}; pass a `method` that returns them."
        )
    labels = jnp.asarray(label)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if not integers or labels.shape not in ((), shape[:-1]):
        raise ValueError(
            f"`label` must be an integer or an array of integers {shape[:-1]}, got "
            f"{labels.dtype} of shape {labels.shape}; pass one class for each input."
        )
    if not isinstance(label, jax.core.Tracer):
        least, most = np.min(label), np.max(label)
        if least < 0 or most >= shape[-1]:
            raise ValueError(
                f"`label` must be within 0 to {shape[-1] - 1}, the classes of the "
                f"logits, got {most if least >= 0 else least}; pass a class of `model`."
            )
    return jnp.broadcast_to(labels, shape[:-1])
