"""Overlays of gates on their images, and the map of colors."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn.inspect import color_map, colour_map, overlay

# The weights of red, green and blue in the lightness of a pixel.
LIGHT = [0.299, 0.587, 0.114]


def bilinear(gate, height, width):
    """Bilinear sampling at pixel centers, borders extended, in float64."""

    def weights(n, size):
        matrix = np.zeros((size, n))
        for i in range(size):
            at = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
            low = min(int(at), max(n - 2, 0))
            matrix[i, low] += 1 - (at - low)
            if low + 1 < n:
                matrix[i, low + 1] += at - low
        return matrix

    return weights(gate.shape[0], height) @ gate @ weights(gate.shape[1], width).T


def test_an_overlay_shows_the_image_where_the_gate_is_open():
    image = np.random.RandomState(0).randint(0, 256, (12, 16, 3)).astype(np.uint8)
    gate = np.random.RandomState(1).uniform(size=(3, 4)).astype(np.float32)
    values = bilinear(gate.astype(np.float64), 12, 16)
    colors = color_map(values)
    expected = colors + 0.7 * values[..., None] * (image - colors)
    picture = overlay(image, gate, alpha=0.3)
    assert picture.dtype == np.uint8 and picture.shape == image.shape
    assert np.abs(picture - expected).max() <= 0.501
    assert np.abs(overlay(image, gate, alpha=1) - colors).max() <= 0.501
    # All valid shapes and dtypes.
    for same in (gate[..., None], gate[None, ..., None], jnp.asarray(gate)):
        np.testing.assert_array_equal(overlay(image, same, alpha=0.3), picture)
    for same in (image / 255, (image / 255).astype(np.float32)):
        np.testing.assert_array_equal(overlay(same, gate, alpha=0.3), picture)


def test_bright_pixels_are_no_open_gates():
    """At one gate, the image moves a pixel by less than its gate's range of colors."""
    image = np.zeros((2, 8, 3), np.uint8)
    image[1] = 255
    dark, bright = overlay(image, np.linspace(0, 1, 8)[None]).astype(float)
    np.testing.assert_array_equal(dark[0], bright[0])  # Closed: nothing of the image.
    np.testing.assert_allclose(bright[-1] - dark[-1], 0.4 * 255, atol=1)
    light = np.stack([dark, bright]) @ LIGHT
    assert light[1, :3].max() < light[0, -1]  # Closed and bright, open and dark.


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("value", [0.0, 0.5, 0.97, 1.0])
def test_under_a_constant_gate_all_pixels_are_equal(value, alpha):
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:6, 2:6] = 255
    wiggle = 0.049 * (np.indices((4, 4)).sum(0) / 6 - 0.5)  # Less than means anything.
    gates = np.stack([np.full((4, 4), value), value + wiggle])
    pictures = overlay(np.stack([image, image]), gates, alpha=alpha)
    expected = np.broadcast_to(np.rint(color_map(value)), pictures.shape)
    np.testing.assert_array_equal(pictures, expected)
    assert len(np.unique(overlay(image, value + 2 * wiggle, alpha=alpha))) > 3


def test_a_batch_equals_its_images_one_by_one():
    images = np.random.RandomState(2).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    gates = np.random.RandomState(3).uniform(size=(3, 4, 4, 1))
    expected = np.stack([overlay(*pair) for pair in zip(images, gates, strict=True)])
    np.testing.assert_array_equal(overlay(images, gates), expected)
    np.testing.assert_array_equal(overlay(images, gates[..., 0]), expected)
    assert len(np.unique(expected.reshape(3, -1), axis=0)) == 3


def test_batches_of_lines_need_their_last_axis():
    """Without it, a channel gate and the gate of one image have the same shape."""
    images, lines = np.zeros((8, 16, 16, 3), np.uint8), np.full((8, 1, 64), 0.5)
    for gate in (lines, lines.reshape(8, 64, 1), np.full((8, 8, 1), 0.5)):
        with pytest.raises(ValueError, match=r"`gate` must .*\(8, h, w, 1\) where"):
            overlay(images, gate)
        assert overlay(images, gate[..., None]).shape == images.shape
    assert overlay(images, lines[..., :1]).shape == images.shape  # One value each.
    assert overlay(images[:, :1], lines).shape == (8, 1, 16, 3)  # Images of one line.


def test_limits_stretch_the_colors_and_clip():
    image = np.zeros((1, 4, 3), np.uint8)
    gate = np.array([[0.1, 0.4, 0.6, 0.9]])
    picture = overlay(image, gate, alpha=1, limits=(0.4, 0.6))
    ends = color_map([0.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(picture[0], ends, atol=1)


def test_the_older_name_of_the_color_map():
    assert colour_map is color_map


def test_the_colors_grow_lighter():
    colors = color_map(np.linspace(0, 1, 101))
    light = colors @ LIGHT
    assert (np.diff(light) > 0).all() and light[0] < 20 and light[-1] > 230
    assert colors.min() >= 0 and colors.max() <= 255
    np.testing.assert_array_equal(color_map([-1.0, 2.0]), colors[[0, -1]])


GRAY = np.zeros((4, 4, 3), np.uint8)
GATE = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    "image, gate, options, says",
    [
        (GRAY[..., :1], GATE, {}, r"`image` must have shape .* got \(4, 4, 1\)"),
        (GRAY[..., 0], GATE, {}, r"got \(4, 4\); .*np.repeat\(image\[..., None\], 3"),
        (GRAY[:0], GATE, {}, r"`image` must have shape .* got \(0, 4, 3\); pass one"),
        (np.zeros((2, 4, 4, 4)), GATE, {}, r"got \(2, 4, 4, 4\); .*image\[..., :3\]"),
        (np.zeros((3, 8, 8)), GATE, {}, r"got \(3, 8, 8\); .*np.moveaxis\(image, -3"),
        (GRAY.astype(int), GATE, {}, "`image` must be uint8, .* got dtype int64"),
        (GRAY - 0.5, GATE, {}, "`image` must be within .* from -0.5 to -0.5; undo"),
        (GRAY + 2.0, GATE, {}, "`image` must be within .* from 2.0 to 2.0"),
        (GRAY + np.nan, GATE, {}, "`image` must be within .* from nan to nan"),
        (GRAY, np.ones((1, 1, 16)), {}, r"`gate` must .*\(h, w\).* got \(1, 1, 16\)"),
        (GRAY, np.ones((2, 2, 2, 1)), {}, r"`gate` must .* got \(2, 2, 2, 1\)"),
        (GRAY, np.ones(4), {}, r"`gate` must .* got \(4,\)"),
        (GRAY, np.ones((0, 2)), {}, r"`gate` must .* got \(0, 2\)"),
        (GRAY[None], GATE, {}, r"`gate` must .*\(1, h, w\).* got \(2, 2\)"),
        (GRAY[None], np.ones((2, 2, 2)), {}, r"`gate` must .* got \(2, 2, 2\)"),
        (GRAY, GATE * np.nan, {}, "`gate` must be finite"),
        (GRAY, GATE, {"alpha": 1.5}, "`alpha` must be within .* got 1.5"),
        (GRAY, GATE, {"limits": (0.5, 0.5)}, r"`limits` must .* got \(0.5, 0.5\)"),
        (GRAY, GATE, {"limits": (0, np.inf)}, "`limits` must .*inf"),
    ],
)
def test_overlay_raises(image, gate, options, says):
    with pytest.raises(ValueError, match=says):
        overlay(image, gate, **options)
