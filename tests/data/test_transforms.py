import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests.data.streams import SIZE, folder_of, joined, noise, passes, take
from train.data import folders, transforms


def test_the_boxes_of_crops():
    """Against rejection sampling on a square: a box is valid if both sides fit."""
    side, count = 1000, 4000
    rng = np.random.default_rng(1)
    boxes = np.array([transforms.crop_box(side, side, rng) for _ in range(count)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert (boxes >= 0).all() and (boxes <= side).all()
    areas, aspects = w * h / side**2, w / h
    assert 0.079 < areas.min() < 0.085 and 0.95 < areas.max() <= 1
    assert 0.747 < aspects.min() < 0.755 and 1.325 < aspects.max() < 1.338
    # Rejection sampling.
    area = rng.uniform(0.08, 1, 4 * count)
    aspect = (16 / 9) ** rng.uniform(-0.5, 0.5, 4 * count)
    fits = area <= np.minimum(aspect, 1 / aspect)
    assert stats.ks_2samp(areas, area[fits]).pvalue > 0.01
    assert stats.ks_2samp(aspects, aspect[fits]).pvalue > 0.01
    # The position is uniform, both ends included.
    for start, free in ((left, side - w), (top, side - h)):
        room = free > 20
        places = start[room] / free[room]
        assert stats.kstest(places, "uniform").pvalue > 0.01
        assert (start == free).any() and (start == 0).any()


@pytest.mark.parametrize(
    "size, box",
    [
        ((10, 1000), (0, 493, 10, 506)),  # 10 / 0.75 = 13.3
        ((1000, 30), (480, 0, 520, 30)),
        ((1, 500), (0, 249, 1, 250)),
        ((500, 1), (249, 0, 250, 1)),
    ],
)
def test_where_no_crop_fits_it_is_the_center(size, box):
    rng = np.random.default_rng(0)
    assert {transforms.crop_box(*size, rng) for _ in range(20)} == {box}


def test_one_pixel():
    assert transforms.crop_box(1, 1, np.random.default_rng(0)) == (0, 0, 1, 1)


def triangle(source, start, stop, size):
    """``(size, source)``: the weights of antialiased linear interpolation, float64."""
    scale = (stop - start) / size
    centers = start + (np.arange(size) + 0.5) * scale
    offsets = np.arange(source) + 0.5 - centers[:, None]
    weights = np.maximum(0, 1 - np.abs(offsets) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def resize(pixels, box, shape):
    left, top, right, bottom = box
    rows = triangle(pixels.shape[0], top, bottom, shape[0])
    columns = triangle(pixels.shape[1], left, right, shape[1])
    mixed = np.tensordot(rows, pixels.astype(np.float64), 1)
    return np.tensordot(columns, mixed, (1, 1)).swapaxes(0, 1)


def test_the_training_transform(tmp_path, monkeypatch):
    pixels, box = noise(37, 29), (5, 2, 33, 26)
    found = folder_of(tmp_path, *[Image.fromarray(pixels)] * 8)
    monkeypatch.setattr(folders, "crop_box", lambda width, height, rng: box)
    expected = resize(pixels, box, (SIZE, SIZE))
    mirrored = 0
    for image in take(found, 1)[0][0]["image"]:
        plain, mirror = (np.abs(image - e).max() for e in (expected, expected[:, ::-1]))
        assert min(plain, mirror) <= 1 < max(plain, mirror)
        mirrored += mirror <= 1
    assert 0 < mirrored < 8


def test_each_image_is_flipped_independently(tmp_path):
    ramp = np.zeros((12, 12, 3), np.uint8) + np.arange(0, 240, 20, np.uint8)[:, None]
    found = folder_of(tmp_path, *[Image.fromarray(ramp)] * 40)
    batches, _ = take(found, 30, batch_size=40, image_size=4)
    images = np.stack([batch["image"] for batch in batches]).astype(int)
    mirrored = images[..., 0, 0, 0] > images[..., 0, -1, 0]
    # Four standard deviations of 1,200 flips are 69; of 40 flips, 13.
    assert abs(mirrored.sum() - 600) < 69
    assert (np.abs(mirrored.sum(axis=1) - 20) < 13).all()
    # The same positions are not mirrored again in the next epoch.
    assert len({tuple(row) for row in mirrored}) == 30


@pytest.mark.parametrize("width, height", [(37, 29), (24, 40), (16, 16), (7, 100)])
def test_the_evaluation_transform(tmp_path, width, height):
    """Resize the whole image, then crop the center."""
    pixels = noise(width, height)
    found = folder_of(tmp_path, Image.fromarray(pixels))
    short = 18  # 16 * 256 / 224 = 18.29
    scale = short / min(width, height)
    shape = int(height * scale + 1e-9), int(width * scale + 1e-9)
    whole = resize(pixels, (0, 0, width, height), shape)
    top, left = (round((side - SIZE) / 2) for side in shape)
    expected = whole[top : top + SIZE, left : left + SIZE]
    (image,) = passes(found, batch_size=1)[0]["image"]
    assert np.abs(image - expected).max() <= 1


def test_thin_images(tmp_path):
    tall, wide = noise(1, 5000), noise(5000, 1)
    found = folder_of(tmp_path, *map(Image.fromarray, (tall, wide, tall[:1])))
    images = passes(found, batch_size=3)[0]["image"]
    # Even length: the center lies between two pixels, and only they contribute.
    pairs = tall[2499:2501, 0], wide[0, 2499:2501]
    for image, (low, high) in zip(images[:2], pairs, strict=True):
        low, high = np.minimum(low, high), np.maximum(low, high)
        assert (image >= low).all() and (image <= high).all()
    assert (images[2] == tall[0]).all()
    assert take(found, 2, batch_size=3)[0][0]["image"].shape == (3, SIZE, SIZE, 3)


def test_large_jpegs_are_decoded_at_a_fraction(tmp_path, monkeypatch):
    y, x = np.mgrid[:480, :640]
    pixels = np.stack([x / 2.6, y / 2, (x + y) / 4.6], axis=-1).astype(np.uint8)
    for part in "train", "val":
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "1.jpg", quality=95)
    found = folders.scan(tmp_path)
    sizes = []
    original = Image.Image.resize

    this = threading.get_ident()

    def recorded(self, *args, **kwargs):
        if threading.get_ident() == this:  # Not in prefetching of an earlier test.
            sizes.append(self.size)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    (image,) = passes(found, batch_size=1, image_size=56, num_threads=0)[0]["image"]
    # 64 of 480 pixels: a quarter leaves 1.9 for each, too few.
    assert sizes.pop() == (320, 240)
    scale = 480 / 64
    left = 14 * 640 / 85  # 64 * 640 / 480 = 85.3, and (85 - 56) / 2 rounds to 14.
    box = (left, 4 * scale, left + 56 * 640 / 85, 60 * scale)
    assert np.abs(image - resize(pixels, box, (56, 56))).max() < 3
    box = (101, 30, 520, 433)
    monkeypatch.setattr(folders, "crop_box", lambda width, height, rng: box)
    batches, _ = take(found, 1, batch_size=1, image_size=56, num_threads=0)
    assert sizes.pop() == (320, 240)
    image, expected = batches[0]["image"][0], resize(pixels, box, (56, 56))
    error = min(np.abs(image - e).max() for e in (expected, expected[:, ::-1]))
    assert error < 3
    passes(found, batch_size=1, image_size=200, num_threads=0)
    assert sizes.pop() == (640, 480)


def saved(root, **pictures):
    """The evaluation's view of each picture, saved under its suffix and options."""
    for part in "train", "val":
        (root / part / "a").mkdir(parents=True)
        for name, (picture, suffix, options) in pictures.items():
            picture.save(root / part / "a" / (name + suffix), **options)
    found = folders.scan(root)
    assert [Path(n).stem for n in found.test.names] == sorted(pictures)
    images = joined(passes(found, batch_size=4))["image"]
    return dict(zip(sorted(pictures), images, strict=False))


def test_every_mode_becomes_rgb(tmp_path):
    color, gray = (200, 40, 120), 77
    flat = Image.new("RGB", (20, 20), color)
    deep = Image.fromarray(np.full((20, 20), gray * 256 + 200, np.uint16))
    images = saved(
        tmp_path,
        rgb=(flat, ".png", {}),
        rgba=(Image.new("RGBA", (20, 20), (*color, 5)), ".png", {}),
        cmyk=(Image.new("CMYK", (20, 20), (55, 215, 135, 0)), ".jpg", {}),
        palette=(flat.quantize(4), ".png", {}),
        palette_one=(flat.quantize(4), ".png", {"transparency": 0}),
        palette_all=(flat.quantize(4), ".png", {"transparency": b"\x05\x06"}),
        l=(Image.new("L", (20, 20), gray), ".png", {}),
        l_jpeg=(Image.new("L", (20, 20), gray), ".jpg", {}),
        la=(Image.new("LA", (20, 20), (gray, 9)), ".png", {}),
        l16=(deep, ".png", {}),
        one=(Image.new("1", (20, 20), 1), ".png", {}),
    )
    expected = dict.fromkeys(images, color)
    expected |= dict.fromkeys(("l", "l_jpeg", "la", "l16"), (gray,) * 3)
    expected |= {"one": (255,) * 3}
    for name, image in images.items():
        error = np.abs(image.astype(int) - expected[name]).max()
        assert error <= (3 if name == "cmyk" else 0), name


def test_the_orientation_in_exif_is_not_applied(tmp_path):
    ramp = Image.fromarray(np.arange(200, dtype=np.uint8).repeat(20).reshape(200, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by a quarter.
    images = saved(
        tmp_path, turned=(ramp, ".jpg", {"exif": exif}), straight=(ramp, ".jpg", {})
    )
    np.testing.assert_array_equal(images["turned"], images["straight"])
