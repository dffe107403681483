"""Stage discover: find the classes, and plan every crop of the store before one is cut.

Section 2.1 of the paper: a random reference scan, its nearest neighbours, one random but fixed
coordinate; the class is the pseudo-label. In addition, a member must contain the whole crop, and no
scan has base crops of two classes that overlap more than the settings allow. With
`place = "match"`, the place of a class in a member is where the same anatomy is found
(`pipeline.stages.placing`); a scan in which it is not found is no member.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from pipeline.archive.catalogue import Catalogue
from pipeline.config import PrepareConfig
from pipeline.content import ContentOfScan
from pipeline.errors import PrepareError
from pipeline.neighbours import Neighbours
from pipeline.place import Floats, Geometry, Scans, TakenPlaces, load_scans
from pipeline.plan import (
    ClassPlan,
    PlannedMembers,
    class_tables,
    min_members,
    most_members,
    row_tables,
)
from pipeline.seeds import COORDINATE, REFERENCES
from pipeline.stages.placing import Draft, Found, Placing
from store.format import SPLITS
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.writer import StoreWriter

_log = logging.getLogger(__name__)
_ROUNDING_MM = 1e-6
_MIN_DRAFTS, _DRAFTS, _SCANS_PER_DRAFT = 16, 64, 16
"""Drafts that are placed at a time: more in a large archive, where they share the features of scans
and seldom overlap each other."""
_CACHED_SCANS = 32
"""Scans whose body is kept in memory, of 2 MiB each."""
_FIRST_WAVE, _WAVE = 4, 16
"""Scans that are tried for one class at first, and at least later. The first ones show most of the
overlap with other classes; where none of them is a member, the coordinate is given up."""
_FAILURES = 50
"""With matching, minimum number of drafts in a row that must fail before discovery ends."""

Find = Callable[[Sequence[Draft], Sequence[NDArray[np.intp]]], list[Found]]
"""Match each draft in scans: rows (n,) for each -> places, scores and cycles."""


def write_plan(
    client: Client,
    writer: StoreWriter,
    catalogue: Catalogue,
    config: PrepareConfig,
    progress: Progress,
) -> None:
    """Run the stage: write the tables of classes and rows, and lay out the arrays of crops.

    Raises PrepareError when no class is found.
    """
    if "discover" in writer.stages:
        return
    store = PatchStore(writer.path, allow_building=True)
    scans = load_scans(store, embedding=store.scans.embedding)
    with progress.stage("discover", config.classes, "classes") as advance:
        folder = catalogue.placing_folder
        placing = Placing(client, writer.path, scans, config, folder, progress, advance)
        found = discover(scans, config, find=placing.match, advance=advance)
        if not found.classes:
            raise PrepareError(
                f"no class found in {len(scans)} scans: no position lies inside enough scans with a"
                f" crop of {config.shape} voxels at {config.spacing_mm} mm and enough of the body;"
                f" delete {writer.path} and try smaller crops, other tissue limits or a lower"
                " min_score"
            )
        for name, values in class_tables(found.classes, config).items():
            writer.write_table(f"classes/{name}", values)
        for split in SPLITS:
            rows = row_tables(found.classes, scans, config, split)
            for name, values in rows.items():
                writer.write_table(f"{split}/{name}", values)
            writer.create_sharded(
                f"{split}/patch",
                shape=(len(rows["label"]), *config.shape),
                dtype="int16",
                rows_per_shard=config.rows_per_shard,
            )
    writer.finish_stage("discover", found.to_facts())


@dataclass(slots=True)
class Discovery:
    """The classes found, and what was discarded on the way."""

    classes: list[ClassPlan] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    """Scans that are no members although they were tried for one of the classes, by reason."""
    redrawn: Counter[str] = field(default_factory=Counter)
    """Coordinates that were placed but did not become a class, by reason."""

    def to_facts(self) -> dict[str, Any]:
        """As the store's attribute has them."""
        counts = {"rejected": self.rejected, "redrawn": self.redrawn}
        return {
            "classes": len(self.classes),
            **{name: dict(sorted(count.items())) for name, count in counts.items()},
        }


