"""The figures of the training programs, with matplotlib but without pyplot.

Pyplot would replace a notebook's backend. matplotlib is imported on first use.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A guess among 20,000 classes has a loss of ln 20,000 = 9.9; more is an outlier.
WORST_LOSS = 10.0
# Fewer epochs show no trend.
LEAST_EPOCHS = 3
# Blocks differ in more than color, of which there are ten; eleven markers, so that no
# pair repeats among the first 110.
MARKERS = "osD^vP*X<>p"
LINES = ("-", "--", ":", "-.")


def check_folder(name: str, path: Path) -> None:
    """Raises ``ValueError`` if the folder of ``path``, an option, does not exist."""
    if not path.parent.is_dir():
        raise ValueError(
            f"`{name}` must be in a folder that exists, got {path}; create "
            f"{path.parent} first."
        )


def check_picture(name: str, path: Path) -> None:
    """Raises ``ValueError`` unless ``path``, an option, can be written as a picture.

    To call before anything is computed.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes().keys() - {"pgf"}
    if path.suffix.lower()[1:] not in known:
        raise ValueError(
            f"`{name}` must be a picture, got {path}; end its name with one of "
            f"{', '.join(f'.{suffix}' for suffix in sorted(known))}."
        )
    check_folder(name, path)


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Draws loss and accuracy over epochs; dashed is training, solid is test.

    Args:
      histories: by the name of a run, the lines of its metrics.jsonl.
    """
    figure = new_figure(11, _height(3.4, 2 * len(histories)))
    axes = figure.subplots(1, 2)
    for name, history in histories.items():
        epochs = [line["epoch"] for line in history]
        for axis, what, factor in zip(
            axes, ("loss", "accuracy"), (1, 100), strict=True
        ):
            test = [factor * line[f"test_{what}"] for line in history]
            train = [factor * line[f"train_{what}"] for line in history]
            (solid,) = axis.plot(epochs, test, marker="o", ms=3, label=f"{name}, test")
            style = {"marker": ".", "ms": 4, "color": solid.get_color()}
            axis.plot(epochs, train, "--", label=f"{name}, training", **style)
    for axis, label in zip(axes, ("loss", "accuracy in %"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        _label_epochs(axis)
        axis.grid(alpha=0.3)
    _limit_losses(axes[0])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _limit_losses(axis: "Axes") -> None:
    """Clips outliers that would flatten the other curves, and says so."""
    losses = np.concatenate([line.get_ydata() for line in axis.lines])
    shown = losses[losses <= WORST_LOSS]
    if 0 < len(shown) < len(losses):
        axis.set_ylim(bottom=0, top=1.1 * shown.max())
        axis.set_title(f"losses up to {losses.max():.3g} not shown", fontsize=8)


def plot_bars(means: list[dict[str, Any]]) -> "Figure":
    """Draws the geometric means of ``train.benchmark`` over its shapes."""
    blocks = list(dict.fromkeys(row["block"] for row in means))
    kinds = list(dict.fromkeys((row["contender"], row["dtype"]) for row in means))
    width = 0.8 / len(kinds)
    figure = new_figure(max(11, 2 + len(blocks)), _height(4.2, len(kinds)))
    axes = figure.subplots(1, 2)
    for axis, field in zip(axes, ("forward", "forward_backward"), strict=True):
        for i, kind in enumerate(kinds):
            rows = [row for row in means if (row["contender"], row["dtype"]) == kind]
            places = [
                blocks.index(row["block"]) + (i + 0.5) * width - 0.4 for row in rows
            ]
            heights = [row[field] for row in rows]
            axis.bar(places, heights, width, label=", ".join(kind))
        axis.set_xticks(
            range(len(blocks)), blocks, rotation=45, ha="right", rotation_mode="anchor"
        )
        axis.set(title=field.replace("_", " + "), ylabel="time / copy")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_cost(blocks: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws accuracy against step time, the blocks of ``train.compare``'s report.

    A bar reaches one standard deviation over seeds up and down. The names are in the
    legend, so that close points do not overlap them.
    """
    figure = new_figure(7, 4)
    axis = figure.subplots()
    for block, marker in zip(blocks, itertools.cycle(MARKERS), strict=False):
        axis.errorbar(
            1e3 * block["step_seconds"],
            100 * block["mean"],
            yerr=None if block["std"] is None else 100 * block["std"],
            marker=marker,
            ms=7,
            capsize=4,
            linestyle="none",
            label=block["attention"],
        )
    axis.set(xlabel="step time in ms", ylabel="final test accuracy in %")
    axis.margins(0.12)
    axis.ticklabel_format(useOffset=False)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return figure


