"""``statistics``: how far gates are open."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class GateStatistics:
    """How far one gate is open.

    Attributes:
      path: path of the gate in the model; empty for a single gate.
      shape: shape of the gate.
      below: fraction of its elements below ``low``: nearly closed.
      above: fraction of its elements above ``high``: nearly open.
      mean: the mean of its elements.
      entropy: the mean over its elements g of ``-g log2 g - (1 - g) log2 (1 - g)``, in
        bits: 1 if all are 1/2, 0 if each is 0 or 1.
    """

    path: str
    shape: tuple[int, ...]
    below: float
    above: float
    mean: float
    entropy: float


class StatisticsTable(tuple[GateStatistics, ...]):
    """Statistics of several gates; ``str`` returns a table."""

    def __str__(self) -> str:
        """One line for each gate, below the names of the fields."""
        header = [field.name for field in dataclasses.fields(GateStatistics)]
        rows = [
            [
                row.path or "gate",
                "×".join(map(str, row.shape)),
                *(f"{share:.1%}" for share in (row.below, row.above)),
                *(f"{value:.3f}" for value in (row.mean, row.entropy)),
            ]
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            f"{first:{widths[0]}}  "
            + "  ".join(
                f"{cell:>{n}}" for cell, n in zip(rest, widths[1:], strict=True)
            )
            for first, *rest in (header, *rows)
        ]
        return "\n".join(lines)


def statistics(
    gates: Any | Mapping[str, Any], *, low: float = 0.05, high: float = 0.95
) -> StatisticsTable:
    """Returns how much of each gate is saturated, its mean and its entropy.

    Computed in float64, whatever the dtype of the gate::

      >>> print(statistics({"a": np.array([0.0, 0.5, 1.0, 0.5])}))
      path  shape  below  above   mean  entropy
      a         4  25.0%  25.0%  0.500    0.500

    Args:
      gates: the result of ``attention_maps``, or one gate. Halve gates of blocks with
        ``identity_init`` first, since their range is [0, 2]. What ``GlobalContext``
        adds, named ``channel_shift``, is left out.
      low: elements below it count as closed (default: 0.05).
      high: elements above it count as open (default: 0.95).

    Returns:
      A tuple of ``GateStatistics``, in the order of ``gates``; as a string, a table.

    Raises:
      ValueError: unless ``0 <= low < high <= 1``, or if a gate is empty or not within
        [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            "`low` and `high` must satisfy 0 <= low < high <= 1, got "
            f"{low!r} and {high!r}; the defaults are 0.05 and 0.95."
        )
    named = gates if isinstance(gates, Mapping) else {"": gates}
    if not named:
        raise ValueError(
            "`gates` must contain at least one gate, got none; pass the "
            "result of attention_maps."
        )
    return StatisticsTable(
        _statistics(path, gate, low, high)
        for path, gate in named.items()
        if not re.search(r"_shift(/\d+)?$", path)
    )


def _statistics(path: str, gate: Any, low: float, high: float) -> GateStatistics:
    g = np.asarray(gate).astype(np.float64)
    name = f"`gates`[{path!r}]" if path else "`gates`"
    # So that NaN fails too.
    if not (g.size and g.min() >= 0 and g.max() <= 1):
        got = f"values from {g.min()} to {g.max()}" if g.size else f"shape {g.shape}"
        raise ValueError(
            f"{name} must have elements, all within [0, 1], got {got}; rescale them "
            "first, e.g. halve gates of `identity_init`, or use (1 + tanh) / 2."
        )
    return GateStatistics(
        path=path,
        shape=g.shape,
        below=float((g < low).mean()),
        above=float((g > high).mean()),
        mean=float(g.mean()),
        # Not a negation, which would print zero as -0.
        entropy=float(0 - (_x_log2_x(g) + _x_log2_x(1 - g)).mean()),
    )


def _x_log2_x(x: np.ndarray) -> np.ndarray:
    return x * np.log2(np.where(x > 0, x, 1))
