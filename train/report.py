"""``python -m train.report RUN [RUN ...] --out curves.png``: a picture of runs.

Each RUN is a workdir of ``train.cifar`` or its metrics.jsonl.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure


def name_of(run: Path) -> str:
    """What a run is called in a picture: the name of its folder."""
    run = run.resolve()
    return run.name if run.is_dir() else run.parent.name


def read(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_curves(histories: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draws loss and accuracy over epochs; dashed is training, solid is test."""
    # Not pyplot's: that would take the notebook's backend away.
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
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


def plot_bars(means: list[dict[str, Any]]) -> Figure:
    """Draws the geometric means of ``train.benchmark`` over its shapes."""
    blocks = list(dict.fromkeys(row["block"] for row in means))
    kinds = list(dict.fromkeys((row["contender"], row["dtype"]) for row in means))
    width = 0.8 / len(kinds)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, field in zip(axes, ("forward", "forward_backward"), strict=True):
        for i, kind in enumerate(kinds):
            rows = [row for row in means if (row["contender"], row["dtype"]) == kind]
            places = [
                blocks.index(row["block"]) + (i + 0.5) * width - 0.4 for row in rows
            ]
            heights = [row[field] for row in rows]
            axis.bar(places, heights, width, label=", ".join(kind))
        axis.set_xticks(range(len(blocks)), blocks, rotation=20)
        axis.set(title=field.replace("_", " + "), ylabel="time / copy")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
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
    names = [name_of(run) for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    histories = dict(zip(names, map(read, runs), strict=True))
    plot_curves(histories).savefig(out, dpi=150)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    tyro.cli(main)
