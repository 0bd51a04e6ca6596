"""The names of the blocks in a command's ``--help``; only then is jax imported."""

import sys
from collections.abc import Sequence


def with_blocks(text: str | None, args: Sequence[str] | None, *more: str) -> str:
    """``text``, followed by the names of all blocks if ``args`` request help.

    Args:
      text: the help text; its line breaks are dropped.
      args: the command line; None for that of the process.
      *more: names to list before the blocks.
    """
    text = " ".join((text or "").split())
    if not {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        return text
    from flax_attn.blocks import BLOCKS

    return f"{text}\n\nBlocks: {', '.join((*more, *BLOCKS))}."
