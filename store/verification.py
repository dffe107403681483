"""Read everything in a store and report what is broken: checksums, digests, tables, fingerprint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.classes import read_annotation
from store.format import DIGESTS, SHARDED, SPLITS, StoreError, Unreachable, format_rows
from store.group import compute_fingerprint, digest_values
from store.inspect import describe_store
from store.layout import list_chunks
from store.location import Location, Where
from store.progress import SILENT, Advance, Progress
from store.reader import PatchStore
from store.sharded import ShardedReader

_SAME_PLACE_MM = 1e-3
"""Maximum rounding error between a member's place and the centre of its base crop."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is broken. `where` is an array or "store"; `rows` may be empty."""

    where: str
    what: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        rows = f" rows {format_rows(list(self.rows))}" if self.rows else ""
        return f"{self.where}{rows}: {self.what}"


def verify(path: Where, *, progress: Progress = SILENT) -> Iterator[Problem]:
    """Read and check everything in a store, yielding problems as they are found.

    Of a URL, everything is read from the server, not from the cache on disk. Raises StoreError when
    there is no store to check, and Unreachable when the server of a URL does not answer.
    """
    store = PatchStore(path, allow_building=True)
    if store.state != "complete":
        todo = f"run the same `{store.location.finished_by}` to finish it"
        yield Problem("store", f'state is "{store.state}", not "complete"; {todo}')
        return
    intact = True
    groups = [(name, _check_group(store, name)) for name in ("scans", "classes", *SPLITS)]
    tables = [(name, _check_table(store, name)) for name in store.tables]
    for name, check in (*groups, *tables):
        for problem in _guarded(name, check):
            intact = False
            yield problem
    with progress.stage("verify", _count_rows(store.location), "rows") as advance:
        for name in SHARDED:
            for problem in _guarded(name, _check_shards(store, name, advance)):
                intact &= bool(problem.rows)
                yield problem
    yield from _guarded("classes", _check_annotation(store))
    if intact:
        yield from _guarded("store", _check_stages(store))
        yield from _guarded("store", _check_consistency(store))
        yield from _guarded("store", _check_fingerprint(store))


def _guarded(where: str, check: Iterator[Problem]) -> Iterator[Problem]:
    """The problems that a check finds, and one more if the check itself fails."""
    try:
        yield from check
    except Unreachable:
        raise
    except Exception as error:  # broken metadata can make zarr raise anything
        yield Problem(where, f"cannot be read ({type(error).__name__})")


def _count_rows(location: Location) -> int:
    """Rows of the sharded arrays that can be opened."""
    total = 0
    for name in SHARDED:
        with contextlib.suppress(StoreError):  # reported when it is checked
            total += len(ShardedReader(location, name))
    return total


def _check_group(store: PatchStore, name: str) -> Iterator[Problem]:
    if not isinstance(store.group[name], zarr.Group):
        yield Problem(name, "must be a group")


def _check_table(store: PatchStore, name: str) -> Iterator[Problem]:
    array: Any = store.group[name]
    table = store.tables[name]
    if array.dtype != table.dtype or array.ndim != len(table.dimensions):
        yield Problem(name, f"must be {table.dtype} with {len(table.dimensions)} axes")
    elif not all(store.location.map(store.location.exists, list_chunks(name, array))):
        yield Problem(name, "chunks are missing")
    else:
        np.asarray(array[...])


def _check_fingerprint(store: PatchStore) -> Iterator[Problem]:
    if compute_fingerprint(store.location) != store.fingerprint:
        yield Problem("store", "fingerprint does not match the content")


def _check_shards(store: PatchStore, name: str, advance: Advance) -> Iterator[Problem]:
    reader = ShardedReader(store.location, name)  # without a cache
    array: Any = store.group[name]
    digests = array.attrs[DIGESTS]
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
        elif shard == 0 and not np.array_equal(array[:1], values[:1]):
            yield Problem(name, "other programs read other values: its zarr.json is damaged")
        advance(len(rows))


def _check_annotation(store: PatchStore) -> Iterator[Problem]:
    """Annotated classes and excluded members exist."""
    for label, note in read_annotation(store.location).notes.items():
        if not 0 <= label < store.num_classes:
            yield Problem("classes", f"the annotation names class {label}, which does not exist")
            continue
        members = np.concatenate(
            [store.classes.neighbour[label], store.classes.validation_neighbour[label]]
        )
        if not {*note.excluded_members} <= {*members[members >= 0].tolist()}:
            yield Problem(
                "classes", f"the annotation of class {label} names a scan that is no member"
            )