def discover(
    scans: Scans,
    config: PrepareConfig,
    *,
    find: Find | None = None,
    advance: Advance = lambda _: None,
) -> Discovery:
    """Find up to `config.classes` classes.

    Fewer when a full round over the references adds none (`place = "frame"`), or when as many
    drafts in a row fail as there are training scans, and at least 50 (`place = "match"`).

    References are drawn without replacement; when all were used, a new round begins, so that
    several coordinates of one reference may become classes. `advance` counts classes; `find` is
    needed for `place = "match"`.
    """
    search = _Search(scans, config, advance)
    if config.place == "frame":
        search.place_all_by_frame()
    else:
        assert find is not None
        search.place_all_by_match(find)
    return search.found


class _Search:
    """Draws coordinates of references, finds their members, and keeps those that make a class."""

    def __init__(self, scans: Scans, config: PrepareConfig, advance: Advance) -> None:
        self.scans, self.config, self.advance = scans, config, advance
        self.geometry = Geometry(scans, config)
        self.large_enough = self.geometry.is_large_enough()
        self.taken = TakenPlaces(self.geometry)
        self.train, validation = (np.flatnonzero(scans.split == number) for number in (0, 1))
        self.most = most_members(config, scans.split)
        self.least = min_members(config, scans.split)
        self.index = Neighbours(scans.embedding, self.train, config.index)
        self.validation_index = Neighbours(scans.embedding, validation, config.index)
        self.found = Discovery()
        self._content = lru_cache(_CACHED_SCANS)(self._find_body)

    @property
    def missing(self) -> int:
        """Number of classes that are still wanted."""
        return self.config.classes - len(self.found.classes)

    def drafts(self, reference: int, turn: int) -> Iterator[Draft]:
        """Random coordinates of a reference that show enough of the body and are not taken."""
        rng = np.random.default_rng([self.config.seed, COORDINATE, turn, reference])
        geometry = self.geometry
        for _ in range(self.config.tries):
            centre = geometry.draw_centre(reference, rng)
            if centre is None:
                return
            place_mm = geometry.centre_mm(centre, reference)
            if self.taken.are_too_close(np.array([reference]), place_mm[None]):
                continue
            shown = self._content(reference).of_crop(place_mm, geometry.step_mm[reference])
            if shown.is_enough(self.config):
                yield Draft(reference, centre, place_mm, shown.body)

    def _find_body(self, scan: int) -> ContentOfScan:
        return ContentOfScan(self.scans.thumbnail(scan), self.scans.frame_mm[scan], self.config)

    def _references(self, turn: int) -> list[int]:
        """The training scans in the random order of a round."""
        rng = np.random.default_rng([self.config.seed, REFERENCES, turn])
        return list(rng.permutation(self.train).tolist())

    # The same coordinate in every scan

    def place_all_by_frame(self) -> None:
        """Find classes until a round over the references adds none."""
        for turn in itertools.count():
            before = len(self.found.classes)
            for reference in self._references(turn):
                if not self.missing:
                    return
                self.place_by_frame(self.drafts(reference, turn))
            if len(self.found.classes) == before:
                return

    def place_by_frame(self, drafts: Iterator[Draft]) -> None:
        """Keep the first draft of a reference that makes a class."""
        for draft in drafts:
            places = self.geometry.centre_mm(draft.centre)
            eligible = self.geometry.fits(places)
            train = self._nearest(draft, self.index, self.most.train, eligible, places)
            if len(train) < self.least:
                continue
            validation = self._nearest(
                draft, self.validation_index, self.most.validation, eligible, places
            )
            if self._add(draft, train, validation):
                return

    def _nearest(
        self,
        draft: Draft,
        index: Neighbours,
        most: int,
        eligible: NDArray[np.bool_],
        places: Floats,
    ) -> PlannedMembers:
        """The nearest scans of an index, `most` of those `eligible` (N,), at `places` (N, 3) mm."""
        scans, distance = index.nearest(draft.reference, most, eligible)
        unknown = np.full(len(scans), np.nan, np.float32)
        return PlannedMembers(
            scans=scans, distance=distance, place_mm=places[scans], score=unknown, cycle_mm=unknown
        )

    # The same anatomy in every scan

    def place_all_by_match(self, find: Find) -> None:
        """Find classes until many drafts in a row fail."""
        rounds = ((row, turn) for turn in itertools.count() for row in self._references(turn))
        failures = 0
        while self.missing and failures < max(_FAILURES, len(self.train)):
            fitting = max(_MIN_DRAFTS, len(self.train) // _SCANS_PER_DRAFT)
            num = min(_DRAFTS, 2 * self.missing, fitting)
            before = len(self.found.classes)
            some = [self.drafts(*one) for one in itertools.islice(rounds, num)]
            self.place_by_match([d for one in some for d in itertools.islice(one, 1)], find)
            failures = failures + num if len(self.found.classes) == before else 0

    def place_by_match(self, drafts: Sequence[Draft], find: Find) -> None:
        """Keep the drafts that make a class, in order."""
        walks = [self._walk(draft) for draft in drafts]
        self._match(drafts, walks, find)
        kept = []
        for draft, walk in zip(drafts, walks, strict=True):
            if walk.overlaps:
                self.found.redrawn["overlap"] += 1
            elif walk.num_found < self.least:
                self.found.redrawn["too few members"] += 1
            else:
                kept.append((draft, walk))
        validation_walks = [self._validation_walk(draft, walk) for draft, walk in kept]
        self._match([draft for draft, _ in kept], validation_walks, find)
        for (draft, walk), validation in zip(kept, validation_walks, strict=True):
            if not self.missing:
                return
            if self._add(draft, walk.members(), validation.members()):
                self.found.rejected += walk.rejected + validation.rejected
            else:
                self.found.redrawn["overlap"] += 1

    def _walk(self, draft: Draft) -> _Walk:
        """The training scans to try: those most similar to the reference."""
        num = math.ceil(
            min(
                self.config.candidates_per_member * self.most.train,
                self.config.max_member_share * len(self.train),
            )
        )
        scans, distances = self.index.nearest(draft.reference, max(2, num), self.large_enough)
        return _Walk(draft, scans, distances, self.most.train, self.least)

    def _validation_walk(self, draft: Draft, train: _Walk) -> _Walk:
        """The validation scans to try: none is less similar than the last training scan."""
        most = self.most.validation
        num = math.ceil(self.config.candidates_per_member * most)
        found = self.validation_index.nearest(draft.reference, num, self.large_enough)
        scans, distances = (column[found[1] <= train.distances[-1]] for column in found)
        return _Walk(draft, scans, distances, most, 0)

    def _match(self, drafts: Sequence[Draft], walks: Sequence[_Walk], find: Find) -> None:
        """Match each draft in the scans of its walk, until it has its members or no more scans."""
        while True:
            waves = [walk.next_wave() for walk in walks]
            if not any(map(len, waves)):
                return
            for walk, wave, found in zip(walks, waves, find(drafts, waves), strict=True):
                if not len(wave):
                    continue
                walk.add(wave, found, self._problems(wave, found))
                members = walk.members()
                walk.overlaps = self.taken.are_too_close(members.scans, members.place_mm)

    def _problems(self, scans: NDArray[np.intp], found: Found) -> list[str | None]:
        """Why each scan is no member; None where it is one."""
        rules = {
            "no overlap": np.isnan(found.score),
            "weak match": ~(found.score >= self.config.min_score),
            "did not lead back": ~(found.cycle_mm <= self.config.max_cycle_mm),
            "crop does not fit": ~self.geometry.fits(found.place_mm, scans),
        }
        return [
            next((name for name, broken in rules.items() if broken[number]), None)
            for number in range(len(scans))
        ]

    def _add(self, draft: Draft, train: PlannedMembers, validation: PlannedMembers) -> bool:
        """Keep a class, unless it is too close to another one in some scan."""
        scans = np.concatenate([train.scans, validation.scans])
        place_mm = np.concatenate([train.place_mm, validation.place_mm])
        if self.taken.are_too_close(scans, place_mm):
            return False
        self.taken.add(scans, place_mm)
        self.found.classes.append(
            ClassPlan(
                reference=draft.reference,
                centre=draft.centre,
                body_share=draft.body_share,
                train=train,
                validation=validation,
            )
        )
        _log.debug("class %d: %d members", len(self.found.classes) - 1, len(scans))
        self.advance(1)
        return True


class _Walk:
    """One draft's way through its nearest scans; the reference is its own first member."""

    def __init__(
        self,
        draft: Draft,
        scans: NDArray[np.intp],
        distances: NDArray[np.float32],
        most: int,
        least: int,
    ) -> None:
        is_other = scans != draft.reference
        self.scans, self.distances = scans[is_other], distances[is_other]
        self.most, self.least = most, least
        self.tried, self.overlaps = 0, False
        self.rejected: Counter[str] = Counter()
        own = not is_other.all()
        self._members: list[tuple[int, float, Floats, float, float]] = (
            [(draft.reference, 0.0, draft.place_mm, 1.0, 0.0)] if own else []
        )

    @property
    def num_found(self) -> int:
        return len(self._members)

    def next_wave(self) -> NDArray[np.intp]:
        """The scans to try next; empty when the walk is over, or cannot end with a class."""
        missing, left = self.most - self.num_found, len(self.scans) - self.tried
        hopeless = self.tried > 0 and self.num_found < min(2, self.least)
        too_few = hopeless or self.num_found + left < self.least
        if missing <= 0 or self.overlaps or too_few:
            return np.empty(0, np.intp)
        stop = self.tried + (max(_WAVE, missing + missing // 4) if self.tried else _FIRST_WAVE)
        return np.asarray(self.scans[self.tried : stop])

    def add(self, scans: NDArray[np.intp], found: Found, problems: Sequence[str | None]) -> None:
        """Take the members among the scans of a wave, in order, up to the wanted number."""
        for number, (scan, problem) in enumerate(zip(scans.tolist(), problems, strict=True)):
            if self.num_found == self.most:
                return
            distance = float(self.distances[self.tried])
            self.tried += 1
            if problem is not None:
                self.rejected[problem] += 1
                continue
            score, cycle = float(found.score[number]), float(found.cycle_mm[number])
            self._members.append((scan, distance, found.place_mm[number], score, cycle))

    def members(self) -> PlannedMembers:
        columns = [list(column) for column in zip(*self._members, strict=True)] or [[]] * 5
        scans, distance, place_mm, score, cycle_mm = columns
        return PlannedMembers(
            scans=np.array(scans, np.intp),
            distance=np.array(distance, np.float32),
            place_mm=np.array(place_mm, np.float64).reshape(-1, 3),
            score=np.array(score, np.float32),
            cycle_mm=np.array(cycle_mm, np.float32),
        )


def check_crops_fit(store: PatchStore, config: PrepareConfig) -> None:
    """PrepareError when the surveyed scans are too few or too small for any class.

    Needs no embeddings, so it is checked before the autoencoder is trained.
    """
    scans = load_scans(store)
    geometry = Geometry(scans, config)
    train = np.flatnonzero(scans.split == 0)
    least = min_members(config, scans.split)
    if len(train) < least:
        raise PrepareError(
            f"{store.path}: {len(train)} of {len(scans)} scans are for training, and a class"
            f" needs {least}; delete the store, then add scans of other patients, or use fewer for"
            " validation (validation_fraction)"
        )
    fits = train[geometry.is_large_enough()[train]]
    rng = np.random.default_rng(0)
    if len(fits) < least or all(geometry.draw_centre(row, rng) is None for row in fits.tolist()):
        needed_mm = 2 * geometry.full_reach * geometry.step_mm[train]
        size_mm = np.median(needed_mm, axis=0)
        scan_mm = np.median(geometry.last_mm[train], axis=0)
        border = " and border" if any(config.border) else ""
        border_setting = ", border" if border else ""
        raise PrepareError(
            f"{store.path}: crops are too large: crop with its larger scales{border}"
            f" {_mm(size_mm)}, scan {_mm(scan_mm)} (z, y, x; medians). They fit in {len(fits)} of"
            f" {len(train)} training scans, and a class needs {least}. Delete the"
            f" store, then set a smaller shape, spacing_mm, side_steps{border_setting} or"
            " shift_steps, or scales = 1"
        )


def _mm(size: NDArray[np.float64]) -> str:
    return " x ".join(f"{length:.0f}" for length in size) + " mm"
