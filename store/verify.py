"""Read everything in a store and say what is broken: checksums, digests, tables, fingerprint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import DIGESTS, SHARDED, SPLITS, TABLES, StoreError, format_rows
from store.reader import PatchStore, ShardedReader
from store.writer import compute_fingerprint, digest_values, open_group


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` is an array or "store"; `rows` may be empty."""

    where: str
    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        rows = f" rows {format_rows(list(self.rows))}" if self.rows else ""
        return f"{self.where}{rows}: {self.what}"


def verify(path: Path, *, progress: Callable[[int], None] = lambda _: None) -> Iterator[Problem]:
    """Check a whole store, yielding problems as they are found.

    progress
        Called with the number of rows (crops and thumbnails) just read.

    Raises StoreError when there is no store to check.
    """
    store = PatchStore(path, allow_building=True)
    if store.state != "complete":
        yield Problem("store", f'state is "{store.state}", not "complete"')
        return
    broken = list(_check_tables(store))
    yield from broken
    for name in SHARDED:
        for problem in _check_shards(path, name, progress):
            broken += [problem] if not problem.rows else []
            yield problem
    if broken:
        return
    yield from _check_consistency(store)
    try:
        if compute_fingerprint(path) != store.fingerprint:
            yield Problem("store", "fingerprint does not match the content")
    except OSError as error:
        yield Problem("store", f"fingerprint cannot be computed: {type(error).__name__}")


def count_rows(path: Path) -> int:
    """Rows that `verify` will read."""
    total = 0
    if PatchStore(path, allow_building=True).state == "complete":
        for name in SHARDED:
            with contextlib.suppress(StoreError):  # verify will name it
                total += len(ShardedReader(path, name))
    return total


def _check_tables(store: PatchStore) -> Iterator[Problem]:
    for name, table in TABLES.items():
        try:
            array: Any = store.group[name]
            values = np.asarray(array[...])
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            yield Problem(name, f"cannot be read ({type(error).__name__})")
            continue
        if values.dtype != table.dtype or values.ndim != 1 + len(table.columns):
            yield Problem(name, f"must be {table.dtype} with {1 + len(table.columns)} axes")
        elif array.nchunks_initialized != array.nchunks:
            yield Problem(name, "chunks are missing")


def _check_shards(path: Path, name: str, progress: Callable[[int], None]) -> Iterator[Problem]:
    try:
        reader = ShardedReader(path, name)
        digests: Any = open_group(path)[name].attrs[DIGESTS]
    except (StoreError, KeyError):
        yield Problem(name, "missing, broken, or without its digests")
        return
    if len(digests) != reader.grid.num_shards:
        yield Problem(name, f"{reader.grid.num_shards} shards, {len(digests)} digests")
        return
    for shard in range(reader.grid.num_shards):
        rows = reader.grid.rows_of(shard)
        values = np.zeros((len(rows), *reader.shape[1:]), reader.dtype)
        bad = reader.read_into(rows, values)
        if bad:
            yield Problem(name, "checksum failed or data missing", tuple(bad))
        elif digest_values(values) != digests[shard]:
            yield Problem(name, "not what was sealed", tuple(rows))
        progress(len(rows))


def _check_consistency(store: PatchStore) -> Iterator[Problem]:
    """Tables against each other: the plan, the rows, the split by persons."""
    scans, classes = store.scans, store.classes
    num_scans, num_classes = len(scans.id), store.num_classes
    if len(np.unique(scans.id)) != num_scans:
        yield Problem("scans/id", "not unique")
    for patient in np.unique(scans.patient):
        if len(np.unique(scans.split[scans.patient == patient])) > 1:
            yield Problem("scans/split", f"patient {patient} is in both splits")
    for number, name in enumerate(SPLITS):
        split = store.split(name)
        neighbour: NDArray[np.int32] = (
            classes.neighbour if number == 0 else classes.validation_neighbour
        )
        if len({len(split), len(split.patch), len(split.scan), len(split.scale)}) > 1:
            yield Problem(name, "tables differ in length")
            continue
        wrong = (
            (split.label < 0)
            | (split.label >= num_classes)
            | (split.scan < 0)
            | (split.scan >= num_scans)
        )
        if wrong.any():
            yield Problem(name, "label or scan out of range", tuple(np.flatnonzero(wrong).tolist()))
            continue
        stray = scans.split[split.scan] != number
        stray |= ~(neighbour[split.label] == split.scan[:, None]).any(axis=1)
        if stray.any():
            yield Problem(
                name, "scan is no member of the class", tuple(np.flatnonzero(stray).tolist())
            )
        num_scales = store.config["scales"] if number == 0 else 1
        if len(split) != num_scales * int((neighbour >= 0).sum()):
            yield Problem(name, "rows do not match the classes' members")
