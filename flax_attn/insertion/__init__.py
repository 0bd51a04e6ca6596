"""Adds attention to a third-party Linen model without changing its code.

``insert`` runs a block after selected submodules. ``sites`` lists where,
``assert_active`` checks that the gates affect the output, ``merge`` copies pretrained
variables, and ``parameter_labels`` labels the attention parameters for an optimizer.
``insert_pretrained`` handles Flax models from Hugging Face Transformers, and ``watch``
observes the calls in any model.
"""

from flax_attn.insertion._active import assert_active
from flax_attn.insertion._insert import Inserted, Select, Where, insert
from flax_attn.insertion._linen import Call, Intercepted, Path, Watcher, watch
from flax_attn.insertion._pretrained import insert_pretrained
from flax_attn.insertion._sites import Site, Sites, sites
from flax_attn.insertion._variables import merge, parameter_labels

__all__ = [
    "Call",
    "Inserted",
    "Intercepted",
    "Path",
    "Select",
    "Site",
    "Sites",
    "Watcher",
    "Where",
    "assert_active",
    "insert",
    "insert_pretrained",
    "merge",
    "parameter_labels",
    "sites",
    "watch",
]
