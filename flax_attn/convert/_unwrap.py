"""Weights out of a checkpoint: the dict inside a dict, and the prefixes of wrappers."""

from collections.abc import Mapping
from typing import Any

from flax_attn.convert._arrays import Arrays

# What training scripts call the weights in a checkpoint.
WRAPPERS = ("state_dict", "model")
# Of torch.nn.DataParallel and DistributedDataParallel, and of torch.compile.
PREFIXES = ("module.", "_orig_mod.")


def unwrap(label: str, state: Any) -> Any:
    """The weights in ``state``, which may be a checkpoint; prints what it unwraps.

    A dict that also holds arrays is returned as it is: they may be weights too.

    Raises:
      ValueError: ``state`` holds two dicts that may be the weights.
    """
    while isinstance(state, Mapping):
        names = [name for name in WRAPPERS if isinstance(state.get(name), Mapping)]
        others = [name for name in state if name not in names]
        if not names or any(getattr(state[name], "shape", ()) for name in others):
            return state
        if len(names) > 1:
            both = " and ".join(f"`{name}`" for name in names)
            raise ValueError(
                f"{label} must hold one dict of weights, got {both}; pass one of them, "
                f"such as state[{names[0]!r}]."
            )
        rest = f", without {', '.join(map(repr, others))}" if others else ""
        print(f"Unwrapped {names[0]!r} from {label}{rest}.")
        state = state[names[0]]
    return state


def strip_prefixes(state: Arrays) -> Arrays:
    """``state`` without the prefixes that all keys share; prints what it strips."""
    while prefix := next((p for p in PREFIXES if _all_start(state, p)), ""):
        print(f"Removed the prefix {prefix!r} from all keys.")
        state = {key.removeprefix(prefix): array for key, array in state.items()}
    return state


def _all_start(state: Arrays, prefix: str) -> bool:
    return bool(state) and all(key.startswith(prefix) for key in state)
