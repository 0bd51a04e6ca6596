"""The blocks in a command's ``--help``, which needs jax only when it is asked for."""

import sys
from collections.abc import Sequence


def with_blocks(text: str | None, args: Sequence[str] | None, *more: str) -> str:
    """``text``, and below it the names of all blocks if ``args`` ask for help.

    Args:
      text: what the help says of the command; its line breaks go.
      args: the command line; None is that of the process.
      *more: names before those of the blocks.
    """
    text = " ".join((text or "").split())
    if not {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        return text
    from flax_attn.blocks import BLOCKS

    return f"{text}\n\nBlocks: {', '.join((*more, *BLOCKS))}."
