"""Read a store: tables as numpy arrays, crops by row."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import ROW_TABLES, SPLITS, STATISTICS, StoreError, tables_of
from store.group import open_group, read_attribute, read_errors
from store.layout import list_chunks
from store.location import Location, Where, locate
from store.sharded import Rows, ShardedReader

_BATCH_BYTES = 2**26


def _read_table(location: Location, group: Any, name: str) -> NDArray[Any]:
    """A whole table; StoreError where it is damaged, or a chunk of it is missing."""
    text = f"{location}: table {name} is missing or broken; run `semgen verify`"
    with read_errors(location, text):
        array = group[name]
        values = np.asarray(array[...])
        for number, key in enumerate(list_chunks(name, array)):
            chunk = values[number * array.chunks[0] : (number + 1) * array.chunks[0]]
            if (chunk == array.fill_value).all() and not location.exists(key):
                raise FileNotFoundError(key)  # zarr reads it as its fill value
        return values


class Tables:
    """The tables of one group as numpy arrays, read on first use: `scans.spacing_mm`."""

    def __init__(self, location: Location, group: Any, prefix: str, names: Sequence[str]) -> None:
        self._location, self._group = location, group
        self._prefix = prefix
        self._names = names

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(name)
        values = _read_table(self._location, self._group, f"{self._prefix}/{name}")
        values.setflags(write=False)
        setattr(self, name, values)
        return values


class Split:
    """The rows of "train" or "validation".

    Attributes `label` (n,) int32, `scan` (n,) int32, `scale` (n,) uint8, `origin_mm` and
    `extent_mm` (n, 3) float64, and `patch`, a ShardedReader of (n, Z, Y, X) int16 HU.
    """

    label: NDArray[np.int32]
    scan: NDArray[np.int32]
    scale: NDArray[np.uint8]
    origin_mm: NDArray[np.float64]
    extent_mm: NDArray[np.float64]

    def __init__(self, location: Location, group: Any, name: str) -> None:
        self.name = name
        self._location, self._fingerprint = location, read_attribute(group)["fingerprint"]
        self.patch = ShardedReader(location, f"{name}/patch", fingerprint=self._fingerprint)
        tables = location.map(
            lambda table: _read_table(location, group, f"{name}/{table}"), ROW_TABLES
        )
        for table, values in zip(ROW_TABLES, tables, strict=True):
            setattr(self, table, values)

    def __len__(self) -> int:
        return len(self.label)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the location only: a worker process opens the store again."""
        return _open_split, (self._location.absolute(), self._fingerprint, self.name)

    def read(self, rows: Rows) -> NDArray[np.int16]:
        """Crops of the given rows in that order, (n, Z, Y, X) HU; see `ShardedReader.read`."""
        return self.patch.read(rows)

    def read_batches(self, rows: NDArray[np.integer[Any]]) -> Iterator[NDArray[np.int16]]:
        """The same crops in batches of at most 64 MiB: any number of rows fits into memory."""
        at_once = max(1, _BATCH_BYTES // (2 * math.prod(self.patch.shape[1:])))
        for start in range(0, len(rows), at_once):
            yield self.read(rows[start : start + at_once])


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The n scans of a class in one split."""

    scans: NDArray[np.int32]
    """(n,) rows of `PatchStore.scans`."""
    distances: NDArray[np.float32]
    """(n,) L2 distance of the scan's embedding to the reference's."""
    places: NDArray[np.float64]
    """(n, 3) centre of the base crop in the scan: z, y, x in mm."""
    scores: NDArray[np.float32]
    """(n,) how well the place matches the reference, at most 1; nan if it was not matched."""
    cycles: NDArray[np.float32]
    """(n,) distance in mm from the start after matching to the scan and back; nan as above."""
    rows: NDArray[np.intp]
    """(n,) the base crops: rows of the split."""

    def __len__(self) -> int:
        return len(self.scans)


class PatchStore:
    """A complete patch store, open for reading.

    >>> store = PatchStore("chest.store")                        # doctest: +SKIP
    >>> store.train.read(store.rows("train", label=3)).shape  # doctest: +SKIP
    (600, 32, 64, 64)
    """

    def __init__(self, path: Where, *, allow_building: bool = False) -> None:
        """Open the store at a path or a URL such as "s3://bucket/chest.store".

        Raises StoreError if it is not a store, or not complete (unless `allow_building`), and
        Unreachable when the server of a URL does not answer or denies access.
        """
        self.location = locate(path)
        self.group = open_group(self.location)
        attribute = read_attribute(self.group)
        self.format: int = attribute["format"]
        self.state: str = attribute["state"]
        self.fingerprint: str | None = attribute["fingerprint"]
        self.config: dict[str, Any] = attribute["config"]
        self.software: dict[str, str] = attribute["software"]
        self.stages: dict[str, Any] = attribute["stages"]
        self.tables = tables_of(attribute)
        if self.state != "complete" and not allow_building:
            raise StoreError(
                f"{self.location}: still building; run the same `{self.location.finished_by}` to"
                " finish it"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle location and fingerprint: a worker process opens the same store again."""
        return _reopen, (self.location.absolute(), self.fingerprint)

    @property
    def path(self) -> Path:
        """The folder of the store. Raises StoreError if it is at a URL; see `location`."""
        return self.location.path

    @cached_property
    def scans(self) -> Tables:
        """Tables of `store.format.SCAN_TABLES`; of an older store, those that it has."""
        return self._tables("scans")

    @cached_property
    def classes(self) -> Tables:
        """Tables of `store.format.CLASS_TABLES`; of an older store, those that it has."""
        return self._tables("classes")

    def _tables(self, group: str) -> Tables:
        names = [name.removeprefix(f"{group}/") for name in self.tables if name.startswith(group)]
        return Tables(self.location, self.group, group, names)

    @cached_property
    def thumbnails(self) -> ShardedReader:
        """(N, 64, 128, 128) uint8 by scan row: the frame box, window mapped to 0..255."""
        return ShardedReader(self.location, "scans/thumbnail", fingerprint=self.fingerprint)

    @cached_property
    def train(self) -> Split:
        return Split(self.location, self.group, "train")

    @cached_property
    def validation(self) -> Split:
        return Split(self.location, self.group, "validation")

    def split(self, name: str) -> Split:
        """`train` or `validation` by name."""
        if name not in SPLITS:
            raise KeyError(f"split must be one of {SPLITS}, got {name!r}")
        return self.train if name == "train" else self.validation

    @property
    def num_classes(self) -> int:
        return len(self.classes.reference)

    @property
    def window_hu(self) -> tuple[float, float]:
        """Lowest and highest HU of a crop."""
        low, high = self.config["window_hu"]
        return float(low), float(high)

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """(Z, Y, X) voxels of a crop."""
        z, y, x = self.train.patch.shape[1:]
        return z, y, x

    @property
    def is_matched(self) -> bool:
        """Whether members were placed by matching; if not, by the frame, without scores."""
        return bool(self.config.get("place") == "match")  # no such setting in format 1

    @property
    def has_statistics(self) -> bool:
        """Whether `scans` has the mean and standard deviation of each scan's HU, for z-scores.

        Stores of earlier versions have none.
        """
        return self.tables.keys() >= {*STATISTICS}

    @property
    def num_scales(self) -> int:
        """Scales of a training crop, the base crop (0) included."""
        return int(self.config["scales"])

    def rows(
        self, split: str, label: int | None = None, scale: int | None = None
    ) -> NDArray[np.intp]:
        """Rows of a split in store order; of one class, of one scale, where these are given.

        Raises IndexError for a class that the store does not have.
        """
        if label is not None and not 0 <= label < self.num_classes:
            raise IndexError(f"label must be in [0, {self.num_classes}), got {label}")
        table = self.split(split)
        wanted = np.ones(len(table), bool)
        if label is not None:
            wanted &= table.label == label
        if scale is not None:
            wanted &= table.scale == scale
        return np.flatnonzero(wanted)

    def members(self, label: int, split: str = "train") -> Members:
        """The scans of one class, nearest to its reference first.

        Raises IndexError for a class that the store does not have.
        """
        base = self.rows(split, label, scale=0)
        prefix = "" if split == "train" else "validation_"
        scans = getattr(self.classes, f"{prefix}neighbour")[label]
        used = scans >= 0
        distances = getattr(self.classes, f"{prefix}distance")[label][used]
        if self.format > 1:
            scores = getattr(self.classes, f"{prefix}score")[label][used]
            cycles = getattr(self.classes, f"{prefix}cycle_mm")[label][used]
        else:
            scores = cycles = np.full(len(distances), np.nan, np.float32)
        scans = scans[used]
        table = self.split(split)
        rows = base[np.searchsorted(table.scan[base], scans)]  # rows are in order of their scans
        centre_mm = table.origin_mm[rows] + table.extent_mm[rows] / 2
        return Members(
            scans=scans,
            distances=distances,
            places=centre_mm,
            scores=scores,
            cycles=cycles,
            rows=rows,
        )

    def table(self, split: str) -> dict[str, NDArray[Any]]:
        """The crops of a split as columns, such as for `pandas.DataFrame(store.table("train"))`.

        row, class, scan (row of `scans`), patient, scale, z_mm, y_mm, x_mm (centre of the crop in
        its scan), depth_mm, height_mm, width_mm.
        """
        rows = self.split(split)
        centre = rows.origin_mm + rows.extent_mm / 2
        return {
            "row": np.arange(len(rows)),
            "class": rows.label,
            "scan": rows.scan,
            "patient": self.scans.patient[rows.scan],
            "scale": rows.scale,
            **{f"{axis}_mm": centre[:, i] for i, axis in enumerate("zyx")},
            **{f"{side}_mm": rows.extent_mm[:, i]
               for i, side in enumerate(("depth", "height", "width"))},
        }  # fmt: skip

    def _repr_html_(self) -> str:
        """For notebooks."""
        if self.state != "complete":
            return f"<p>{html.escape(repr(self))}</p>"
        facts = {
            "scans": len(self.scans.id),
            "patients": len(np.unique(self.scans.patient)),
            "classes": self.num_classes,
            "crops": f"{len(self.train)} train, {len(self.validation)} validation",
            "voxels": " x ".join(map(str, self.train.patch.shape[1:])) + " (z, y, x)",
            "fingerprint": (self.fingerprint or "")[:16],
        }
        lines = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in facts.items()
        )
        return f"<table><caption>{html.escape(self.location.name)}</caption>{lines}</table>"

    def __repr__(self) -> str:
        name = self.location.name
        if self.state != "complete":
            return f"<PatchStore {name}: {self.state}>"
        return (
            f"<PatchStore {name}: {len(self.scans.id)} scans, {self.num_classes} classes,"
            f" {len(self.train)} train and {len(self.validation)} validation crops of"
            f" {self.train.patch.shape[1:]}, {(self.fingerprint or '')[:12]}>"
        )


def _reopen(path: Where, fingerprint: str | None) -> PatchStore:
    """Open a pickled store; StoreError if its content has changed since."""
    store = PatchStore(path, allow_building=True)
    if store.fingerprint != fingerprint:
        raise StoreError(
            f"{path}: its content changed since it was opened; open it again with PatchStore"
        )
    return store


def _open_split(path: Where, fingerprint: str | None, name: str) -> Split:
    return _reopen(path, fingerprint).split(name)
