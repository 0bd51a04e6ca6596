"""The figure of images, their gates and Grad-CAM."""

import io
import sys

import numpy as np
import pytest

from flax_attn.inspect import overlay, plot


def panels_of(figure, rows, names):
    """The axes of images in their rows, and those of the color bars."""
    count = rows * (1 + 2 * names)
    return np.array(figure.axes[:count]).reshape(rows, -1), figure.axes[count:]


def texts_of(axis):
    return [text.get_text() for text in axis.texts]


def test_maps_stand_alone_and_beside_the_image_under_them():
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    gates = {"a": rng.uniform(0.2, 0.6, (2, 4, 4)), "b": rng.uniform(size=(2, 4, 4, 1))}
    cams = {"c": rng.uniform(0, 3e-3, (2, 4, 4, 1))}
    panels, bars = panels_of(plot(images, gates, cams=cams), 2, 3)
    under = "overlay"
    titles = [axis.get_title() for axis in panels[0]]
    assert titles == ["image", "a\n4×4", under, "b\n4×4", under, "c\n4×4", under]
    maps = [gates["a"], gates["b"][..., 0], cams["c"][..., 0]]
    maps[2] = maps[2] / maps[2].max((1, 2), keepdims=True)
    limits = [(maps[0].min(), maps[0].max()), (maps[1].min(), maps[1].max()), (0, 1)]
    for i, (shown, *pairs) in enumerate(panels):
        np.testing.assert_array_equal(shown.images[0].get_array(), images[i])
        for j, own in enumerate(limits):
            alone, under = (axis.images[0] for axis in pairs[2 * j : 2 * j + 2])
            np.testing.assert_array_equal(alone.get_array(), maps[j][i])
            assert alone.get_clim() == own and alone.get_interpolation() == "nearest"
            expected = overlay(images[i], maps[j][i], limits=own)
            np.testing.assert_array_equal(under.get_array(), expected)
    assert [bar.get_xlim() for bar in bars] == limits
    labels = [bar.get_xlabel() for bar in bars]
    assert labels == ["spatial gate", "spatial gate", "Grad-CAM / its maximum"]
    assert not any(map(texts_of, panels.flat))


def test_a_constant_map_is_called_so_and_hides_the_image():
    """On the pixels that are drawn; a spread of a twentieth is not constant."""
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[:, 2:6, 2:6] = 255
    ramp = np.linspace(-0.5, 0.5, 16).reshape(4, 4)
    gates = {"a": np.stack([0.97 + 0.0 * ramp, 0.5 + 0.049 * ramp, 0.5 + 0.051 * ramp])}
    figure = plot(images, gates, cams={"c": np.zeros((3, 4, 4))}, limits=(0.25, 1.25))
    panels, (bar, _) = panels_of(figure, 3, 2)
    assert panels[0, 1].images[0].get_clim() == bar.get_xlim() == (0.25, 1.25)
    for (_, _, under, _, cam), says in zip(panels, ("0.97", "0.50", None), strict=True):
        pixels = np.asarray(under.images[0].get_array())
        assert (pixels == pixels[0, 0]).all() == (says is not None)
        assert texts_of(under) == ([f"constant at {says}"] if says else [])
        assert texts_of(cam) == ["constant at 0.00"]  # No evidence.


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
GATES = {"a": np.ones((2, 2, 2))}


@pytest.mark.parametrize(
    "images, gates, options, says",
    [
        (IMAGES[0], GATES, {}, r"`images` must have .* 3\), got \(4, 4, 3"),
        (IMAGES, {}, {}, "`gates` must have at least one map, got none"),
        (IMAGES, {"a": np.ones((2, 1, 1, 8))}, {}, r"`gates\['a'\]` .* \(2, 1, 1, 8\)"),
        (IMAGES, GATES, {"cams": {"c": np.ones(3)}}, r"`cams\['c'\]` .* got \(3,\)"),
        (
            IMAGES,
            GATES["a"],
            {},
            "`gates` must be a dict from name to map, got ndarray",
        ),
        (IMAGES, GATES, {"limits": (1, 0)}, r"`limits` must .* got \(1, 0\)"),
    ],
)
def test_bad_arguments(images, gates, options, says):
    with pytest.raises(ValueError, match=says):
        plot(images, gates, **options)


def test_names_are_no_mathematics():
    figure = plot(IMAGES, {"cost $1, $2": np.ones((2, 2, 2))})
    figure.savefig(io.BytesIO())


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot(IMAGES, GATES)
