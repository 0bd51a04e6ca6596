"""The names of the blocks in a command's ``--help``; only then is jax imported."""

import sys
from collections.abc import Sequence


def block_names(args: Sequence[str] | None, *more: str) -> str:
    """The names of all blocks in a sentence, or nothing if ``args`` request no help.

    Args:
      args: the command line; None for that of the process.
      *more: names to list before the blocks.
    """
    if not {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        return ""
    from flax_attn.blocks import BLOCKS

    return f"Blocks: {', '.join((*more, *BLOCKS))}."
