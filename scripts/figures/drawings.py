"""Pictures of the steps of the method, from the crops and thumbnails of a store."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.archive.lookup import read_series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import resample
from store import PatchStore
from trainer.transforms.draws import Draws
from trainer.transforms.elastic import deform
from trainer.transforms.intensity import nonlinear_intensity
from trainer.transforms.mask import BlockGrid, hide
from trainer.transforms.paint import inpaint, outpaint
from trainer.transforms.rotate import rotate
from trainer.transforms.shuffle import shuffle_pixels
from trainer.transforms.swap import swap_patches

TILE, GAP, LINE, COLUMNS = 168, 8, 26, 6
BACKGROUND, TEXT, MATCHED, SAME = "#15181c", "#f0f2f5", "#ffb000", "#6bb7ff"
FONT = ImageFont.load_default(16)
WINDOW_HU = (-800, 500)  # lung and soft tissue

Pixels = NDArray[np.uint8]


def grey(values: NDArray[np.floating | np.integer], low: float, high: float) -> Pixels:
    """Values from low to high as grey levels."""
    return np.asarray(np.clip((values - low) / (high - low), 0, 1) * 255, np.uint8)


def tile(picture: Pixels, height_over_width: float = 1.0) -> Image.Image:
    """A picture in true proportions, as large as fits into a square tile."""
    width, height = TILE, round(TILE * height_over_width)
    if height > TILE:
        width, height = round(TILE / height_over_width), TILE
    return Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


def sheet(rows: Sequence[Sequence[tuple[Image.Image | None, str]]]) -> Image.Image:
    """Tiles in rows, each with a line of text below; None leaves a place empty."""
    width = max(map(len, rows)) * (TILE + GAP) + GAP
    heights = [
        max(t.height for t, _ in row if t) + (LINE if any(text for _, text in row) else 0) + GAP
        for row in rows
    ]
    canvas = Image.new("RGB", (width, sum(heights) + GAP), BACKGROUND)
    pen, top = ImageDraw.Draw(canvas), GAP
    for row, height in zip(rows, heights, strict=True):
        tallest = max(t.height for t, _ in row if t)
        for column, (picture, text) in enumerate(row):
            left = GAP + column * (TILE + GAP)
            if picture:
                canvas.paste(picture, (left + (TILE - picture.width) // 2, top))
            middle = (left + TILE / 2, top + tallest + LINE / 2)
            pen.text(middle, text, TEXT, FONT, anchor="mm")
        top += height
    return canvas


# Neighbours --------------------------------------------------------------------------------------


def radiograph(store: PatchStore, scan: int) -> Image.Image:
    """A scan from the front: the mean of its thumbnail along y, head up, in true proportions."""
    front = store.thumbnails.read([scan])[0].astype(np.float32).mean(axis=1)[::-1]
    z_mm, _, x_mm = np.diff(store.scans.frame_mm[scan], axis=0)[0]
    return tile(grey(front, *np.percentile(front, (2, 99.5))), z_mm / x_mm)


def draw_neighbours(store: PatchStore, label: int | None) -> Image.Image:
    """A scan and the nearest ones by embedding; below, the most distant ones."""
    scan = int(store.classes.reference[choose_class(store) if label is None else label])
    embedding = store.scans.embedding
    distance = np.linalg.norm(embedding - embedding[scan], axis=1)
    order = np.argsort(distance)
    shown = [*order[:COLUMNS], *order[-COLUMNS:]]
    tiles = [(radiograph(store, int(row)), f"distance {distance[row]:.2f}") for row in shown]
    tiles[0] = (tiles[0][0], "a scan")
    return sheet([tiles[:COLUMNS], tiles[COLUMNS:]])


# Placing -----------------------------------------------------------------------------------------


def choose_class(store: PatchStore) -> int:
    """Of the classes with enough members, the one whose weakest shown member matches best."""

    def interest(label: int) -> tuple[int, float]:
        members = store.members(label)
        return min(len(members), COLUMNS - 1), float(members.scores[:COLUMNS].min())

    return max(range(store.num_classes), key=interest)


def frame_place(store: PatchStore, label: int, scan: int) -> NDArray[np.float64]:
    """Where the class's coordinate lies in a scan's frame box: (z, y, x) in mm."""
    low, high = store.scans.frame_mm[scan]
    return np.asarray(low + store.classes.centre[label] * (high - low))


def draw_placing(store: PatchStore, label: int | None) -> Image.Image:
    """A class in several scans: from the front, by the frame's coordinate, and by matching."""
    label = choose_class(store) if label is None else label
    members, shape = store.members(label), store.crop_shape
    fronts, same, matched = [], [], []
    chosen = range(min(len(members), COLUMNS))
    series = read_series(store.path, [int(members.scans[member]) for member in chosen])
    for member, one in zip(chosen, series, strict=True):
        scan, row = int(members.scans[member]), int(members.rows[member])
        volume = read_volume(one, PrepareConfig())
        extent = store.train.extent_mm[row]
        places = {MATCHED: members.places[member], SAME: frame_place(store, label, scan)}
        text = "reference" if member == 0 else f"scan {member}"
        fronts.append((front_view(store, scan, places, extent), text))
        for row_of_tiles, place in ((same, places[SAME]), (matched, places[MATCHED])):
            crop = resample(volume, origin_mm=place - extent / 2, extent_mm=extent, shape=shape)
            row_of_tiles.append((tile(grey(crop[shape[0] // 2], *WINDOW_HU)), ""))
    same[0] = (same[0][0], "same coordinate")
    matched[0] = (matched[0][0], "matched")
    for tiles, colour in ((same, SAME), (matched, MATCHED)):
        for picture, _ in tiles:
            edge = (0, 0, picture.width - 1, picture.height - 1)
            ImageDraw.Draw(picture).rectangle(edge, outline=colour, width=2)
    return sheet([fronts, same, matched])


def front_view(
    store: PatchStore,
    scan: int,
    places_mm: dict[str, NDArray[np.float64]],
    extent_mm: NDArray[np.float64],
) -> Image.Image:
    """A scan from the front, with the base crop at each place in its colour."""
    picture = radiograph(store, scan)
    low, high = store.scans.frame_mm[scan]
    size = np.array([picture.height, 0, picture.width])
    for colour, place in places_mm.items():
        first, last = (
            (corner - low) / (high - low) * size
            for corner in (place - extent_mm / 2, place + extent_mm / 2)
        )
        box = (first[2], picture.height - last[0], last[2], picture.height - first[0])
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=3)
    return picture


# Perturbations -----------------------------------------------------------------------------------


def draw_perturbations(store: PatchStore, label: int | None) -> Image.Image:
    """One crop, and what pretext tasks make of it."""
    label = choose_class(store) if label is None else label
    crop = store.train.read([store.members(label).rows[0]])
    low, high = store.window_hu
    crops = torch.from_numpy((crop[:, None].astype(np.float32) - low) / (high - low))

    def change(text: str, seed: int, function: Callable[[Tensor, Draws], Tensor]) -> tuple:
        draws = Draws.keyed(seed, "figure", rows=[0])
        middle = function(crops.clone(), draws)[0, 0, crop.shape[1] // 2].numpy()
        return tile(grey(middle, *((hu - low) / (high - low) for hu in WINDOW_HU))), text

    def masked(crops: Tensor, draws: Draws) -> Tensor:
        return hide(crops, BlockGrid(store.crop_shape, ratio=0.75).draw(draws))

    return sheet(
        [
            [
                change("original", 0, lambda crops, _: crops),
                change("deformed", 1, deform),
                change("shuffled in blocks", 2, partial(shuffle_pixels, num_blocks=10_000)),
                change("other intensities", 3, nonlinear_intensity),
                change("inpainting", 4, inpaint),
                change("outpainting", 5, outpaint),
            ],
            [
                change("mae", 6, masked),
                change("shuffling", 7, swap_patches),
                change("rotation", 9, lambda crops, draws: rotate(crops, draws)[0]),
            ],
        ]
    )
