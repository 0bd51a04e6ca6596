"""Tables as aligned text, for terminals and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Rows as right-aligned columns under their names.

      >>> rows = [{"block": "se", "ms": 1.5}, {"block": "eca", "ms": None}]
      >>> print(format_table(rows))
      block    ms
         se  1.50
        eca     -

    Args:
      rows: at least one, all with the same keys. Floats are shown with two digits,
        sequences as shapes such as 2x14x14, None as a dash.
      markdown: whether to format for Markdown (default: False).
    """
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in aligned)
    aligned.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)
