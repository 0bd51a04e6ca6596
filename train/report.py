"""``python -m train.report RUN [RUN ...] --out curves.png``: a picture of runs.

Each RUN is a workdir of ``train.cifar`` or its metrics.jsonl.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg", force=False)

import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_curves(histories: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draws loss and accuracy over epochs; dashed is training, solid is test."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, history in histories.items():
        epochs = [line["epoch"] for line in history]
        for axis, what, factor in zip(
            axes, ("loss", "accuracy"), (1, 100), strict=True
        ):
            test = [factor * line[f"test_{what}"] for line in history]
            train = [factor * line[f"train_{what}"] for line in history]
            (solid,) = axis.plot(epochs, test, marker="o", ms=3, label=f"{name}, test")
            axis.plot(epochs, train, "--", color=solid.get_color(), label="training")
    for axis, label in zip(axes, ("loss", "accuracy in %"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path = Path("curves.png"),
) -> None:
    """Draw the loss and accuracy of runs into one picture.

    Args:
        runs: workdirs of train.cifar.
        out: the picture to write; its ending names the format.
    """
    histories = {run.resolve().name: read(run) for run in runs}
    plot_curves(histories).savefig(out, dpi=150)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    tyro.cli(main)
