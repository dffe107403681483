"""A small picture in a terminal: two pixels per character, in the 24 grey levels of terminals."""

from __future__ import annotations

import numpy as np
from PIL import Image

from store.reader import PatchStore
from store.report.pictures import LEVELS, TILE, Grey
from store.report.sheets import card_tiles, mean_crop

_COLUMNS, _GAP = 30, "  "
_DARKEST, _GREYS = 232, 24
_CAPTIONS = ("mean", "reference", "from the front", "from the left")


def draw_class(store: PatchStore, label: int) -> str:
    """Mean, reference, and front and side view of the reference's scan, side by side."""
    pictures = [_draw(tile, windowed=number < 2) for number, tile in
                enumerate(card_tiles(store, label, mean_crop(store, label)))]  # fmt: skip
    captions = _GAP.join(caption.ljust(_COLUMNS) for caption in _CAPTIONS)
    return "\n".join(
        [captions.rstrip(), *(_GAP.join(lines) for lines in zip(*pictures, strict=True))]
    )


def _draw(tile: Grey, *, windowed: bool) -> list[str]:
    side = (_COLUMNS, _COLUMNS // 2 * 2)
    pixels = np.asarray(Image.fromarray(tile).resize(side, Image.Resampling.BOX), np.float64)
    if windowed:  # grey levels of the page -> HU -> window from -300 to 400 HU
        hu, levels = zip(*LEVELS, strict=True)
        pixels = (np.interp(pixels, levels, hu) + 300) / 700 * 255
    assert tile.shape == (TILE, TILE)
    greys = (_DARKEST + np.clip(pixels / 256 * _GREYS, 0, _GREYS - 1)).astype(int)
    return [
        "".join(f"\x1b[38;5;{up};48;5;{down}m▀" for up, down in zip(upper, lower, strict=True))
        + "\x1b[0m"
        for upper, lower in zip(greys[::2], greys[1::2], strict=True)
    ]
