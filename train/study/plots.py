"""The figures of the training room, for matplotlib without pyplot.

Pyplot would replace a notebook's backend; matplotlib is imported when one is drawn.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blocks differ in more than color, of which there are ten.
MARKERS = "osD^vP*X<>"


def plot_curves(histories: dict[str, list[dict[str, Any]]]) -> "Figure":
    """Draws loss and accuracy over epochs; dashed is training, solid is test."""
    figure = _new_figure(9, 3.4)
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


def plot_bars(means: list[dict[str, Any]]) -> "Figure":
    """Draws the geometric means of ``train.benchmark`` over its shapes."""
    blocks = list(dict.fromkeys(row["block"] for row in means))
    kinds = list(dict.fromkeys((row["contender"], row["dtype"]) for row in means))
    width = 0.8 / len(kinds)
    figure = _new_figure(11, 3.8)
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


def plot_cost(blocks: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws accuracy against step time, the blocks of ``train.compare``'s report.

    A bar reaches one standard deviation over seeds up and down. The names are in the
    legend, where they are legible however close the points.
    """
    figure = _new_figure(7, 4)
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

    The blocks differ at the end if anywhere, hence a second view of the last third.

    Args:
      histories: by block, for each seed the lines of its metrics.jsonl, of one length.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _new_figure(11, 4.2)
    whole, end = figure.subplots(1, 2)
    for name, seeds in histories.items():
        epochs = np.array([line["epoch"] for line in seeds[0]])
        values = np.array([[100 * line["test_accuracy"] for line in s] for s in seeds])
        last = epochs > epochs[-1] * 2 / 3
        for axis, shown in ((whole, epochs > 0), (end, last)):
            x, y = epochs[shown], values[:, shown]
            (solid,) = axis.plot(x, y.mean(0), marker="o", ms=2.5, lw=1.2, label=name)
            axis.fill_between(
                x, y.min(0), y.max(0), color=solid.get_color(), alpha=0.15, linewidth=0
            )
    for axis, title in ((whole, "all epochs"), (end, "the last third")):
        axis.set(xlabel="epoch", ylabel="test accuracy in %", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_gates(images: np.ndarray, gates: Mapping[str, np.ndarray]) -> "Figure":
    """Draws images and, beside each, its spatial gates on one scale from 0 to 1.

    Args:
      images: ``(N, H, W, 3)`` uint8.
      gates: by name, ``(N, h, w)``; each is drawn as large as the image.
    """
    titled = {title_of(name, maps): maps for name, maps in gates.items()}
    figure, axes = _beside(images, titled)
    for column, maps in zip(axes.T[1:], gates.values(), strict=True):
        for axis, gate in zip(column, maps, strict=True):
            drawn = axis.imshow(
                gate, cmap="magma", vmin=0, vmax=1, interpolation="nearest"
            )
    figure.colorbar(drawn, ax=axes[:, 1:], label="spatial gate", shrink=0.6)
    return figure


def plot_overlays(
    images: np.ndarray,
    overlays: Mapping[str, np.ndarray],
    colors: np.ndarray,
    limits: tuple[float, float],
) -> "Figure":
    """Draws images and, beside each, the same with its spatial gates laid over.

    Args:
      images: ``(N, H, W, 3)`` uint8.
      overlays: by title, ``(N, H, W, 3)`` uint8.
      colors: those of gates from one limit to the other, ``(K, 3)`` from 0 to 255.
      limits: the gates with the first and the last color.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    figure, axes = _beside(images, overlays)
    for column, pictures in zip(axes.T[1:], overlays.values(), strict=True):
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture)
    scale = ScalarMappable(Normalize(*limits), ListedColormap(colors / 255))
    figure.colorbar(scale, ax=axes[:, 1:], label="spatial gate", shrink=0.6)
    return figure


def _beside(
    images: np.ndarray, columns: Mapping[str, np.ndarray]
) -> tuple["Figure", np.ndarray]:
    """A figure with ``images`` in its first column and a title over each other one."""
    count = 1 + len(columns)
    figure = _new_figure(1.3 * count + 1, 1.3 * len(images) + 0.5)
    axes = figure.subplots(len(images), count, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(image)
    for axis, title in zip(axes[0], ("image", *columns), strict=True):
        axis.set_title(title, fontsize=8)
    return figure, axes


def title_of(name: str, maps: np.ndarray) -> str:
    """The title over gates ``(N, h, w)``: their name and their size."""
    return f"{name}\n{'×'.join(map(str, maps.shape[1:3]))}"


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
