"""``insert_pretrained``: attention in an object that holds a module and weights."""

import copy
from typing import Any, Literal

import jax
from flax import linen as nn

from flax_attn.insertion._insert import insert
from flax_attn.insertion._variables import merge
from flax_attn.insertion.selection import Where

_NEEDED = ("module", "params", "input_shape", "init_weights")


def insert_pretrained(
    model: Any,
    attention: Any,
    where: Where,
    *,
    init: Literal["identity"] | None = "identity",
    name: str = "attention",
    seed: int = 0,
) -> Any:
    """Returns a copy of a Flax model from Transformers with attention inserted.

    Such a model is not a Linen module; it holds one as the read-only ``model.module``
    and its weights as ``model.params``. The copy has the same interface and weights,
    plus new weights for the attention::

      from transformers import FlaxResNetForImageClassification  # transformers < 5

      model = FlaxResNetForImageClassification.from_pretrained("microsoft/resnet-50")
      where = "resnet/encoder/stages/*/layers/?"
      model = insert_pretrained(model, flax_attn.SE(), where)
      logits = model(pixel_values).logits

    ``sites``, ``assert_active``, ``parameter_labels`` and ``attention_maps`` take
    ``model.module``, whose input is a batch of images in NHWC. ``from_pretrained``
    cannot load the attention, so save ``model.params`` with your own checkpointer.

    Args:
      model: an object with ``module``, ``params``, ``input_shape`` and
        ``init_weights(key, input_shape)``, such as a ``FlaxPreTrainedModel``; it is not
        changed.
      attention: as in ``insert``.
      where: as in ``insert``, with paths relative to ``model.module``.
      init: as in ``insert`` (default: "identity", so that the outputs stay those of the
        pretrained model).
      name: as in ``insert`` (default: "attention").
      seed: seed of the new parameters (default: 0).

    Returns:
      The copy, an instance of a subclass of ``type(model)`` with the same name.

    Raises:
      ValueError: ``model`` lacks one of these attributes, or ``insert`` rejects an
        argument.
    """
    kind = type(model)
    missing = [attribute for attribute in _NEEDED if not hasattr(model, attribute)]
    if missing or not isinstance(model.module, nn.Module):
        raise ValueError(
            "`model` must hold a Linen module as `module` and have `params`, "
            f"`input_shape` and `init_weights`, got {kind.__name__} without "
            f"{', '.join(missing) or 'a Linen module'}; pass a Flax model of "
            "transformers, or a Linen module to flax_attn.insert."
        )
    inserted = insert(model.module, attention, where, init=init, name=name)
    # A property of the class, which hides the one of its base that cannot be set.
    members = {"module": property(lambda self: inserted), "__module__": kind.__module__}
    new = copy.copy(model)
    new.__class__ = type(kind.__name__, (kind,), members)
    fresh = new.init_weights(jax.random.key(seed), new.input_shape)
    new.params, _ = merge(model.params, fresh)
    return new
