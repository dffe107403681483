"""Self-discovery: classes, their members and every row of the store, before a crop is cut.

The paper's section 2.1: a random reference scan, its nearest neighbours, one random but fixed
coordinate; the coordinate is the pseudo-label. Ours in addition: a member must hold the whole
crop, and no scan holds two classes' base crops that overlap more than the settings allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import PrepareConfig
from pipeline.neighbours import Neighbours
from store.errors import SemgenError

_REFERENCES, _COORDINATE, _SCALES, _PERSONS = 1, 2, 3, 4
"""Roles of random draws: a generator is keyed by (seed, role, index)."""

_ROUNDING_MM = 1e-7
_MEND = "mend it, delete the store, and prepare again"

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scans:
    """What discovery knows of N scans; z, y, x. `split` is 0 train, 1 validation."""

    split: NDArray[np.uint8]
    spacing_mm: Floats
    size: NDArray[np.int32]
    frame_mm: Floats
    embedding: NDArray[np.float32]
    thumbnail: Callable[[int], NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPlan:
    """One class: its reference, its centre in frame units, its members nearest first."""

    reference: int
    centre: Floats
    neighbour: NDArray[np.intp]
    distance: NDArray[np.float32]
    validation_neighbour: NDArray[np.intp]
    validation_distance: NDArray[np.float32]

    @property
    def members(self) -> NDArray[np.intp]:
        return np.concatenate([self.neighbour, self.validation_neighbour])


def crop_step_mm(config: PrepareConfig, spacing_mm: Floats) -> Floats:
    """(..., 3) voxel spacing of the base crop in scans of the given spacing (..., 3)."""
    if config.spacing_mm == "native":
        return spacing_mm
    return np.broadcast_to(np.asarray(config.spacing_mm), spacing_mm.shape)


def least_members(config: PrepareConfig, num_train: int) -> int:
    """Training scans that a class needs, its reference included, of `num_train`."""
    return max(2, round(config.min_member_share * min(config.neighbours, num_train)))


class Geometry:
    """Where a class's crops lie in each scan."""

    def __init__(self, scans: Scans, config: PrepareConfig) -> None:
        self.config = config
        self.spacing_mm = scans.spacing_mm
        self.step_mm = crop_step_mm(config, scans.spacing_mm)  # (N, 3)
        self.extent_mm = self.step_mm * config.shape  # (N, 3), of the base crop
        self.last_mm = (scans.size - 1) * scans.spacing_mm  # (N, 3), the last voxels' centres
        if config.frame == "voxel":
            self.low_mm = np.zeros_like(self.spacing_mm)
            self.unit_mm = self.spacing_mm
        else:
            self.low_mm = scans.frame_mm[:, 0]
            self.unit_mm = scans.frame_mm[:, 1] - scans.frame_mm[:, 0]
        self._least_unit = (self.unit_mm / self.extent_mm).min(axis=0)  # in crop sides
        # half of what the samples span, of the base crop and of the largest drawn one
        sides = np.asarray(config.shape, np.float64)
        self.base_reach = 0.5 * (sides - 1)
        largest = np.where([False, True, True], config.side_steps[1] - 1, sides)
        shift = max(abs(config.shift_steps[0]), abs(config.shift_steps[1] - 1))
        drawn = 0.5 * largest * (sides - 1) / sides + np.array([0, shift, shift])
        self.full_reach: Floats = self.base_reach
        if config.scales > 1:
            self.full_reach = np.maximum(self.base_reach, drawn)

    def centre_mm(self, centre: Floats, scans: Any = slice(None)) -> Floats:
        """(..., 3) the place of one coordinate in every scan, or in those given."""
        place: Floats = self.low_mm[scans] + centre * self.unit_mm[scans]
        return place

    def eligible(self, centre: Floats, split: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """(N,) scans that hold the base crop, and for training the drawn ones, entirely."""
        reach = np.where(split[:, None] == 0, self.full_reach, self.base_reach) * self.step_mm
        place = self.centre_mm(centre)
        inside = (place - reach >= -_ROUNDING_MM) & (place + reach <= self.last_mm + _ROUNDING_MM)
        return np.asarray(inside.all(axis=1))

    def draw_centre(self, reference: int, rng: np.random.Generator) -> Floats | None:
        """A random coordinate whose crops the reference holds, or None where it holds none."""
        border = np.asarray(self.config.border) * self.spacing_mm[reference]
        reach = np.maximum(
            self.full_reach * self.step_mm[reference],
            self.extent_mm[reference] / 2 + border - self.spacing_mm[reference] / 2,
        )
        low, high = reach, self.last_mm[reference] - reach
        if self.config.frame != "voxel":
            low = np.maximum(low, self.low_mm[reference])
            high = np.minimum(high, self.low_mm[reference] + self.unit_mm[reference])
        if (low > high).any():
            return None
        least = (low - self.low_mm[reference]) / self.unit_mm[reference]
        most = (high - self.low_mm[reference]) / self.unit_mm[reference]
        if self.config.frame == "voxel":
            # whole voxels for the first corner: at native spacing nothing is interpolated
            half = 0.5 * (np.asarray(self.config.shape) - 1)
            first = np.ceil(least - half).astype(int)
            last = np.floor(most - half).astype(int)
            if (first > last).any():
                return None
            return np.asarray(rng.integers(first, last + 1) + half, np.float64)
        return np.asarray(rng.uniform(least, most))

    def clash(self, one: ClassPlan, other: ClassPlan) -> bool:
        """Whether some scan would hold base crops of both classes too close to each other."""
        # most pairs are too far apart in any scan, which is quick to see
        least = np.abs(one.centre - other.centre) * self._least_unit
        if (least >= max(1.0, self.config.separation_steps / min(self.config.shape))).any():
            return False
        shared = np.intersect1d(one.members, other.members)
        apart = np.abs((one.centre - other.centre) * self.unit_mm[shared])
        overlap = np.clip(1 - apart / self.extent_mm[shared], 0, 1).prod(axis=1)
        steps = (apart / self.step_mm[shared]).max(axis=1)
        return bool(
            ((overlap > self.config.max_overlap) | (steps < self.config.separation_steps)).any()
        )


def has_content(
    thumbnail: NDArray[np.uint8],
    box: Floats,
    place: Floats,
    step_mm: Floats,
    config: PrepareConfig,
) -> bool:
    """Whether a base crop holds enough, and the wanted share of tissue.

    thumbnail, box
        The scan's, (Z, Y, X) and the (2, 3) corners in mm that it spans.
    place, step_mm
        Centre and step of the crop in mm.

    Judged on the thumbnail, sampled at the crop's own grid (nearest), with `tissue_depth - 1`
    more slices towards the head. What lies in front of, behind or beside the box is neither
    content nor tissue; along z the box is the scan, whose last slice is repeated.
    """
    depth = config.tissue_depth
    index, inside = [], []
    for axis, num in enumerate(config.shape):
        # in-plane every other sample: the thumbnail is coarser than that
        sample = np.arange(0, num + (depth - 1 if axis == 0 else 0), 1 if axis == 0 else 2)
        mm = place[axis] + (sample - 0.5 * (num - 1)) * step_mm[axis]
        share = (mm - box[0, axis]) / (box[1, axis] - box[0, axis])
        n = thumbnail.shape[axis]
        index.append(np.clip(np.floor(share * n).astype(int), 0, n - 1))
        inside.append((share >= 0) & (share <= 1))
    low, high = config.window_hu
    hu = thumbnail[np.ix_(*index)] * ((high - low) / 255) + low
    in_box = inside[1][:, None] & inside[2]  # (Y, X)
    tissue = in_box & (hu >= config.tissue_hu)
    num = config.shape[0]
    tissue = np.logical_or.reduce([tissue[d : d + num] for d in range(depth)])
    content = (in_box & (hu >= config.air_hu))[:num].mean()
    return bool(
        config.min_tissue <= tissue.mean() <= config.max_tissue and content >= config.min_content
    )


def discover(
    scans: Scans, config: PrepareConfig, *, progress: Callable[[int], None] = lambda _: None
) -> list[ClassPlan]:
    """Find up to `config.classes` classes; fewer when a whole round over the references adds none.

    References are drawn without replacement; when all were used, a new round begins, so that
    several coordinates of one reference may become classes.
    """
    geometry = Geometry(scans, config)
    train = np.flatnonzero(scans.split == 0)
    index = Neighbours(scans.embedding, train, config.index)
    validation_index = Neighbours(scans.embedding, np.flatnonzero(scans.split == 1), config.index)
    least = least_members(config, len(train))
    classes: list[ClassPlan] = []
    turn = 0
    while len(classes) < config.classes:
        before = len(classes)
        order = np.random.default_rng([config.seed, _REFERENCES, turn]).permutation(train)
        for reference in order:
            rng = np.random.default_rng([config.seed, _COORDINATE, turn, int(reference)])
            thumbnail = scans.thumbnail(int(reference))
            for _ in range(config.tries):
                centre = geometry.draw_centre(int(reference), rng)
                if centre is None:
                    break
                if not has_content(
                    thumbnail,
                    scans.frame_mm[reference],
                    geometry.centre_mm(centre, reference),
                    geometry.step_mm[reference],
                    config,
                ):
                    continue
                eligible = geometry.eligible(centre, scans.split)
                neighbour, distance = index.nearest(int(reference), config.neighbours, eligible)
                if len(neighbour) < least:
                    continue
                validation = validation_index.nearest(
                    int(reference), config.validation_neighbours, eligible
                )
                found = ClassPlan(
                    reference=int(reference),
                    centre=centre,
                    neighbour=neighbour,
                    distance=distance,
                    validation_neighbour=validation[0],
                    validation_distance=validation[1],
                )
                if any(geometry.clash(found, other) for other in classes):
                    continue
                classes.append(found)
                progress(1)
                break
            if len(classes) == config.classes:
                break
        if len(classes) == before:
            break
        turn += 1
    return classes


def class_tables(classes: list[ClassPlan], config: PrepareConfig) -> dict[str, NDArray[Any]]:
    """The tables of group `classes`."""

    def pad(values: list[NDArray[Any]], width: int, fill: float, dtype: str) -> NDArray[Any]:
        table = np.full((len(values), width), fill, dtype)
        for row, line in zip(table, values, strict=True):
            row[: len(line)] = line
        return table

    k, validation_k = config.neighbours, config.validation_neighbours
    return {
        "reference": np.array([c.reference for c in classes], np.int32),
        "centre": np.array([c.centre for c in classes], np.float64),
        "neighbour": pad([c.neighbour for c in classes], k, -1, "int32"),
        "distance": pad([c.distance for c in classes], k, np.nan, "float32"),
        "validation_neighbour": pad(
            [c.validation_neighbour for c in classes], validation_k, -1, "int32"
        ),
        "validation_distance": pad(
            [c.validation_distance for c in classes], validation_k, np.nan, "float32"
        ),
    }


def row_tables(
    classes: list[ClassPlan], scans: Scans, config: PrepareConfig, split: int
) -> dict[str, NDArray[Any]]:
    """The tables of group `train` (0) or `validation` (1), rows in order of scan, class, scale.

    Rows of one scan are neighbours, so that a scan is opened once for all its crops.
    """
    geometry = Geometry(scans, config)
    num_scales = config.scales if split == 0 else 1
    label, scan, scale, origin, extent = [], [], [], [], []
    for number, found in enumerate(classes):
        members = found.neighbour if split == 0 else found.validation_neighbour
        rng = np.random.default_rng([config.seed, _SCALES, number])
        side = rng.integers(*config.side_steps, size=(len(members), 2))
        shift = rng.integers(*config.shift_steps, size=(len(members), 2, 2))
        centre = geometry.centre_mm(found.centre, members)
        step = geometry.step_mm[members]
        for level in range(num_scales):
            size, place = geometry.extent_mm[members].copy(), centre.copy()
            if level:
                size[:, 1:] = side[:, level - 1, None] * step[:, 1:]
                place[:, 1:] += shift[:, level - 1] * step[:, 1:]
            label.append(np.full(len(members), number, np.int32))
            scan.append(members.astype(np.int32))
            scale.append(np.full(len(members), level, np.uint8))
            origin.append(place - size / 2)
            extent.append(size)
    assert label  # there is always a class
    tables: dict[str, NDArray[Any]] = {
        "label": np.concatenate(label),
        "scan": np.concatenate(scan),
        "scale": np.concatenate(scale),
        "origin_mm": np.concatenate(origin),
        "extent_mm": np.concatenate(extent),
    }
    order = np.lexsort((tables["scale"], tables["label"], tables["scan"]))
    return {name: values[order] for name, values in tables.items()}


def split_persons(
    *,
    scan: NDArray[np.integer[Any]],
    person: NDArray[Any],
    wanted_split: NDArray[np.integer[Any]],
    config: PrepareConfig,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Number the persons and choose those whose scans are for validation.

    scan, person, wanted_split
        (M,) claims: the row of a scan, an opaque word for a person whose it is said to be, and 0
        or 1 where the scan is said to be for a split, else -1. Every one of N scans has one claim
        at least. Those who hold the same scan are one person, and so on through others' scans.

    Returns (N,) `patient` and `split`. Persons are numbered by their first scan, so that no
    header shapes the numbers. At least one person is left for training. Raises SemgenError
    when a person is wanted in both splits, or everyone in one for validation.
    """
    num_scans = int(scan.max()) + 1
    words, word = np.unique(person, return_inverse=True)
    size = num_scans + len(words)
    held = coo_array((np.ones(len(scan), bool), (scan, num_scans + word)), shape=(size, size))
    _, group = connected_components(held, directed=False)
    first: dict[int, int] = {}
    patient = np.array(
        [first.setdefault(g, len(first)) for g in group[:num_scans].tolist()], np.int32
    )
    in_train, in_validation = (
        np.isin(np.arange(len(first)), patient[scan[wanted_split == split]]) for split in (0, 1)
    )
    if (in_train & in_validation).any():
        raise SemgenError(
            "the manifest wants one person in both splits, that is, scans of one PatientID or"
            " patient, or of several who hold the same scan (semgen inspect STORE --paths names"
            f" duplicates); persons concerned: {(in_train & in_validation).sum()}; {_MEND}"
        )
    if in_validation.all():
        raise SemgenError(f"the manifest leaves no person for training; {_MEND}")
    wanted = round(config.validation_fraction * len(first))
    if config.validation_fraction > 0:
        wanted = max(1, wanted)
    num_given = int(in_validation.sum())
    wanted = max(0, min(wanted - num_given, len(first) - num_given - 1))
    order = np.random.default_rng([config.seed, _PERSONS]).permutation(len(first))
    free = ~(in_train | in_validation)
    chosen = np.concatenate([order[free[order]][:wanted], np.flatnonzero(in_validation)])
    return patient, np.isin(patient, chosen).astype(np.uint8)
