import struct

import numpy as np

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
    accuracies = [[0.1, 0.2, 0.6], [0.3, 0.4, 0.8]]
    seeds = [
        [{"epoch": i, "test_accuracy": a} for i, a in enumerate(seed, 1)]
        for seed in accuracies
    ]
    figure = plots.plot_bands({"se": seeds, "none": seeds[:1]})
    whole, end = figure.axes
    (se, none) = whole.lines
    assert [se.get_label(), none.get_label()] == ["se", "none"]
    np.testing.assert_allclose(se.get_xydata(), [[1, 20], [2, 30], [3, 70]])
    np.testing.assert_allclose(none.get_ydata(), [10, 20, 60])
    extents = whole.collections[0].get_datalim(whole.transData)
    np.testing.assert_allclose([extents.y0, extents.y1], [10, 80])
    np.testing.assert_allclose(end.lines[0].get_xydata(), [[3, 70]])
    assert save(figure, tmp_path / "curves.png") == (1650, 630)


def test_gates_stand_beside_their_images_on_one_scale(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    gates = {
        "stage1_block2": np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 4, 4),
        "stage2_block2": np.full((2, 2, 2), 0.4, np.float32),
    }
    figure = plots.plot_gates(images, gates)
    *axes, bar = figure.axes
    shown = np.array(axes).reshape(2, 3)
    for i, row in enumerate(shown):
        drawn = [axis.images[0] for axis in row]
        expected = [images[i], *(maps[i] for maps in gates.values())]
        for image, array in zip(drawn, expected, strict=True):
            np.testing.assert_array_equal(image.get_array(), array)
        for image in drawn[1:]:
            assert image.get_clim() == (0, 1)
            assert image.get_interpolation() == "nearest"
    titles = [axis.get_title() for axis in shown[0]]
    assert titles == ["image", "stage1_block2\n4×4", "stage2_block2\n2×2"]
    assert bar.get_ylabel() == "spatial gate"
    assert save(figure, tmp_path / "gates.png") == (735, 465)
