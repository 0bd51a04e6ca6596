"""``python -m train.report RUN [RUN ...] --out curves.png``: a picture of runs.

Each RUN is a workdir of ``train.cifar`` or its metrics.jsonl.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.engine.workdir import METRICS
from train.study.logs import read_lines
from train.study.plots import plot_bars, plot_curves

__all__ = ["main", "name_of", "plot_bars", "plot_curves", "read"]


def name_of(run: Path) -> str:
    """The name of a run in a picture: that of its folder."""
    run = run.resolve()
    return run.name if run.is_dir() else run.parent.name


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl."""
    return read_lines(run / METRICS if run.is_dir() else run)


def draw(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path = Path("curves.png"),
) -> None:
    """Draw the loss and accuracy of runs into one picture.

    Args:
        runs: workdirs of train.cifar.
        out: the picture to write; its ending names the format.
    """
    names = [name_of(run) for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    histories = dict(zip(names, map(read, runs), strict=True))
    plot_curves(histories).savefig(out, dpi=150)
    print(f"Wrote {out}.")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    tyro.cli(draw, prog="python -m train.report", args=args)


if __name__ == "__main__":
    main()
