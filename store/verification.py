"""Read everything in a store and report what is broken: checksums, digests, tables, fingerprint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.format import DIGESTS, SHARDED, SPLITS, StoreError, format_rows, tables_of
from store.group import compute_fingerprint, digest_values, open_group
from store.progress import SILENT, Advance, Progress
from store.reader import PatchStore
from store.sharded import ShardedReader


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is broken. `where` is an array or "store"; `rows` may be empty."""

    where: str
    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        rows = f" rows {format_rows(list(self.rows))}" if self.rows else ""
        return f"{self.where}{rows}: {self.what}"


def verify(path: str | Path, *, progress: Progress = SILENT) -> Iterator[Problem]:
    """Read and check everything in a store, yielding problems as they are found.

    Raises StoreError when there is no store to check.
    """
    path = Path(path)
    store = PatchStore(path, allow_building=True)
    if store.state != "complete":
        todo = "run the same `semgen prepare` to finish it"
        yield Problem("store", f'state is "{store.state}", not "complete"; {todo}')
        return
    intact = True
    groups = [(name, _check_group(store, name)) for name in ("scans", "classes", *SPLITS)]
    tables = [(name, _check_table(store, name)) for name in tables_of(store.format)]
    for name, check in (*groups, *tables):
        for problem in _guarded(name, check):
            intact = False
            yield problem
    with progress.stage("verify", _count_rows(path), "rows") as advance:
        for name in SHARDED:
            for problem in _guarded(name, _check_shards(path, name, advance)):
                intact &= bool(problem.rows)
                yield problem
    if intact:
        yield from _guarded("store", _check_consistency(store))
        yield from _guarded("store", _check_fingerprint(store))


def _guarded(where: str, check: Iterator[Problem]) -> Iterator[Problem]:
    """The problems that a check finds, and one more if the check itself fails."""
    try:
        yield from check
    except Exception as error:  # broken metadata can make zarr raise anything
        yield Problem(where, f"cannot be read ({type(error).__name__})")


def _count_rows(path: Path) -> int:
    """Rows of the sharded arrays that can be opened."""
    total = 0
    for name in SHARDED:
        with contextlib.suppress(StoreError):  # reported when it is checked
            total += len(ShardedReader(path, name))
    return total


def _check_group(store: PatchStore, name: str) -> Iterator[Problem]:
    if not isinstance(store.group[name], zarr.Group):
        yield Problem(name, "must be a group")


def _check_table(store: PatchStore, name: str) -> Iterator[Problem]:
    array: Any = store.group[name]
    table = tables_of(store.format)[name]
    if array.dtype != table.dtype or array.ndim != 1 + len(table.columns):
        yield Problem(name, f"must be {table.dtype} with {1 + len(table.columns)} axes")
    elif array.nchunks_initialized != array.nchunks:
        yield Problem(name, "chunks are missing")
    else:
        np.asarray(array[...])


def _check_fingerprint(store: PatchStore) -> Iterator[Problem]:
    if compute_fingerprint(store.path) != store.fingerprint:
        yield Problem("store", "fingerprint does not match the content")


def _check_shards(path: Path, name: str, advance: Advance) -> Iterator[Problem]:
    reader = ShardedReader(path, name)
    digests: Any = open_group(path)[name].attrs[DIGESTS]
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
            yield Problem(name, "differs from what was written", tuple(rows))
        advance(len(rows))


def _check_consistency(store: PatchStore) -> Iterator[Problem]:
    """Tables against each other: the plan, the rows, the split by patients."""
    scans, classes = store.scans, store.classes
    num_scans, num_classes = len(scans.id), store.num_classes
    if len(np.unique(scans.id)) != num_scans:
        yield Problem("scans/id", "scan ids repeat")
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
                name, "scan is not a member of its class", tuple(np.flatnonzero(stray).tolist())
            )
        num_scales = store.num_scales if number == 0 else 1
        if len(split) != num_scales * int((neighbour >= 0).sum()):
            yield Problem(name, "rows do not match the classes' members")
        elif store.format > 1:
            yield from _check_places(store, name)


def _check_places(store: PatchStore, split: str) -> Iterator[Problem]:
    """Places of members against their base crops; where there is no member, there is no place."""
    classes, prefix = store.classes, "" if split == "train" else "validation_"
    neighbour: NDArray[np.int32] = getattr(classes, f"{prefix}neighbour")
    for name in ("place_mm", "score", "cycle_mm"):
        values = getattr(classes, prefix + name)
        stray = np.isfinite(values).reshape(*neighbour.shape, -1).any(-1) & (neighbour < 0)
        if stray.any():
            rows = tuple(np.flatnonzero(stray.any(1)).tolist())
            yield Problem(f"classes/{prefix}{name}", "has values without a member", rows)
    for label in range(store.num_classes):
        place_mm = getattr(classes, f"{prefix}place_mm")[label][neighbour[label] >= 0]
        if not np.allclose(place_mm, store.members(label, split).places, rtol=0, atol=1e-3):
            yield Problem(f"classes/{prefix}place_mm", "differs from the base crops", (label,))
