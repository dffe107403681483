"""Match places between two scans that are given as files: `semgen match`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.archive.folders import find_folders, resolve_archive
from pipeline.archive.headers import read_folder
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail, one_blas_thread
from pipeline.features import Features
from pipeline.frame import frame_box
from pipeline.match import Match, describe_scan, match_place
from store.atomic import replace_file
from store.errors import SemgenError, check_suffix
from store.format import THUMBNAIL_SHAPE
from store.images import Rejected

_MOST_MM = 1e6
_TILE_PIXELS, _GAP_PIXELS, _CROSS_PIXELS = 256, 4, 9
_WINDOW_HU = (-1000.0, 600.0)
_GOOD, _BAD = (255, 210, 0), (255, 60, 60)


class MatchError(SemgenError):
    """The scans cannot be matched as requested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceMatch:
    """A place in one scan, and what was found in the other."""

    name: str
    at_mm: tuple[float, float, float]
    """(z, y, x) in the first scan."""
    place_mm: tuple[float, float, float] | None
    """(z, y, x) in the second scan; None where there is no overlap."""
    score: float
    cycle_mm: float
    problem: str | None
    """Why the place cannot be trusted: "no overlap", or `Match.problem`."""

    def __str__(self) -> str:
        at = ", ".join(f"{v:.1f}" for v in self.at_mm)
        if self.place_mm is None:
            return f"{self.name}: ({at}) -> no overlap"
        place = ", ".join(f"{v:.1f}" for v in self.place_mm)
        return (
            f"{self.name}: ({at}) -> ({place}) mm, score {self.score:.2f}, there and back"
            f" {self.cycle_mm:.1f} mm: {self.problem or 'found'}"
        )


def match_files(
    here: str | Path,
    there: str | Path,
    places: Mapping[str, Sequence[float]],
    *,
    picture: str | Path | None = None,
) -> list[PlaceMatch]:
    """Find places of one scan in another.

    here, there
        A file, or a folder with one DICOM series.
    places
        (z, y, x) in mm in scan `here`, by name.
    picture
        PNG file to write: each place in both scans, axial and coronal.

    Raises MatchError where a path is not exactly one usable scan, or a place is outside the scan;
    SemgenError for another suffix of the picture.
    """
    if picture is not None:
        check_suffix(picture, ".png")
    one, other = read_scan(Path(here)), read_scan(Path(there))
    for name, place in places.items():
        edges = one.edges_mm
        if not ((edges[0] <= place) & (place <= edges[1])).all():
            raise MatchError(
                f"{name} {tuple(place)} is outside {here}: positions are 0 to"
                f" {', '.join(f'{v:.0f}' for v in edges[1])} mm (z, y, x)"
            )
    features, others = describe_volume(one), describe_volume(other)
    matches = [
        _as_result(name, place, match_place(place, features, others))
        for name, place in places.items()
    ]
    if picture is not None:
        with replace_file(Path(picture)) as partial:
            _draw(one, other, matches).save(partial, "PNG")
    return matches


