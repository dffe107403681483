"""Quality of the discovered classes, as numbers.

Similarity of two crops: their local normalised cross-correlation. Each base crop is averaged over
cells of 8 x 8 x 8 voxels. In windows of 4 x 4 x 4 cells, the mean is subtracted and the result is
normalised; the products of two crops are averaged over all windows. The similarity is 1 for equal
anatomy and 0 for unrelated anatomy, at any brightness; windows without structure count little. A
cell is about as large as the misplacement of anatomy in a good class (benchmarks/RESULTS.md).

Consistency of a class: the probability that two of its members are more similar than a member and a
crop of another class in another patient (1 is perfect, 0.5 is chance). This null distribution is
drawn from at most 1024 crops of all classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from store.atomic import replace_file
from store.format import SPLITS
from store.matches import describe_matching
from store.progress import SILENT, Advance, Progress
from store.reader import PatchStore, Split

CELL: Final = 8
"""Voxels along each axis of a cell."""
WINDOW: Final = 4
"""Cells along each axis of a window."""
QUIET_HU: Final = 20.0
"""Standard deviation in HU at which a window has half its weight."""
NULL_CROPS: Final = 1024
OUTLIER: Final = 0.95
"""Quantile of the null; a member that is less similar to its class is an outlier."""
TISSUES: Final = {
    "air": (-32768, -950),
    "lung": (-950, -500),
    "fat": (-150, -30),
    "soft": (-30, 130),
    "bone": (200, 32767),
}
"""HU ranges; a voxel between two ranges counts for none."""
MIXED_BELOW: Final = 0.8
"""Consistency below which the members of a class may show different anatomy."""
GRADES: Final = {"good": 0.9, "fair": MIXED_BELOW, "mixed": 0.0}
"""Consistency in words, and the least of each."""
_VERSION = 4

Features = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Quality of one class. Shares are from 0 to 1; distances are L2 distances of embeddings."""

    label: int
    members: int
    validation_members: int
    patients: int
    consistency: float
    """Probability that two members are more similar than a member and a crop of another class."""
    similarity: float
    """Mean similarity of two members."""
    null_similarity: float
    """Mean similarity of a member and a crop of another class."""
    outliers: tuple[int, ...]
    """Scan rows of the members that are not similar to the others."""
    median_distance: float
    distance_spread: float
    """Interquartile range of the members' distance to the reference."""
    overlap: float
    """Largest mean share of a base crop that one other class covers in the same scans."""
    overlap_class: int
    """That class; -1 for none."""
    tissue: dict[str, float]
    """Share of voxels by name of `TISSUES`."""
    body_share: float | None
    """Share of the reference's base crop that is body; None in a store of format 1."""
    median_score: float | None
    """Median match score of the members, without the reference; None if none was matched."""
    weak_members: int | None
    """Members whose match only just passed; None if members were not matched."""

    @property
    def grade(self) -> str:
        """The consistency as a word of `GRADES`."""
        return next(word for word, least in GRADES.items() if self.consistency >= least)

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts classes, the best first: by grade, then by consistency times the share of body.

        The edge of the skin looks alike in everybody, so consistency alone would put it first.
        """
        share = 1.0 if self.body_share is None else self.body_share
        return list(GRADES).index(self.grade), -self.consistency * share, self.label


def assess(store: PatchStore, *, progress: Progress = SILENT) -> list[Quality]:
    """The quality of every class, in order; each base crop is read once or twice.

    Memory is bounded by one class's members and the null's crops.
    """
    with progress.stage("quality", _count_crops(store), "crops") as advance:
        return _assess(store, advance)


def _assess(store: PatchStore, advance: Advance) -> list[Quality]:
    null, null_label, null_patient = _draw_null(store, advance)
    overlap, overlap_class = _overlap(store)
    found = []
    for label in range(store.num_classes):
        features, scans, tissue = _read_class(store, label, advance)
        patient = store.scans.patient[scans]
        alike = features @ features.T
        pairs = alike[np.triu(patient[:, None] != patient, 1)]
        other = null_label != label
        beyond = (features @ null[other].T)[patient[:, None] != null_patient[other]]
        distance = store.classes.distance[label][store.classes.neighbour[label] >= 0]
        quarters = np.quantile(distance, [0.25, 0.5, 0.75]) if len(distance) else np.zeros(3)
        found.append(
            Quality(
                label=label,
                members=int((store.classes.neighbour[label] >= 0).sum()),
                validation_members=int((store.classes.validation_neighbour[label] >= 0).sum()),
                patients=len(np.unique(patient)),
                consistency=share_above(pairs, beyond),
                similarity=float(pairs.mean()) if len(pairs) else 0.0,
                null_similarity=float(beyond.mean()) if len(beyond) else 0.0,
                outliers=_outliers(alike, features, null[other], scans),
                median_distance=float(quarters[1]),
                distance_spread=float(quarters[2] - quarters[0]),
                overlap=float(overlap[label]),
                overlap_class=int(overlap_class[label]),
                tissue=tissue,
                **dataclasses.asdict(describe_matching(store, label)),
            )
        )
    return found


def load_quality(store: PatchStore, *, progress: Progress = SILENT) -> list[Quality]:
    """`assess`, with the result cached where that can be written.

    In STORE.quality.json; for a URL, in the cache on disk.
    """
    file = store.location.kept("quality.json", store.fingerprint)
    if file is None:
        return assess(store, progress=progress)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(file.read_text())
        if (content["version"], content["fingerprint"]) == (_VERSION, store.fingerprint):
            return [Quality(**{**q, "outliers": tuple(q["outliers"])}) for q in content["classes"]]
    found = assess(store, progress=progress)
    content = {
        "version": _VERSION,
        "fingerprint": store.fingerprint,
        "classes": [dataclasses.asdict(quality) for quality in found],
    }
    with contextlib.suppress(OSError), replace_file(file, shared=True) as partial:
        partial.write_text(json.dumps(content))  # not possible beside a read-only store
    return found


def describe_crops(crops: NDArray[np.int16]) -> Features:
    """(n, Z, Y, X) HU -> (n, cells): the product of two rows is the similarity of the crops."""
    num = len(crops)
    values = np.clip(crops, -1000, 1000).astype(np.float32)
    cells = _blocks(values, min(CELL, *crops.shape[1:])).mean(axis=-1)  # (n, z, y, x)
    windows = _blocks(cells, min(WINDOW, *cells.shape[1:]))  # (n, z, y, x, cells of a window)
    windows = windows - windows.mean(axis=-1, keepdims=True)
    energy = np.square(windows).mean(axis=-1, keepdims=True) + QUIET_HU**2
    windows /= np.sqrt(energy * windows.shape[-1] * np.prod(windows.shape[1:4]))
    features: Features = windows.reshape(num, -1)
    return features


def _blocks(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(n, Z, Y, X) -> (n, Z // side, Y // side, X // side, side^3); the rest is cut off."""
    z, y, x = (length // side for length in values.shape[1:])
    cut = values[:, : z * side, : y * side, : x * side]
    parts = cut.reshape(len(values), z, side, y, side, x, side).transpose(0, 1, 3, 5, 2, 4, 6)
    return parts.reshape(len(values), z, y, x, side**3)


def share_above(pairs: Features, null: Features) -> float:
    """Probability that one of `pairs` is larger than one of `null`; 0.5 where one is empty."""
    if not (len(pairs) and len(null)):
        return 0.5
    ordered = np.sort(null)
    below, up_to = (np.searchsorted(ordered, pairs, side) for side in ("left", "right"))
    larger = (int(below.sum()) + int(up_to.sum())) / 2  # equal ones count half
    return larger / len(pairs) / len(null)


def _outliers(
    alike: Features, features: Features, null: Features, scans: NDArray[np.int32]
) -> tuple[int, ...]:
    """Scans whose crop is less similar to the class than the most similar 5 % of the null."""
    num = len(alike)
    if num < 3 or not len(null):
        return ()
    to_others = (alike.sum(1) - alike.diagonal()) / (num - 1)
    limit = np.quantile(null @ features.mean(0), OUTLIER)
    return tuple(sorted({int(scan) for scan in scans[to_others < limit]}))


def _read_class(
    store: PatchStore, label: int, advance: Advance
) -> tuple[Features, NDArray[np.int32], dict[str, float]]:
    """Features of a class's base crops of both splits, their scans, and their tissue."""
    features, scans = [], []
    counts, voxels = dict.fromkeys(TISSUES, 0), 0
    for name in SPLITS:
        split = store.split(name)
        rows = np.flatnonzero((split.label == label) & (split.scale == 0))
        scans.append(split.scan[rows])
        for crops in _read(split, rows, advance):
            features.append(describe_crops(crops))
            voxels += crops.size
            for tissue, (low, high) in TISSUES.items():
                counts[tissue] += int(((crops >= low) & (crops < high)).sum())
    return (
        np.concatenate(features),
        np.concatenate(scans),
        {tissue: count / max(voxels, 1) for tissue, count in counts.items()},
    )


def _draw_null(
    store: PatchStore, advance: Advance
) -> tuple[Features, NDArray[np.int32], NDArray[np.int32]]:
    """Features, class and patient of train crops spread evenly over the store."""
    split = store.train
    rows = np.flatnonzero(split.scale == 0)
    if len(rows) > NULL_CROPS:
        rows = rows[np.arange(NULL_CROPS) * len(rows) // NULL_CROPS]
    features = np.concatenate([describe_crops(crops) for crops in _read(split, rows, advance)])
    return features, split.label[rows], store.scans.patient[split.scan[rows]]


def _read(split: Split, rows: NDArray[np.intp], advance: Advance) -> Iterator[NDArray[np.int16]]:
    for crops in split.read_batches(rows):
        yield crops
        advance(len(crops))


def _count_crops(store: PatchStore) -> int:
    """Crops that `assess` reads."""
    base = {name: int((store.split(name).scale == 0).sum()) for name in SPLITS}
    return sum(base.values()) + min(base["train"], NULL_CROPS)


def _overlap(store: PatchStore) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """(classes,) largest mean share of a base crop that another class covers, and that class."""
    num = store.num_classes
    shared, together = np.zeros((num, num)), np.zeros((num, num))
    for name in SPLITS:
        split = store.split(name)
        base = np.flatnonzero(split.scale == 0)
        base = base[np.argsort(split.scan[base], kind="stable")]
        for rows in np.split(base, np.flatnonzero(np.diff(split.scan[base])) + 1):
            low, size = split.origin_mm[rows], split.extent_mm[rows]
            high = low + size
            common = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
            share = common.clip(0).prod(-1) / size.prod(-1)[:, None]
            cells = np.ix_(split.label[rows], split.label[rows])
            shared[cells] += share
            together[cells] += 1
    mean = np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
    np.fill_diagonal(mean, -1)
    most = mean.max(1, initial=0.0)
    return most, np.where(most > 0, mean.argmax(1), -1) if num > 1 else np.full(num, -1)


def as_row(quality: Quality) -> dict[str, Any]:
    """One flat row for tables: outliers as a count, tissue as a column each."""
    row = dataclasses.asdict(quality)
    tissue = row.pop("tissue")
    row["outliers"] = len(quality.outliers)
    row["grade"] = quality.grade
    return row | {f"tissue_{name}": round(share, 4) for name, share in tissue.items()}
