"""Pictures of the same crops over a run, in RUN/samples: a few of them, spread over the time.

Which ones are kept depends only on the numbers of the validations so far, so a resumed run ends
with the same files as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from store.atomic import replace_file

SERIES = "samples"
MOST = 16
"""About how many pictures are kept, besides the first and the last one."""
_CROPS, _SIDE_PIXELS = 4, 96
"""Crops in a picture, and the longest side of one: with both, a series needs at most 3 MB."""
_COLUMNS, _ROWS = "columns", "rows"


class Sample(NamedTuple):
    """A picture of a series."""

    number: int
    """Number of its validation."""
    step: int
    file: Path


def list_samples(run: Path) -> list[Sample]:
    """The pictures of a run, in order of steps."""
    found = []
    for file in sorted((run / SERIES).glob("[0-9]*-[0-9]*.png")):
        number, _, step = file.stem.partition("-")
        found.append(Sample(int(number), int(step), file))
    return sorted(found, key=lambda sample: sample.step)


def add_sample(run: Path, number: int, step: int, columns: dict[str, Tensor]) -> None:
    """Add the picture of a validation, and delete those that are no longer kept.

    number
        Of the validation, such as its epoch; never smaller than in an earlier call.
    columns
        Crops (n, 1, Z, Y, X) in [0, 1] by caption; up to four of them are drawn.
    """
    (run / SERIES).mkdir(exist_ok=True)
    note = PngImagePlugin.PngInfo()
    note.add_text(_COLUMNS, json.dumps(list(columns)))
    note.add_text(_ROWS, str(len(_choose(next(iter(columns.values()))))))
    with replace_file(run / SERIES / f"{number:06d}-{step:09d}.png") as partial:
        _draw(columns).save(partial, pnginfo=note)
    samples = list_samples(run)
    for sample in samples[1:-1]:
        if not is_kept(sample.number, last=number):
            sample.file.unlink()


def drop_samples_after(run: Path, step: int) -> None:
    """Delete the pictures that an interrupted run made after its last checkpoint."""
    for sample in list_samples(run):
        if sample.step > step:
            sample.file.unlink()


def is_kept(number: int, *, last: int) -> bool:
    """Whether a picture is still kept after the one with the number `last`.

    >>> [n for n in range(1, 41) if is_kept(n, last=40)]
    [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    """
    stride = 1
    while last // stride > MOST:
        stride *= 2
    return number % stride == 0


def read_sample(file: Path) -> tuple[list[str], int, Image.Image]:
    """The captions of a picture's columns, its number of rows, and the picture."""
    with Image.open(file) as picture:
        picture.load()
        captions = json.loads(picture.info[_COLUMNS])
        rows = int(picture.info[_ROWS])
    return captions, rows, picture


def _draw(columns: dict[str, Tensor]) -> Image.Image:
    """Middle z slices: a column for each entry, a row for each crop, without gaps."""
    tiles = [list(_slices(crops)) for crops in columns.values()]
    return Image.fromarray(np.block([list(row) for row in zip(*tiles, strict=True)]))


def _choose(crops: Tensor) -> Tensor:
    """Up to four of the crops, evenly."""
    return crops[:: max(1, -(-len(crops) // _CROPS))]


def _slices(crops: Tensor) -> Iterator[np.ndarray]:
    """The middle z slices of up to four of (n, 1, Z, Y, X) crops, as grey levels."""
    chosen = _choose(crops)
    middle = chosen[:, 0, crops.shape[2] // 2].float().clamp(0, 1).cpu()  # (n, Y, X)
    for values in (middle * 255).round().to(torch.uint8).numpy():
        tile = Image.fromarray(values)
        tile.thumbnail((_SIDE_PIXELS, _SIDE_PIXELS), Image.Resampling.BILINEAR)
        yield np.asarray(tile)
