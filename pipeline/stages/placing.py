"""Match classes in scans, by the workers: where the anatomy of a draft lies in each scan.

A draft is a coordinate of a reference that may become a class. What matching needs of a reference
is small, and every worker gets it; each scan is described once for all drafts that are tried in it.
Results are kept in the private catalogue, so that an interrupted job resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias
from zipfile import BadZipFile

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.crops import one_blas_thread
from pipeline.features import Features
from pipeline.match import describe_place, describe_scan, match_place
from pipeline.place import Floats, Scans
from pipeline.tasks import raise_if_failed, run_bounded
from store.atomic import replace_file
from store.progress import Advance, Progress, show_tally
from store.sharded import ShardedReader

_CACHED_SCANS = 32
"""Scans whose features a worker keeps, of about 3 MiB each."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A coordinate of a reference scan that may become a class."""

    reference: int
    """Row of the scan."""
    centre: Floats
    """(3,) in frame units."""
    place_mm: Floats
    """(3,) in the reference."""
    body_share: float
    """Share of the base crop that is body."""


@dataclass(frozen=True, slots=True)
class Found:
    """Matches of one draft in n scans; nan where there is no overlap."""

    place_mm: Floats
    """(n, 3)."""
    score: Floats
    """(n,)."""
    cycle_mm: Floats
    """(n,)."""


Box: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Low and high corner, each (z, y, x) in mm."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a worker finds a scan's thumbnail, and what it shows."""

    store: str
    row: int
    box_mm: Box
    """Corners of the frame box."""
    edges_mm: Box
    """Corners of the scan."""
    window_hu: tuple[float, float]

    def __repr__(self) -> str:
        return f"<Source {self.row}>"


class Placing:
    """Matches drafts in scans; remembers what was matched before an interruption."""

    def __init__(
        self,
        client: Client,
        store: Path,
        scans: Scans,
        config: PrepareConfig,
        folder: Path,
        progress: Progress,
        advance: Advance,
    ) -> None:
        """`folder` is for the results; `advance` is called with 0 while matching goes on."""
        self.client, self.store, self.scans, self.config = client, store, scans, config
        self.folder, self.progress, self.advance = folder, progress, advance
        self.number = self.matched = 0
        self._tried = self._found = 0

    def match(self, drafts: Sequence[Draft], wanted: Sequence[NDArray[np.intp]]) -> list[Found]:
        """Match each draft in the scans wanted for it: rows (n,)."""
        request = np.array(
            [
                (draft.reference, *draft.place_mm, scan)
                for draft, scans in zip(drafts, wanted, strict=True)
                for scan in scans.tolist()
            ]
        )
        file = self.folder / f"{self.number:06d}.npz"
        self.number += 1
        found = _read_results(file, request)
        if found is None:
            found = self._match(drafts, wanted)
            self.folder.mkdir(exist_ok=True)
            with replace_file(file) as partial, partial.open("wb") as opened:
                np.savez(opened, request=request, found=found)
        else:
            self._count(found)
        ends = np.cumsum([len(scans) for scans in wanted])[:-1]
        return [Found(part[:, :3], part[:, 3], part[:, 4]) for part in np.split(found, ends)]

    def _match(self, drafts: Sequence[Draft], wanted: Sequence[NDArray[np.intp]]) -> Floats:
        """(total, 5) place, score and cycle, in the order of `wanted`."""
        used = [number for number, scans in enumerate(wanted) if len(scans)]
        templates = [
            self.client.submit(
                make_template, self.source(drafts[n].reference), drafts[n].place_mm, pure=False
            )
            for n in used
        ]
        by_scan: dict[int, list[tuple[int, int]]] = {}  # template, row of the result
        row = 0
        for template, number in enumerate(used):
            for scan in wanted[number].tolist():
                by_scan.setdefault(scan, []).append((template, row))
                row += 1
        items = [
            (self.source(scan), tuple(template for template, _ in tasks))
            for scan, tasks in sorted(by_scan.items())
        ]
        self.matched += row
        results = np.empty((row, 5))
        for (source, _), found in run_bounded(
            self.client, match_scan, items, templates, self.config.min_score
        ):
            raise_if_failed(found)
            results[[row for _, row in by_scan[source.row]]] = found
            self._count(found)
            self.advance(0)
        return results

    def _count(self, found: Floats) -> None:
        """Show how many of the scans that were tried match well enough."""
        self._tried += len(found)
        self._found += int((found[:, 3] >= self.config.min_score).sum())
        show_tally(self.progress, f"matched: {self._found} of {self._tried} places tried")

    def source(self, row: int) -> Source:
        """A scan as the workers get it."""
        spacing_mm, size = self.scans.spacing_mm[row], self.scans.size[row]
        return Source(
            store=str(self.store),
            row=row,
            box_mm=_as_box(*self.scans.frame_mm[row]),
            edges_mm=_as_box(-0.5 * spacing_mm, (size - 0.5) * spacing_mm),
            window_hu=self.config.window_hu,
        )


def _as_box(low: Floats, high: Floats) -> Box:
    return tuple(low.tolist()), tuple(high.tolist())


def _read_results(file: Path, request: Floats) -> Floats | None:
    """Results of an earlier run, if it asked for the same."""
    try:
        with np.load(file) as saved:
            same = np.array_equal(saved["request"], request)
            return np.asarray(saved["found"]) if same else None
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


# Functions that workers run ----------------------------------------------------------------------


def make_template(source: Source, place_mm: Floats) -> tuple[Floats, Features]:
    """A place of a reference, and what matching needs of its surroundings."""
    return place_mm, describe_place(describe(source), place_mm)


def match_scan(
    item: tuple[Source, tuple[int, ...]],
    templates: Sequence[tuple[Floats, Features]],
    min_score: float,
) -> Floats:
    """(n, 5) matches of templates in one scan: place, score, cycle; nan where there is none."""
    source, numbers = item
    there = describe(source)
    found = np.full((len(numbers), 5), np.nan)
    with one_blas_thread():
        for row, number in zip(found, numbers, strict=True):
            place_mm, here = templates[number]
            match = match_place(place_mm, here, there, min_score=min_score)
            if match is not None:
                row[:] = *match.place_mm, match.score, match.cycle_mm
    return found


@lru_cache(maxsize=_CACHED_SCANS)
def describe(source: Source) -> Features:
    """Features of a scan, from its thumbnail in the store."""
    thumbnail = _thumbnails(source.store).read([source.row])[0]
    with one_blas_thread():
        return describe_scan(
            thumbnail,
            box_mm=np.array(source.box_mm),
            edges_mm=np.array(source.edges_mm),
            window_hu=source.window_hu,
        )


@lru_cache(maxsize=1)
def _thumbnails(store: str) -> ShardedReader:
    return ShardedReader(Path(store), "scans/thumbnail")
