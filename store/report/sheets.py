"""Pictures of the page of classes: sheets of tiles, and volumes that the page slices itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from store.format import SPLITS
from store.reader import PatchStore
from store.report.pictures import TILE, Grey, encode_tiles, fit, projections, slices, to_grey

CARD_TILES: Final = 4
"""Pictures of a card: mean, reference, front and side view of its scan."""
MAPPED_SCANS: Final = 1000
"""How many scans have a picture."""
SCAN_COLUMNS: Final = 16
_SLICES: Final = ((16, 8, 8), (9, 5, 5), (5, 3, 3))
"""Axial, coronal and sagittal slices of a member in a file: the maximum of one file."""
_TILES: Final = 44_000
"""Tiles of members in a file: they take about 15 MB."""
_FEWEST: Final = 20
"""Members of a class that a file shows at least."""
CHUNK: Final = 24
"""Members whose volumes a server sends at once."""
_LONGEST: Final = 64
"""Voxels along an axis of such a volume."""


def count_slices(store: PatchStore) -> dict[str, int]:
    """Slices of each member in a file, by plane: many in a small store, few in a large one."""
    tables = (store.classes.neighbour, store.classes.validation_neighbour)
    members = sum(int((rows >= 0).sum()) for rows in tables)
    counts = next((c for c in _SLICES if members * sum(c) <= _TILES), _SLICES[-1])
    return dict(zip(("axial", "coronal", "sagittal"), counts, strict=True))


def choose_members(store: PatchStore, label: int, outliers: Sequence[int]) -> list[int]:
    """The members that a file shows, by number: all, or the reference, outliers and a sample.

    Members are numbered in the order of `store.members`: training, then validation. The sample is
    spread evenly from the best to the weakest match (by distance where members were not matched).
    """
    by_split = [store.members(label, split) for split in SPLITS]
    scans = np.concatenate([m.scans for m in by_split])
    most = max(_FEWEST, _TILES // (store.num_classes * sum(_SLICES[-1])))
    if len(scans) <= most:
        return list(range(len(scans)))
    key = np.concatenate([-m.scores if store.is_matched else m.distances for m in by_split])
    order = np.argsort(np.nan_to_num(key, nan=-np.inf), kind="stable")  # the reference first
    found = [0, *np.flatnonzero(np.isin(scans, outliers)).tolist()][: most // 2]
    rest = order[~np.isin(order, found)]
    spread = np.unique(np.linspace(0, len(rest) - 1, most - len(found)).round().astype(int))
    return sorted({*found, *rest[spread].tolist()})


def class_sheet(
    store: PatchStore, label: int, mean: NDArray[np.float64], shown: Sequence[int]
) -> bytes:
    """The mean of a class, then its shown members; a row of tiles each: their slices by plane."""
    counts = count_slices(store)
    tiles = slices(mean, counts)
    for split, rows in _base_rows(store, label, shown):
        for crops in store.split(split).read_batches(rows):
            for crop in crops:
                tiles += slices(crop, counts)
    return encode_tiles([fit(tile, TILE) for tile in tiles], sum(counts.values()))


def _base_rows(
    store: PatchStore, label: int, numbers: Sequence[int] | None = None
) -> list[tuple[str, NDArray[np.intp]]]:
    """Rows of the base crops of some members, or of all, by split; in order of their numbers."""
    rows = [store.members(label, split).rows for split in SPLITS]
    if numbers is None:
        return list(zip(SPLITS, rows, strict=True))
    chosen, first = np.asarray(numbers, int), len(rows[0])
    return [
        (SPLITS[0], rows[0][chosen[chosen < first]]),
        (SPLITS[1], rows[1][chosen[chosen >= first] - first]),
    ]


def mean_crop(store: PatchStore, label: int) -> NDArray[np.float64]:
    """The mean of a class's base crops, in HU."""
    total, count = np.zeros(store.crop_shape), 0
    for split, rows in _base_rows(store, label):
        for crops in store.split(split).read_batches(rows):
            total += crops.sum(axis=0, dtype=np.float64)
            count += len(crops)
    return total / count


def card_tiles(store: PatchStore, label: int, mean: NDArray[np.float64]) -> list[Grey]:
    """Pictures of a class's card: mean, reference, front and side view of the reference scan."""
    members = store.members(label)
    crop = store.train.read(members.rows[:1])[0]
    views = projections(store.thumbnails.read(members.scans[:1])[0])
    middle = [to_grey(mean[len(mean) // 2]), to_grey(crop[len(crop) // 2])]
    return [fit(tile, TILE) for tile in (*middle, *views)]


def scan_sheet(store: PatchStore) -> bytes:
    """Front and side view of each scan, up to `MAPPED_SCANS`."""
    shown = range(min(len(store.scans.id), MAPPED_SCANS))
    thumbnails = (store.thumbnails.read([row])[0] for row in shown)
    tiles = [fit(view, TILE) for image in thumbnails for view in projections(image)]
    return encode_tiles(tiles, SCAN_COLUMNS)


def volume_shape(store: PatchStore) -> tuple[int, ...]:
    """Shape of the volumes of members (z, y, x): the crop's, reduced to at most 64 on each axis."""
    return tuple(-(-length // _step(length)) for length in store.crop_shape)


def member_volumes(store: PatchStore, label: int, chunk: int) -> bytes:
    """Grey levels of the members number `CHUNK * chunk` and following: (n, z, y, x) bytes.

    KeyError where there are none.
    """
    rows = _base_rows(store, label)
    count = sum(len(of_split) for _, of_split in rows)
    if not 0 <= chunk * CHUNK < count:
        raise KeyError(chunk)
    numbers = range(chunk * CHUNK, min(count, (chunk + 1) * CHUNK))
    parts = [
        _reduce(to_grey(crops)).tobytes()
        for split, chosen in _base_rows(store, label, numbers)
        for crops in store.split(split).read_batches(chosen)
    ]
    return b"".join(parts)


def mean_volume(store: PatchStore, label: int) -> bytes:
    """Grey levels of the mean of a class, as one of `member_volumes`."""
    return _reduce(to_grey(mean_crop(store, label))[None]).tobytes()


def crop_volume(store: PatchStore, split: str, row: int) -> bytes:
    """Grey levels of one crop, every voxel: (Z, Y, X) bytes. KeyError for an unknown row."""
    if not 0 <= row < len(store.split(split)):
        raise KeyError(row)
    return to_grey(store.split(split).read([row])[0]).tobytes()


def _step(length: int) -> int:
    return -(-length // _LONGEST)


def _reduce(volumes: Grey) -> Grey:
    """(n, Z, Y, X): voxels at equal distances along each axis."""
    z, y, x = (_step(length) for length in volumes.shape[1:])
    return np.ascontiguousarray(volumes[:, z // 2 :: z, y // 2 :: y, x // 2 :: x])
