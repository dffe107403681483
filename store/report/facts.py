"""What the page of classes shows, without pictures: values that its scripts read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.classes import Annotation
from store.format import SPLITS
from store.matches import find_weak, weak_limits
from store.quality import MIXED_BELOW, Quality
from store.reader import Members, PatchStore
from store.report.pictures import LEVELS, TILE
from store.report.regions import estimate_region
from store.report.sheets import (
    CARD_TILES,
    CHUNK,
    MAPPED_SCANS,
    SCAN_COLUMNS,
    choose_members,
    count_slices,
    volume_shape,
)
from store.scans import scan_name

Facts = dict[str, Any]


def describe_page(
    store: PatchStore,
    quality: Sequence[Quality],
    *,
    classes_per_sheet: int,
    live: bool = False,
    paths: Mapping[int, str] | None = None,
    rejected_files: Sequence[tuple[str, str, str]] | None = None,
) -> Facts:
    """All values of the page, without the annotation of classes: `add_notes` adds it.

    classes_per_sheet
        Cards on one sheet of pictures.
    live
        Whether a server sends the pictures and saves decisions.
    paths, rejected_files
        First file of each scan by row, and (first file, reason, detail) of rejected series: for the
        owner of the archive only, never for a page that is written to a file.
    """
    discovered = store.stages["discover"]
    return {
        "live": live,
        "fingerprint": store.fingerprint,
        "config": store.config,
        "rejected": store.stages["survey"]["rejected"],
        "notMembers": discovered.get("rejected", {}),
        "match": _describe_limits(store) if store.is_matched else None,
        "mixedBelow": MIXED_BELOW,
        "crops": {split: len(store.split(split)) for split in SPLITS},
        "shape": store.crop_shape,
        "volume": volume_shape(store),
        "chunk": CHUNK,
        "levels": LEVELS,
        "tile": TILE,
        "slices": count_slices(store),
        "cardTiles": CARD_TILES,
        "classesPerSheet": classes_per_sheet,
        "mappedScans": MAPPED_SCANS,
        "scanColumns": SCAN_COLUMNS,
        "scans": _describe_scans(store),
        "classes": [_describe_class(store, one, live=live) for one in quality],
        "paths": None if paths is None else dict(paths),
        "rejectedFiles": None if rejected_files is None else list(rejected_files),
    }


def add_notes(facts: Facts, annotation: Annotation) -> Facts:
    """The values with names, decisions and notes of the classes."""
    classes = [
        {**known, **asdict(annotation[label])} for label, known in enumerate(facts["classes"])
    ]
    return {**facts, "classes": classes}


def _describe_limits(store: PatchStore) -> dict[str, float]:
    """Limits of a member's match, and those beyond which it only just passed."""
    score, cycle_mm = weak_limits(store)
    return {
        "score": store.config["min_score"],
        "cycle": store.config["max_cycle_mm"],
        "weakScore": score,
        "weakCycle": cycle_mm,
    }


def _describe_scans(store: PatchStore) -> list[Facts]:
    scans = store.scans
    at = _project(scans.embedding)
    return [
        {
            "id": scan_name(scans.id[row]),
            "patient": int(scans.patient[row]),
            "split": SPLITS[int(scans.split[row])],
            "spacing": scans.spacing_mm[row].round(3).tolist(),
            "size": scans.size[row].tolist(),
            "frame": scans.frame_mm[row].round(1).ravel().tolist(),
            "at": at[row].round(4).tolist(),
            "region": _estimate_region(store, row),
        }
        for row in range(len(scans.id))
    ]


def _estimate_region(store: PatchStore, row: int) -> str:
    if row >= MAPPED_SCANS:
        return "not estimated"
    return estimate_region(store.thumbnails.read([row])[0], store.scans.frame_mm[row])


def _project(embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, 2) the first two principal components, each scaled to [0, 1]."""
    centred = embedding.astype(np.float64) - embedding.mean(0, dtype=np.float64)
    covariance = centred.T @ centred
    _, vectors = np.linalg.eigh(covariance)
    found = centred @ vectors[:, :-3:-1]
    found -= found.min(0)
    return np.asarray(found / np.maximum(found.max(0), 1e-12))


def _describe_class(store: PatchStore, quality: Quality, *, live: bool) -> Facts:
    label = quality.label
    by_split = [store.members(label, split) for split in SPLITS]
    columns: Facts = {
        "scan": np.concatenate([m.scans for m in by_split]).tolist(),
        "distance": _numbers(np.concatenate([m.distances for m in by_split]), 3),
        "place": np.concatenate([m.places for m in by_split]).round().astype(int).tolist(),
    }
    if store.is_matched:
        weak = np.concatenate([find_weak(store, label, m) for m in by_split])
        columns |= {
            "score": _numbers(np.concatenate([m.scores for m in by_split]), 3),
            "cycle": _numbers(np.concatenate([m.cycles for m in by_split]), 2),
            "weak": np.flatnonzero(weak).tolist(),
        }
    extent_mm = np.concatenate(
        [store.split(s).extent_mm[m.rows] for s, m in zip(SPLITS, by_split, strict=True)]
    )
    if not np.allclose(extent_mm, extent_mm[0]):  # with native spacing
        columns["extent"] = extent_mm.round(1).tolist()
    if live:
        columns["rows"] = [
            rows
            for split, members in zip(SPLITS, by_split, strict=True)
            for rows in _rows_by_scale(store, split, label, members)
        ]
        in_plane = store.train.extent_mm[:, 2]
        columns["zoom"] = [  # in-plane side of the other scales, over that of the base crop
            (in_plane[rows[1:]] / in_plane[rows[0]]).round(3).tolist()
            for rows in columns["rows"][: len(by_split[0].rows)]
        ]
    facts = {name: value for name, value in asdict(quality).items() if "members" not in name}
    order, worth, _ = quality.rank
    return {
        **facts,
        "grade": quality.grade,
        "rank": [order, worth],
        "weak_members": quality.weak_members,
        "num_train": quality.members,
        "num_validation": quality.validation_members,
        "members": columns,
        "shown": None if live else choose_members(store, label, quality.outliers),
        "reference": int(store.classes.reference[label]),
        "centre": store.classes.centre[label].round(3).tolist(),
        "extent": extent_mm[0].round(1).tolist(),
    }


def _rows_by_scale(store: PatchStore, split: str, label: int, members: Members) -> list[list[int]]:
    """The rows of each member's crops: base crop first, then the other scales that it has."""
    columns = [members.rows]
    scan = store.split(split).scan
    for scale in (1, 2):
        rows = store.rows(split, label, scale)
        if len(rows) == len(members.rows):  # rows are in order of their scans
            columns.append(rows[np.searchsorted(scan[rows], members.scans)])
    found: list[list[int]] = np.stack(columns, axis=1).tolist()
    return found


def _numbers(values: NDArray[np.floating], digits: int) -> list[float | None]:
    """Rounded; None for nan, which JSON does not have."""
    return [None if np.isnan(value) else round(float(value), digits) for value in values]