def read_landmarks(file: Path) -> dict[str, Sequence[float]]:
    """Positions (z, y, x) in mm by name, from a JSON file; MatchError for other content."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MatchError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(map(_is_position, content.values())):
        raise MatchError(f'{file}: must be like {{"carina": [120, 80.5, 95]}}: z, y, x in mm')
    return content


def _is_position(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) and abs(v) < _MOST_MM for v in value)
    )


def read_scan(path: Path) -> Volume:
    """The one usable scan of a file or folder; MatchError where there is none, or several."""
    config = PrepareConfig()
    series = [
        found
        for folder in find_folders(resolve_archive(path))
        for found in read_folder(folder, config)
    ]
    usable = [one for one in series if one.reason is None]
    if len(usable) != 1:
        reasons = ", ".join(sorted({str(one.reason) for one in series if one.reason}))
        raise MatchError(
            f"{path}: must be one scan, but has {len(usable)} usable series"
            f"{f' (rejected: {reasons})' if reasons else ''}; give one file, or the folder of one"
            " DICOM series"
        )
    try:
        return read_volume(usable[0], config)
    except Rejected as rejected:
        raise MatchError(f"{path}: cannot be used: {rejected}") from rejected


def describe_volume(volume: Volume) -> Features:
    """Features of a scan, from its frame box and thumbnail as the survey makes them."""
    config = PrepareConfig()
    box = frame_box(volume, "body")
    with one_blas_thread():
        thumbnail = make_thumbnail(volume, box, THUMBNAIL_SHAPE, config)
    return describe_scan(
        thumbnail, box_mm=box, edges_mm=volume.edges_mm, window_hu=config.window_hu
    )


def _as_result(name: str, place: Sequence[float], match: Match | None) -> PlaceMatch:
    z, y, x = (float(v) for v in place)
    if match is None:
        return PlaceMatch(
            name=name,
            at_mm=(z, y, x),
            place_mm=None,
            score=float("nan"),
            cycle_mm=float("nan"),
            problem="no overlap",
        )
    found = (float(match.place_mm[0]), float(match.place_mm[1]), float(match.place_mm[2]))
    return PlaceMatch(
        name=name,
        at_mm=(z, y, x),
        place_mm=found,
        score=match.score,
        cycle_mm=match.cycle_mm,
        problem=match.problem(),
    )


# The picture


def _draw(here: Volume, there: Volume, matches: Sequence[PlaceMatch]) -> Image.Image:
    """One row for each place: axial and coronal of the first scan, then of the second."""
    rows = []
    for match in matches:
        tiles = _tiles(here, match.at_mm, _GOOD)
        if match.place_mm is not None:
            tiles += _tiles(there, match.place_mm, _BAD if match.problem else _GOOD)
        rows.append(tiles)
    width = max(sum(tile.width + _GAP_PIXELS for tile in tiles) for tiles in rows)
    canvas = Image.new("RGB", (width, len(rows) * (_TILE_PIXELS + _GAP_PIXELS)), "white")
    for number, tiles in enumerate(rows):
        left = 0
        for tile in tiles:
            canvas.paste(tile, (left, number * (_TILE_PIXELS + _GAP_PIXELS)))
            left += tile.width + _GAP_PIXELS
    return canvas


def _tiles(
    volume: Volume, place_mm: Sequence[float], colour: tuple[int, int, int]
) -> list[Image.Image]:
    """Axial and coronal slice through a place; the patient's left is on the right, the head up."""
    index = [round(p / s) for p, s in zip(place_mm, volume.spacing_mm, strict=True)]
    z, y, x = (min(max(i, 0), n - 1) for i, n in zip(index, volume.hu.shape, strict=True))
    depth = len(volume.hu)
    axial = _tile(volume.hu[z], volume.spacing_mm[1:], (y, x), colour)
    coronal_mm = (volume.spacing_mm[0], volume.spacing_mm[2])
    coronal = _tile(volume.hu[::-1, y], coronal_mm, (depth - 1 - z, x), colour)
    return [axial, coronal]


def _tile(
    hu: NDArray[np.int16],
    spacing_mm: Sequence[float],
    at: tuple[int, int],
    colour: tuple[int, int, int],
) -> Image.Image:
    low, high = _WINDOW_HU
    grey = np.clip((hu.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    height_mm, width_mm = (n * s for n, s in zip(hu.shape, spacing_mm, strict=True))
    width = max(1, round(_TILE_PIXELS * width_mm / height_mm))
    tile = Image.fromarray(grey).resize((width, _TILE_PIXELS)).convert("RGB")
    row, column = (
        (i + 0.5) * size / n for i, size, n in zip(at, (_TILE_PIXELS, width), hu.shape, strict=True)
    )
    pen, reach = ImageDraw.Draw(tile), _CROSS_PIXELS
    pen.line((column - reach, row, column + reach, row), fill=colour)
    pen.line((column, row - reach, column, row + reach), fill=colour)
    return tile
