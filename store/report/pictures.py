"""Crops as small pictures whose grey levels can still be windowed in the browser."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVELS = ((-1000, 0), (-200, 80), (300, 208), (1500, 255))
"""(HU, grey level), linear between them. Soft tissue has most levels: 4 HU each."""
TILE = 64
"""Pixels along each side of a tile."""
_QUALITY = 70

Grey = NDArray[np.uint8]


def to_grey(hu: NDArray[np.floating | np.integer]) -> Grey:
    """HU -> grey levels; the page maps them back."""
    marks_hu, marks = zip(*LEVELS, strict=True)
    levels = np.interp(hu, marks_hu, marks)
    return np.asarray(np.rint(levels), np.uint8)


def slices(crop: NDArray[np.floating | np.integer], counts: Mapping[str, int]) -> list[Grey]:
    """Slices of a crop of HU, evenly spaced: `counts` of each plane (axial, coronal, sagittal).

    Axial slices run from feet to head, coronal ones from front to back, sagittal ones from right to
    left. Radiological convention: the patient's left is on the right, the front is up, or left in
    the sagittal plane, the head is up.
    """
    levels = to_grey(crop)
    across = {
        "axial": levels,
        "coronal": levels[::-1].transpose(1, 0, 2),
        "sagittal": levels[::-1].transpose(2, 0, 1),
    }
    found: list[Grey] = []
    for plane, count in counts.items():
        pictures = across[plane]
        found += [pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)]
    return found


def projections(thumbnail: Grey) -> tuple[Grey, Grey]:
    """Front and side view of a scan: largest values along y and x, head up."""
    return thumbnail.max(axis=1)[::-1], thumbnail.max(axis=2)[::-1]


def fit(picture: Grey, side: int) -> Grey:
    """Stretched to a square tile; the page undoes it."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))


def encode_tiles(tiles: Sequence[Grey], columns: int) -> bytes:
    """Tiles of one size, row by row, as one WebP."""
    height, width = tiles[0].shape
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * height, columns * width), np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        area = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
        sheet[area] = tile
    content = io.BytesIO()
    Image.fromarray(sheet).convert("RGB").save(content, "WEBP", quality=_QUALITY, method=4)
    return content.getvalue()
