"""Image transforms: crop boxes for training and evaluation, and their pixels.

All images become RGB: transparency is dropped, 16-bit gray keeps its upper 8 bits. The
EXIF orientation is ignored, as in torchvision's ImageFolder, so that results are
comparable.
"""

import math

import numpy as np
from PIL import Image

# Ranges of area and of width / height: Szegedy et al., Going deeper with convolutions,
# 2014, arXiv 1409.4842, section 6; standard in ImageNet recipes since.
AREAS = (0.08, 1.0)
ASPECTS = (3 / 4, 4 / 3)
MAX_DRAWS = 10
# The standard evaluation of ResNets, as for torchvision's first published weights: the
# center 224 pixels of an image whose short side is resized to 256.
SHORT_SIDE = 256 / 224
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many pixels
# for each output pixel, so that the resize filter still determines the result.
DRAFT_PIXELS = 2


def crop_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws ``(left, top, right, bottom)`` of a random-resized crop, in pixels.

    The area is uniform in 8 % to 100 % of the image, the aspect ratio log-uniform in
    3/4 to 4/3, the position uniform. A box that does not fit is drawn again; after ten
    draws, the box is the largest centered one with an aspect ratio in that range, up to
    rounding.
    """
    log_aspects = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    for _ in range(MAX_DRAWS):
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

    It equals a center crop of ``size`` after resizing the short side to ``round(size *
    256 / 224)`` and the long side in proportion, rounded down.
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


def crop(
    file: Image.Image, box: tuple[float, float, float, float], size: int
) -> np.ndarray:
    """The region ``box`` of an open image file as ``(size, size, 3)`` uint8.

    The filter is Pillow's antialiased bilinear one. It includes pixels around the box,
    as if the whole image were resized and then cropped.
    """
    width, height = file.size
    left, top, right, bottom = box
    reduction = min(right - left, bottom - top) / size / DRAFT_PIXELS
    if reduction > 1:
        file.draft(None, (int(width / reduction), int(height / reduction)))
    x, y = file.size[0] / width, file.size[1] / height
    # Pillow rejects a box that rounding moves past the edge.
    edges = min(right * x, file.size[0]), min(bottom * y, file.size[1])
    scaled = (left * x, top * y, *edges)
    resized = _rgb(file).resize((size, size), Image.Resampling.BILINEAR, scaled)
    return np.asarray(resized)


def _rgb(file: Image.Image) -> Image.Image:
    if file.mode.startswith("I"):
        # 16-bit gray, which Pillow would clip to white.
        return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
    if file.mode == "P":
        # Directly to RGB, Pillow would warn about the palette's transparency.
        return file.convert("RGBA").convert("RGB")
    return file.convert("RGB")