def plot_bands(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> "Figure":
    """Draws test accuracy over epochs: by block, the mean and the range of its seeds.

    The blocks differ at the end if anywhere, hence a second view of the last third,
    where it has at least three epochs.

    Args:
      histories: by block, for each seed the lines of its metrics.jsonl, of one length.
    """
    lengths = {len(seeds[0]) for seeds in histories.values()}
    views = ["all epochs"]
    if all(length - 2 * length // 3 >= LEAST_EPOCHS for length in lengths):
        views.append("the last third")
    height = _height(4.2, len(histories))
    figure = new_figure(1.5 + 4.75 * len(views), height)
    (axes,) = figure.subplots(1, len(views), squeeze=False)
    for i, (name, seeds) in enumerate(histories.items()):
        # After ten colors, another dash pattern.
        style = LINES[i // 10 % len(LINES)]
        epochs = np.array([line["epoch"] for line in seeds[0]])
        values = np.array([[100 * line["test_accuracy"] for line in s] for s in seeds])
        masks = (epochs > 0, epochs > epochs[-1] * 2 / 3)
        for axis, shown in zip(axes, masks, strict=False):
            x, y = epochs[shown], values[:, shown]
            (solid,) = axis.plot(
                x, y.mean(0), style, marker="o", ms=2.5, lw=1.2, label=name
            )
            axis.fill_between(
                x, y.min(0), y.max(0), color=solid.get_color(), alpha=0.15, linewidth=0
            )
    for axis, title in zip(axes, views, strict=True):
        axis.set(xlabel="epoch", ylabel="test accuracy in %", title=title)
        _label_epochs(axis)
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_steps(runs: Mapping[str, Mapping[str, np.ndarray]]) -> "Figure":
    """Draws how far gates are open over the first steps: a row for each run.

    A column is a residual block, a line the median of one of its gates, in a band that
    holds 90% of its values.

    Args:
      runs: by the name of a run, the result of ``gates.gates_over_steps``.
    """
    paths = [path.split("/") for run in runs.values() for path in run]
    blocks = sorted({path[0] for path in paths})
    kinds = sorted({path[-1] for path in paths})
    figure = new_figure(2 + 2.8 * len(blocks), 0.6 + 2 * len(runs))
    shared: dict[str, Any] = {"squeeze": False, "sharex": True, "sharey": True}
    grid = figure.subplots(len(runs), len(blocks), **shared)
    handles: dict[str, Any] = {}
    for (name, run), row in zip(runs.items(), grid, strict=True):
        row[0].set_ylabel(name, fontsize=8)
        for path, values in run.items():
            block, *_, kind = path.split("/")
            axis, color = row[blocks.index(block)], f"C{kinds.index(kind)}"
            low, median, high = values.T
            steps = np.arange(len(values))
            (handles[kind],) = axis.plot(steps, median, color=color)
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    for axis in grid.flat:
        axis.grid(alpha=0.3)
    for axis, block in zip(grid[0], blocks, strict=True):
        axis.set_title(block)
    for axis in grid[-1]:
        axis.set_xlabel("step")
    grid[0, 0].set_ylim(bottom=0)
    figure.supylabel("gate: median and 90% of its values", fontsize=9)
    kinds = [kind.replace("_", " ") for kind in handles]
    figure.legend(handles.values(), kinds, loc="outside right center")
    return figure


def _height(least: float, names: int) -> float:
    """The height of a figure, in inches, for this number of names in its legend."""
    return max(least, 0.5 + 0.25 * names)


def _label_epochs(axis: "Axes") -> None:
    """Integer ticks, also for a single epoch."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
