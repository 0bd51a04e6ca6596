"""``python -m flax_attn.convert``: weight files from and to PyTorch's names."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from flax_attn.convert._files import check_output, load, save
from flax_attn.convert._mapping import to_flax, to_torch
from flax_attn.convert._rules import Naming

try:
    import tyro
except ImportError as error:
    raise ImportError(
        f"The command needs tyro: pip install 'flax-attn[convert]' ({error})."
    ) from error


def convert(
    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    to: Literal["flax", "torch"],
    naming: Naming = "timm",
    like: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    lenient: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert weights between PyTorch and Flax.

    Args:
        input: Input file: safetensors, or PyTorch (.pth, .pt, .pth.tar, .bin, .ckpt).
        output: Output file, in safetensors format.
        to: Framework of OUT.
        naming: Naming scheme of the PyTorch weights.
        like: File with the keys and shapes that OUT must have.
        lenient: List the keys that do not fit, and convert the rest.
        overwrite: Replace OUT if it exists.
    """
    check_output(output, overwrite)
    if output.exists() and output.samefile(input):
        raise ValueError("OUT must not be the same file as IN.")
    convert_to = {"flax": to_flax, "torch": to_torch}[to]
    template = load(like) if like else None
    result = convert_to(load(input), naming=naming, like=template, strict=not lenient)
    save(output, result, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with ``arguments`` (default: those of the process).

    Returns:
      The exit code: 0, or 1 after an error, which is printed to stderr. Invalid
      arguments exit with 2.
    """
    try:
        tyro.cli(
            convert,
            prog="python -m flax_attn.convert",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
