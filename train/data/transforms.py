"""Crops of images: the boxes of training and evaluation, and their pixels.

Every image becomes RGB: transparency is dropped, of 16 bits the upper eight stay. The
orientation in EXIF is not applied, as in torchvision's ImageFolder, so that results
compare.
"""

import math

import numpy as np
from PIL import Image

# Szegedy et al., Going deeper with convolutions, 2014, arXiv 1409.4842, section 6, as
# every later ImageNet recipe has it: this range of areas and of width / height.
AREAS = (0.08, 1.0)
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10
# The usual evaluation of ResNets, that of torchvision's first published weights: 224
# pixels from the center of an image whose short side was resized to 256.
SHORT_SIDE = 256 / 224
# A JPEG may be decoded at 1/2, 1/4 or 1/8 while that leaves this many pixels for each
# one that is wanted, so that the filter still decides what the result looks like.
DRAFT = 2


def crop_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws ``(left, top, right, bottom)`` of a random-resized crop, in pixels.

    The area is uniform in 8 % to 100 % of the image, the aspect log-uniform in 3/4 to
    4/3, the position uniform. A box that does not fit is drawn again; after ten draws
    it is the largest centered box whose aspect is legal, or as near as pixels allow.
    """
    log_aspects = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREAS)
        aspect = math.exp(rng.uniform(*log_aspects))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = rng.integers((0, 0), (width - w, height - h), endpoint=True)
            return int(left), int(top), int(left) + w, int(top) + h
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_box(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """Returns ``(left, top, right, bottom)`` of the evaluation's crop, in pixels.

    It is what a centered crop of ``size`` shows once the short side has been resized to
    ``round(size * 256 / 224)`` and the long side in proportion, rounded down.
    """
    short = round(size * SHORT_SIDE)
    w = short * width // min(width, height)
    h = short * height // min(width, height)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return (
        left * width / w,
        top * height / h,
        (left + size) * width / w,
        (top + size) * height / h,
    )


def cut(
    file: Image.Image, box: tuple[float, float, float, float], size: int
) -> np.ndarray:
    """The part ``box`` of an opened file as ``(size, size, 3)`` uint8.

    The filter is Pillow's bilinear one, a triangle as wide as the pixels of the result.
    It sees what lies beyond the box, as if the whole image were resized and then cut.
    """
    width, height = file.size
    left, top, right, bottom = box
    spare = min(right - left, bottom - top) / size / DRAFT
    if spare > 1:
        file.draft(None, (int(width / spare), int(height / spare)))
    x, y = file.size[0] / width, file.size[1] / height
    # Pillow refuses a box that rounding pushes over the edge.
    edges = min(right * x, file.size[0]), min(bottom * y, file.size[1])
    scaled = (left * x, top * y, *edges)
    resized = _rgb(file).resize((size, size), Image.Resampling.BILINEAR, scaled)
    return np.asarray(resized)


def _rgb(file: Image.Image) -> Image.Image:
    if file.mode.startswith("I"):
        # Gray of 16 bits: Pillow would clip it at 255, which makes it white.
        return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
    if file.mode == "P":
        # Straight to RGB, Pillow would warn of a palette's transparency.
        return file.convert("RGBA").convert("RGB")
    return file.convert("RGB")
