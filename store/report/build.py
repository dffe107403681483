"""Gather what the page shows, class by class, and write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from store.classes import read_annotation
from store.format import SPLITS
from store.inspect import scan_name
from store.quality import Quality, load_quality
from store.reader import PatchStore
from store.report.pictures import (
    LEVELS,
    Grey,
    encode_tiles,
    fit,
    planes,
    projections,
    to_grey,
)

TILE = 64
NEAREST, FARTHEST, STRANGERS = 8, 4, 4
"""Members of a class that are shown: the nearest and the farthest; and scans that are none."""
MEMBER_SLICES, REFERENCE_SLICES = 12, 32
CARD_TILES = 4
"""Of a class in the overview: mean, reference, front and side view of the reference's scan."""
_CLASSES_PER_SHEET = 50
_MAPPED_SCANS = 1000
"""Scans of which the map shows a picture."""


def write_report(
    store: PatchStore, out: Path, *, progress: Callable[[int], None] = lambda count: None
) -> int:
    """Write the page, under a temporary name first; returns its size in bytes.

    One class is in memory at a time. `progress` is called with classes done.
    """
    quality = load_quality(store)
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as page:
            _write(page, store, quality, progress)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out.stat().st_size


def _write(
    page: IO[str], store: PatchStore, quality: list[Quality], progress: Callable[[int], None]
) -> None:
    template = (files("store.report") / "page.html").read_text("utf-8")
    style = (files("store.report") / "page.css").read_text("utf-8")
    script = (files("store.report") / "page.js").read_text("utf-8")
    head, tail = template.replace("/*STYLE*/", style).split("<!--DATA-->")
    page.write(head)
    classes, cards = [], []
    for label in range(store.num_classes):
        facts, tiles, card = _describe(store, quality[label])
        classes.append(facts)
        cards += card
        page.write(_block(f"class-{label}", encode_tiles(tiles, MEMBER_SLICES + 4)))
        progress(1)
    step = _CLASSES_PER_SHEET * CARD_TILES
    for number, start in enumerate(range(0, len(cards), step)):
        page.write(_block(f"cards-{number}", encode_tiles(cards[start : start + step], CARD_TILES)))
    page.write(_block("scans", encode_tiles(list(_scan_tiles(store)), 16)))
    content = {**_overview(store), "classes": classes}
    page.write(_block("data", json.dumps(content).replace("<", "\\u003c"), "application/json"))
    page.write(tail.replace("/*SCRIPT*/", script))


def _block(name: str, content: str, kind: str = "text/plain") -> str:
    return f'<script type="{kind}" id="{name}">{content}</script>\n'


def _overview(store: PatchStore) -> dict[str, Any]:
    survey = store.stages["survey"]
    scans = store.scans
    place = _project(scans.embedding)
    shape, spacing = store.config["shape"], store.config["spacing_mm"]
    return {
        "fingerprint": store.fingerprint,
        "config": store.config,
        "rejected": survey["rejected"],
        "crops": {split: len(store.split(split)) for split in SPLITS},
        "shape": shape,
        "spacing": spacing if isinstance(spacing, list) else None,
        "levels": LEVELS,
        "tile": TILE,
        "memberSlices": MEMBER_SLICES,
        "referenceSlices": REFERENCE_SLICES,
        "cardTiles": CARD_TILES,
        "classesPerSheet": _CLASSES_PER_SHEET,
        "scans": [
            {
                "id": scan_name(store, row),
                "person": int(scans.patient[row]),
                "split": SPLITS[int(scans.split[row])],
                "spacing": scans.spacing_mm[row].round(3).tolist(),
                "size": scans.size[row].tolist(),
                "at": place[row].round(4).tolist(),
            }
            for row in range(len(scans.id))
        ],
    }


