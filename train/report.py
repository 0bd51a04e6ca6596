"""``python -m train.report RUN [RUN ...] --out curves.png``: plots runs.

Each RUN is a workdir of ``train.cifar`` or its metrics.jsonl.

Exit codes: 0 drawn, 2 invalid command line or run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.engine.command import exit_codes
from train.engine.workdir import METRICS
from train.study.logs import labels_of, read_lines
from train.study.plots import check_picture, plot_curves

DRAWN = {"epoch", "train_loss", "test_loss", "train_accuracy", "test_accuracy"}


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl.

    Raises:
      ValueError: the file is missing, malformed or without a finished epoch.
    """
    path = run / METRICS if run.is_dir() else run
    try:
        lines = read_lines(path)
    except OSError as error:
        got = f"no {METRICS} in it" if run.is_dir() else error.strerror
    except ValueError as error:
        got = f"a line that is no JSON object: {error}"
    else:
        if lines and all(DRAWN <= set(line) for line in lines):
            return lines
        got = "a line without losses and accuracies" if lines else "no finished epoch"
    raise ValueError(
        f"`runs` must be workdirs of train.cifar or their {METRICS}, got {run} ({got})."
    )


def draw(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
    ],
    out: Path = Path("curves.png"),
) -> None:
    """Plot the loss and accuracy of one or more runs.

    Args:
        runs: Workdirs of train.cifar, at least one.
        out: Output image; its suffix selects the format.
    """
    if not runs:
        raise ValueError(
            "`runs` must be at least one workdir of train.cifar, got none; pass one, "
            "such as runs/first."
        )
    check_picture("out", out)
    histories = dict(zip(labels_of(runs), map(read, runs), strict=True))
    plot_curves(histories).savefig(out, dpi=150)
    print(f"Wrote {out}.")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default that of the process."""
    with exit_codes("train.report"):
        tyro.cli(draw, prog="python -m train.report", args=args)


if __name__ == "__main__":
    main()