def _check_stages(store: PatchStore) -> Iterator[Problem]:
    """What the stages recorded, against the tables."""
    missing = [name for name in ("survey", "embed", "discover") if name not in store.stages]
    if missing:
        yield Problem("store", f"zarr.json has no record of stage {missing[0]}")
        return
    num_scans, survey = len(store.scans.id), store.stages["survey"]
    for stage, name, counted in (
        ("survey", "accepted", num_scans),
        ("discover", "classes", store.num_classes),
    ):
        recorded = store.stages[stage][name]
        if recorded != counted:
            yield Problem("store", f"zarr.json counts {recorded} {name}, the tables {counted}")
    rows = [row for *pair, _ in survey.get("near_duplicates") or () for row in pair]
    if not all(0 <= row < num_scans for row in rows):
        yield Problem("store", "zarr.json has near-duplicates of scans that do not exist")
    else:
        describe_store(store)  # needs the other records


def _check_consistency(store: PatchStore) -> Iterator[Problem]:
    """Tables against each other: the plan, the rows, the split by patients."""
    scans, classes = store.scans, store.classes
    num_scans, num_classes = len(scans.id), store.num_classes
    if len(np.unique(scans.id)) != num_scans:
        yield Problem("scans/id", "scan ids repeat")
    for patient in np.unique(scans.patient):
        if len(np.unique(scans.split[scans.patient == patient])) > 1:
            yield Problem("scans/split", f"patient {patient} is in both splits")
    if store.has_statistics:
        wrong = ~(np.isfinite(scans.mean_hu) & (scans.std_hu > 0) & np.isfinite(scans.std_hu))
        yield from _name_rows("scans/std_hu", "mean and deviation must be finite, above 0", wrong)
    if store.format > 1:
        yield from _check_classes(store)
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
            yield from _name_rows(name, "label or scan out of range", wrong)
            continue
        stray = scans.split[split.scan] != number
        stray |= ~(neighbour[split.label] == split.scan[:, None]).any(axis=1)
        yield from _name_rows(name, "scan is not a member of its class", stray)
        num_scales = store.num_scales if number == 0 else 1
        if len(split) != num_scales * int((neighbour >= 0).sum()):
            yield Problem(name, "rows do not match the classes' members")
        elif store.format > 1:
            yield from _check_members(store, name)


def _name_rows(where: str, what: str, wrong: NDArray[np.bool_]) -> Iterator[Problem]:
    """One problem with all rows where `wrong`, (n,) or (n, columns), is true; none if none is."""
    rows = np.flatnonzero(wrong if wrong.ndim == 1 else wrong.any(axis=1))
    if len(rows):
        yield Problem(where, what, tuple(rows.tolist()))


def _check_classes(store: PatchStore) -> Iterator[Problem]:
    """The reference of a class is its own nearest member; a share is from 0 to 1."""
    classes = store.classes
    own = (classes.neighbour == classes.reference[:, None]) & (classes.distance == 0)
    yield from _name_rows("classes/reference", "is not a member at distance 0", ~own.any(axis=1))
    for name in ("distance", "validation_distance"):
        unordered = np.diff(getattr(classes, name)) < 0
        yield from _name_rows(f"classes/{name}", "members are not in order of distance", unordered)
    share = classes.body_share
    yield from _name_rows("classes/body_share", "must be 0 to 1", ~((share >= 0) & (share <= 1)))


def _check_members(store: PatchStore, split: str) -> Iterator[Problem]:
    """Distances, places, scores and cycles of members; other entries are empty."""
    prefix = "classes/" if split == "train" else "classes/validation_"
    neighbour, distance, place_mm, score, cycle_mm = (
        getattr(store.classes, (prefix + name).removeprefix("classes/"))
        for name in ("neighbour", "distance", "place_mm", "score", "cycle_mm")
    )
    used = neighbour >= 0
    matched = used & store.is_matched
    known = {
        "distance": (np.isfinite(distance), used),
        "place_mm": (np.isfinite(place_mm).all(axis=-1), used),
        "score": (np.isfinite(score), matched),
        "cycle_mm": (np.isfinite(cycle_mm), matched),
    }
    for name, (given, wanted) in known.items():
        yield from _name_rows(prefix + name, "has no value for a member", wanted & ~given)
        yield from _name_rows(prefix + name, "has a value where none belongs", given & ~wanted)
    if store.is_matched:
        least, most = store.config["min_score"], store.config["max_cycle_mm"]
        yield from _name_rows(f"{prefix}score", f"below min_score {least}", score < least)
        yield from _name_rows(f"{prefix}cycle_mm", f"above max_cycle_mm {most}", cycle_mm > most)
    for label in range(store.num_classes):
        apart = place_mm[label][used[label]] - store.members(label, split).places
        if not (np.abs(apart) <= _SAME_PLACE_MM).all():
            yield Problem(f"{prefix}place_mm", "differs from the base crops", (label,))
