"""A picture of predicted masks over their images, with the true masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trainer.finetuning.grid import Grid
from trainer.finetuning.images import to_lps

_SIDE_PIXELS, _CAPTION_PIXELS, _COLUMNS = 320, 18, 4
_TRUTH, _PREDICTION = (80, 220, 80), (255, 70, 70)


@dataclass(frozen=True, slots=True)
class Tile:
    """One slice of a case."""

    caption: str
    picture: Image.Image


def draw_tile(
    caption: str, image: sitk.Image, truth: sitk.Image, prediction: sitk.Image, grid: Grid
) -> Tile:
    """The axial slice with the largest true mask: truth outlined in green, prediction in red.

    The image is grey, in the range of values that the net sees (z-scores: in the HU window).
    """
    turned = to_lps(image)
    values = grid.to_unit(turned)  # (Z, Y, X), as the masks
    true, predicted = (sitk.GetArrayFromImage(to_lps(mask)) for mask in (truth, prediction))
    number = int(np.argmax((true > 0).sum(axis=(1, 2))))
    width_mm, height_mm = (
        side * step
        for side, step in zip(turned.GetSize()[:2], turned.GetSpacing()[:2], strict=True)
    )
    zoom = _SIDE_PIXELS / max(width_mm, height_mm)
    size = (max(1, round(width_mm * zoom)), max(1, round(height_mm * zoom)))
    grey = (values[number].astype(np.float32) * 255).astype(np.uint8)
    colours = np.array(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB"))
    for mask, colour in ((true[number], _TRUTH), (predicted[number], _PREDICTION)):
        colours[_outline(mask, size)] = colour
    return Tile(f"{caption}, slice {number + 1} of {len(values)}", Image.fromarray(colours))


def join_tiles(tiles: Sequence[Tile]) -> Image.Image:
    """Tiles in rows of four, each below its caption."""
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    step = (_SIDE_PIXELS + 4, _SIDE_PIXELS + _CAPTION_PIXELS)
    canvas = Image.new("RGB", (columns * step[0], rows * step[1]), "white")
    pen = ImageDraw.Draw(canvas)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        pen.text((column * step[0] + 4, row * step[1] + 3), tile.caption, fill="black")
        canvas.paste(tile.picture, (column * step[0], row * step[1] + _CAPTION_PIXELS))
    return canvas


def split_tiles(picture: Image.Image, count: int) -> list[Image.Image]:
    """The first `count` tiles of a picture by `join_tiles`, without their captions."""
    step = (_SIDE_PIXELS + 4, _SIDE_PIXELS + _CAPTION_PIXELS)
    columns, rows = picture.width // step[0], picture.height // step[1]
    tiles = []
    for index in range(min(count, columns * rows)):
        row, column = divmod(index, columns)
        left, top = column * step[0], row * step[1] + _CAPTION_PIXELS
        tiles.append(picture.crop((left, top, left + _SIDE_PIXELS, top + _SIDE_PIXELS)))
    return tiles


def _outline(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(height, width) pixels where one class borders on another."""
    large = np.array(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    edge = np.zeros(large.shape, bool)
    edge[:-1] |= large[:-1] != large[1:]
    edge[:, :-1] |= large[:, :-1] != large[:, 1:]
    return edge
