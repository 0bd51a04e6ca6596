"""Attention in a Linen model that somebody else wrote, without changing its code.

``insert`` runs a block after chosen submodules; ``sites`` says where, ``assert_active``
that the gates act, ``merge`` moves pretrained variables in and ``parameter_labels``
tells an optimizer which parameters are the attention's. ``insert_pretrained`` inserts
into the Flax models of transformers, and ``watch`` observes the calls in any model.
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