def _project(embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, 2) the first two principal components, each scaled to [0, 1]."""
    centred = embedding.astype(np.float64) - embedding.mean(0, dtype=np.float64)
    covariance = centred.T @ centred
    _, vectors = np.linalg.eigh(covariance)
    found = centred @ vectors[:, :-3:-1]
    found -= found.min(0)
    return np.asarray(found / np.maximum(found.max(0), 1e-12))


def _scan_tiles(store: PatchStore) -> Iterator[Grey]:
    """The front view of each scan on the map."""
    for row in range(min(len(store.scans.id), _MAPPED_SCANS)):
        yield fit(projections(store.thumbnails.read([row])[0])[0], TILE)


def _describe(store: PatchStore, quality: Quality) -> tuple[dict[str, Any], list[Grey], list[Grey]]:
    """Facts, tiles of its own page, and tiles of its card."""
    label = quality.label
    reference = int(store.classes.reference[label])
    members = list(_members(store, label))
    shown = members[:NEAREST] + members[NEAREST:][-FARTHEST:]
    crops = dict(_read_scales(store, label, shown))
    own = crops[0, 0]
    mean = _mean_crop(store, label)
    tiles = [fit(t, TILE) for t in planes(own, REFERENCE_SLICES)]
    tiles += [fit(t, TILE) for t in planes(mean, MEMBER_SLICES)]
    for number in range(len(shown)):
        tiles += [fit(t, TILE) for t in planes(crops[number, 0], MEMBER_SLICES)]
        for scale in (1, 2):
            crop = crops.get((number, scale))
            middle = np.zeros((TILE, TILE)) - 1000 if crop is None else crop[len(crop) // 2]
            tiles.append(fit(to_grey(middle), TILE))
    strangers = list(_strangers(store, label))
    tiles += [tile for _, tile in strangers]
    front, side = projections(store.thumbnails.read([reference])[0])
    card = [
        fit(to_grey(mean[len(mean) // 2]), TILE),
        fit(to_grey(own[len(own) // 2]), TILE),
        fit(front, TILE),
        fit(side, TILE),
    ]
    low, high, extent_mm = _box(store, label, reference)
    frame_mm = store.scans.frame_mm[reference]
    facts = {
        **asdict(quality),
        **asdict(read_annotation(store.path)[label]),
        "reference": reference,
        "centre": store.classes.centre[label].round(3).tolist(),
        "box": [low.round(4).tolist(), high.round(4).tolist()],
        "extent": extent_mm.round(1).tolist(),
        "frame": (frame_mm[1] - frame_mm[0]).round(1).tolist(),
        "all": [{k: v for k, v in member.items() if k != "rows"} for member in members],
        "shown": [members.index(member) for member in shown],
        "strangers": [scan for scan, _ in strangers],
    }
    return facts, tiles, card


def _members(store: PatchStore, label: int) -> Iterator[dict[str, Any]]:
    """Train members from the reference outwards, then those of validation."""
    tables = {
        "train": (store.classes.neighbour, store.classes.distance),
        "validation": (store.classes.validation_neighbour, store.classes.validation_distance),
    }
    for split, (neighbour, distance) in tables.items():
        rows = store.split(split)
        mine = np.flatnonzero(rows.label == label)
        for scan, far in zip(neighbour[label].tolist(), distance[label].tolist(), strict=True):
            if scan < 0:
                continue
            its = mine[rows.scan[mine] == scan]
            by_scale = {int(rows.scale[row]): int(row) for row in its}
            yield {"scan": scan, "split": split, "distance": round(far, 4), "rows": by_scale}


def _read_scales(
    store: PatchStore, label: int, shown: list[dict[str, Any]]
) -> Iterator[tuple[tuple[int, int], NDArray[np.int16]]]:
    for number, member in enumerate(shown):
        crops = store.split(member["split"]).read(list(member["rows"].values()))
        for scale, crop in zip(member["rows"], crops, strict=True):
            yield (number, scale), crop


def _mean_crop(store: PatchStore, label: int) -> NDArray[np.float64]:
    total, count = np.zeros(store.train.patch.shape[1:]), 0
    for name in SPLITS:
        split = store.split(name)
        for row in np.flatnonzero((split.label == label) & (split.scale == 0)).tolist():
            total += split.read([row])[0]
            count += 1
    return total / count


def _box(
    store: PatchStore, label: int, scan: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Low and high corner of the reference's base crop in its frame's units, and its mm."""
    rows = store.train
    (row,) = np.flatnonzero((rows.label == label) & (rows.scale == 0) & (rows.scan == scan))[:1]
    first, last = store.scans.frame_mm[scan]
    low = (rows.origin_mm[row] - first) / (last - first)
    return low, low + rows.extent_mm[row] / (last - first), rows.extent_mm[row]


def _strangers(store: PatchStore, label: int) -> Iterator[tuple[int, Grey]]:
    """The same place in scans of other look, from their thumbnails: (scan, axial tile)."""
    classes, scans = store.classes, store.scans
    known = {*classes.neighbour[label].tolist(), *classes.validation_neighbour[label].tolist()}
    apart = np.linalg.norm(scans.embedding - scans.embedding[classes.reference[label]], axis=1)
    low, high, extent_mm = _box(store, label, int(classes.reference[label]))
    window = store.config["window_hu"]
    far = [int(scan) for scan in np.argsort(-apart, kind="stable") if int(scan) not in known]
    for scan in far[:STRANGERS]:
        image = store.thumbnails.read([scan])[0]
        first, last = scans.frame_mm[scan]
        half = extent_mm / (last - first) / 2
        centre = (low + high) / 2
        spans = [_span(c - h, c + h, n) for c, h, n in zip(centre, half, image.shape, strict=True)]
        depth = min(int(centre[0] * len(image)), len(image) - 1)
        part = image[depth][slice(*spans[1]), slice(*spans[2])].astype(np.float64)
        hu = window[0] + part / 255 * (window[1] - window[0])
        yield scan, fit(to_grey(hu), TILE)


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """Indices of a part of an axis, one at least."""
    first = int(np.clip(np.floor(low * length), 0, length - 1))
    return first, int(np.clip(np.ceil(high * length), first + 1, length))
