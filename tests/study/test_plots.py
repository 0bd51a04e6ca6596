import struct

import numpy as np
import pytest

from flax_attn.blocks import BLOCKS
from train.study import plots


def size_of(png):
    """Width and height, which a PNG has at a fixed place."""
    return struct.unpack(">II", png.read_bytes()[16:24])


def save(figure, path):
    figure.savefig(path, dpi=150)
    return size_of(path)


def test_cost_has_a_point_and_a_bar_for_each_block(tmp_path):
    blocks = [
        {"attention": "none", "step_seconds": 0.1, "mean": 0.9, "std": 0.01},
        {"attention": "se", "step_seconds": 0.2, "mean": 0.8, "std": None},
    ]
    figure = plots.plot_cost(blocks)
    (axis,) = figure.axes
    first, second = axis.containers
    assert [first.get_label(), second.get_label()] == ["none", "se"]
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[100, 90]])
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[200, 80]])
    (bar,) = first.lines[2][0].get_segments()
    np.testing.assert_allclose(bar, [[100, 89], [100, 91]])
    assert not second.has_yerr  # One seed has no spread.
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["none", "se"]
    assert save(figure, tmp_path / "cost.png") == (1050, 600)


def test_bands_reach_from_the_lowest_seed_to_the_highest(tmp_path):
    accuracies = [[0.1, *[0.2] * 5, 0.3, 0.4, 0.6], [0.3, *[0.4] * 5, 0.5, 0.6, 0.8]]
    seeds = [
        [{"epoch": i, "test_accuracy": a} for i, a in enumerate(seed, 1)]
        for seed in accuracies
    ]
    figure = plots.plot_bands({"se": seeds, "none": seeds[:1]})
    whole, end = figure.axes
    (se, none) = whole.lines
    assert [se.get_label(), none.get_label()] == ["se", "none"]
    np.testing.assert_allclose(se.get_xydata()[:2], [[1, 20], [2, 30]])
    np.testing.assert_allclose(none.get_ydata()[-3:], [30, 40, 60])
    extents = whole.collections[0].get_datalim(whole.transData)
    np.testing.assert_allclose([extents.y0, extents.y1], [10, 80])
    last = [[7, 40], [8, 50], [9, 70]]
    np.testing.assert_allclose(end.lines[0].get_xydata(), last)
    assert save(figure, tmp_path / "curves.png") == (1650, 630)


def history(losses):
    return [
        {"epoch": i, "train_loss": loss, "test_loss": loss}
        | {"train_accuracy": 0.5, "test_accuracy": 0.5}
        for i, loss in enumerate(losses, 1)
    ]


def test_a_first_loss_of_40_does_not_flatten_the_rest():
    losses, _ = plots.plot_curves({"a": history([40, 2.0, 1.0, 0.5])}).axes
    assert losses.get_ylim() == pytest.approx((0, 2.2))
    assert losses.get_title() == "losses up to 40 not shown"
    losses, _ = plots.plot_curves({"a": history([9.9, 2.0, 1.0, 0.5])}).axes
    assert losses.get_ylim()[1] > 9.9 and not losses.get_title()
    losses, _ = plots.plot_curves({"a": history([40, 50])}).axes
    assert losses.get_ylim()[1] > 50 and not losses.get_title()


@pytest.mark.parametrize("names", [1, 12, 24])
def test_legends_cover_no_curve(names):
    curves = {f"a run with a long name {i}": history([2.0, 1.0]) for i in range(names)}
    means = [
        {"block": "se", "contender": name, "dtype": "float32"}
        | {"forward": 1.0, "forward_backward": 3.0}
        for name in curves
    ]
    bands = {name: [run] for name, run in curves.items()}
    for figure in (
        plots.plot_curves(curves),
        plots.plot_bars(means),
        plots.plot_bands(bands),
    ):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert len(legend.get_texts()) in (names, 2 * names)
        assert 0 <= box.y0 and box.y1 <= figure.bbox.y1
        for axis in figure.axes:
            assert axis.get_legend() is None
            assert not axis.get_window_extent().overlaps(box)


def test_many_blocks_differ_and_their_names_do_not_overlap():
    names = list(BLOCKS)
    assert len(names) > 10
    blocks = [
        {"attention": name, "step_seconds": 0.1, "mean": 0.9, "std": None}
        for name in names
    ]
    (points,) = plots.plot_cost(blocks).axes
    (bands,) = plots.plot_bands({name: [history([1.0])] for name in names}).axes
    for lines in ([bar.lines[0] for bar in points.containers], bands.lines):
        looks = {(y.get_color(), y.get_marker(), y.get_linestyle()) for y in lines}
        assert len(looks) == len(names)
    means = [
        {"block": name, "contender": "fast", "dtype": "float32"}
        | {"forward": 1.0, "forward_backward": 3.0}
        for name in names
    ]
    figure = plots.plot_bars(means)
    figure.draw_without_rendering()
    # The names are at an angle of 45 degrees, so each needs sqrt(2) times its height.
    for axis in figure.axes:
        height = 1.25 * 10 / 72 * figure.dpi
        places = [label.get_window_extent().x1 for label in axis.get_xticklabels()]
        assert min(np.diff(places)) > 2**0.5 * height


@pytest.mark.parametrize("epochs, views", [(1, 1), (3, 1), (6, 1), (7, 2), (9, 2)])
def test_the_last_third_has_at_least_three_epochs(epochs, views):
    figure = plots.plot_bands({"se": [history([1.0] * epochs)]})
    assert len(figure.axes) == views
    if views == 2:
        assert len(figure.axes[1].lines[0].get_xdata()) == 3


def test_steps_have_a_row_for_each_run_and_a_column_for_each_block():
    gates = {
        "stage2_block1/attention/spatial/spatial_gate": np.eye(4, 3) + 1,
        "stage1_block1/attention/channel/channel_gate": np.arange(6).reshape(2, 3),
        "stage1_block1/attention/spatial/spatial_gate": np.ones((2, 3)),
    }
    few = {path: values for path, values in gates.items() if "spatial_gate" in path}
    figure = plots.plot_steps({"cbam": gates, "spatial": few})
    axes = np.reshape(figure.axes, (2, 2))
    assert [axis.get_title() for axis in axes[0]] == ["stage1_block1", "stage2_block1"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["cbam", "spatial"]
    channel, spatial = axes[0, 0].lines
    np.testing.assert_array_equal(channel.get_xydata(), [[0, 1], [1, 4]])
    assert channel.get_color() != spatial.get_color() == axes[1, 0].lines[0].get_color()
    band = axes[0, 0].collections[0].get_datalim(axes[0, 0].transData)
    np.testing.assert_allclose([band.y0, band.y1], [0, 5])
    np.testing.assert_array_equal(axes[1, 1].lines[0].get_ydata(), [1, 2, 1, 1])
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["spatial gate", "channel gate"]
