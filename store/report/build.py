"""Collect what the page shows, class by class, and write it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.atomic import replace_file
from store.classes import read_annotation
from store.format import SPLITS
from store.geometry import scan_name
from store.inspect import format_json
from store.matches import find_weak, weak_limits
from store.progress import SILENT, Advance, Progress
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
NEAREST, FARTHEST, WEAKEST, NON_MEMBERS = 6, 3, 3, 4
"""How many scans of a class are shown: the nearest and the farthest members, those with the lowest
scores among the others, and non-members."""
MEMBER_SLICES, REFERENCE_SLICES = 12, 32
CARD_TILES = 4
"""Pictures of a class in the overview: mean, reference, front and side view of its scan."""
CLASSES_PER_SHEET = 50
MAPPED_SCANS = 1000
"""How many scans of the map have a picture."""
SCAN_COLUMNS, CROP_COLUMNS = 16, 8


def write_report(store: PatchStore, out: Path, *, progress: Progress = SILENT) -> int:
    """Write the page; returns its size in bytes. One class is in memory at a time."""
    quality = load_quality(store, progress=progress)
    with (
        progress.stage("report", store.num_classes, "classes") as advance,
        replace_file(out) as partial,
        partial.open("w", encoding="utf-8") as page,
    ):
        head, tail = render_page("default-src 'none'; img-src data:")
        page.write(head)
        for name, content in _sheets(store, advance):
            picture = base64.b64encode(content).decode()
            page.write(f'<script type="text/plain" id="{name}">{picture}</script>\n')
        page.write(render_data(store, quality))
        page.write(tail)
    return out.stat().st_size


def render_page(sources: str) -> tuple[str, str]:
    """The page before and after its data; `sources` are those of its security policy."""
    parts = {name: (files("store.report") / name).read_text("utf-8") for name in
             ("page.html", "page.css", "page.js")}  # fmt: skip
    page = parts["page.html"].replace("/*STYLE*/", parts["page.css"])
    page = page.replace("/*SCRIPT*/", parts["page.js"]).replace("/*SOURCES*/", sources)
    head, tail = page.split("<!--DATA-->")
    return head, tail


def render_data(
    store: PatchStore, quality: list[Quality], *, classes_per_sheet: int = CLASSES_PER_SHEET,
    live: bool = False,
) -> str:  # fmt: skip
    """The facts on the page, as one element; pictures are separate."""
    annotation = read_annotation(store.location)
    content = {
        **_overview(store),
        "classesPerSheet": classes_per_sheet,
        "live": live,
        "classes": [
            {**class_facts(store, one), **asdict(annotation[label])}
            for label, one in enumerate(quality)
        ],
    }
    text = format_json(content).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>\n'


def _sheets(store: PatchStore, advance: Advance) -> Iterator[tuple[str, bytes]]:
    """Pictures of the page by name."""
    cards: list[Grey] = []
    for label in range(store.num_classes):
        mean = mean_crop(store, label)
        yield f"class-{label}", class_sheet(store, label, mean)
        cards += card_tiles(store, label, mean)
        if label + 1 == store.num_classes or (label + 1) % CLASSES_PER_SHEET == 0:
            yield f"cards-{label // CLASSES_PER_SHEET}", encode_tiles(cards, CARD_TILES)
            cards = []
        advance(1)
    yield "scans", scan_sheet(store)


def _overview(store: PatchStore) -> dict[str, Any]:
    survey = store.stages["survey"]
    scans = store.scans
    place = _project(scans.embedding)
    spacing = store.config["spacing_mm"]
    return {
        "fingerprint": store.fingerprint,
        "config": store.config,
        "rejected": survey["rejected"],
        "notMembers": store.stages["discover"].get("rejected", {}),
        "match": _match_limits(store) if store.is_matched else None,
        "crops": {split: len(store.split(split)) for split in SPLITS},
        "shape": store.crop_shape,
        "spacing": spacing if isinstance(spacing, list) else None,
        "levels": LEVELS,
        "tile": TILE,
        "memberSlices": MEMBER_SLICES,
        "referenceSlices": REFERENCE_SLICES,
        "cardTiles": CARD_TILES,
        "mappedScans": MAPPED_SCANS,
        "scanColumns": SCAN_COLUMNS,
        "cropColumns": CROP_COLUMNS,
        "scans": [
            {
                "id": scan_name(scans.id[row]),
                "patient": int(scans.patient[row]),
                "split": SPLITS[int(scans.split[row])],
                "spacing": scans.spacing_mm[row].round(3).tolist(),
                "size": scans.size[row].tolist(),
                "at": place[row].round(4).tolist(),
            }
            for row in range(len(scans.id))
        ],
    }


def _match_limits(store: PatchStore) -> dict[str, float]:
    """Limits of a member's match, and those beyond which it only just passed."""
    score, cycle_mm = weak_limits(store)
    return {
        "score": store.config["min_score"],
        "cycle": store.config["max_cycle_mm"],
        "weakScore": score,
        "weakCycle": cycle_mm,
    }


def _project(embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, 2) the first two principal components, each scaled to [0, 1]."""
    centred = embedding.astype(np.float64) - embedding.mean(0, dtype=np.float64)
    covariance = centred.T @ centred
    _, vectors = np.linalg.eigh(covariance)
    found = centred @ vectors[:, :-3:-1]
    found -= found.min(0)
    return np.asarray(found / np.maximum(found.max(0), 1e-12))


def scan_sheet(store: PatchStore) -> bytes:
    """The front view of each scan on the map."""
    shown = range(min(len(store.scans.id), MAPPED_SCANS))
    thumbnails = (store.thumbnails.read([row])[0] for row in shown)
    return encode_tiles([fit(projections(image)[0], TILE) for image in thumbnails], SCAN_COLUMNS)


def class_facts(store: PatchStore, quality: Quality) -> dict[str, Any]:
    """What the page shows about a class, without pictures."""
    label = quality.label
    reference = int(store.classes.reference[label])
    members = list(_members(store, label))
    low, high, extent_mm = _box(store, label, reference)
    frame_mm = store.scans.frame_mm[reference]
    return {
        **asdict(quality),
        "reference": reference,
        "centre": store.classes.centre[label].round(3).tolist(),
        "box": [low.round(4).tolist(), high.round(4).tolist()],
        "extent": extent_mm.round(1).tolist(),
        "frame": (frame_mm[1] - frame_mm[0]).round(1).tolist(),
        "all": [{**member, "rows": member["rows"][0]} for member in members],
        "shown": list(_shown(members).items()),
        "nonMembers": _non_members(store, label),
    }


def class_sheet(store: PatchStore, label: int, mean: NDArray[np.float64]) -> bytes:
    """Pictures of a class's own view: reference, mean, members, the same place in non-members."""
    members = list(_members(store, label))
    shown = [members[number] for number in _shown(members)]
    reference = store.split(shown[0]["split"]).read([shown[0]["rows"][0]])[0]
    tiles = [fit(t, TILE) for t in planes(reference, REFERENCE_SLICES)]
    tiles += [fit(t, TILE) for t in planes(mean, MEMBER_SLICES)]
    for member in shown:  # one in memory at a time
        crops = store.split(member["split"]).read(list(member["rows"].values()))
        by_scale = dict(zip(member["rows"], crops, strict=True))
        tiles += [fit(t, TILE) for t in planes(by_scale[0], MEMBER_SLICES)]
        for scale in (1, 2):
            crop = by_scale.get(scale)
            middle = np.zeros((TILE, TILE)) - 1000 if crop is None else crop[len(crop) // 2]
            tiles.append(fit(to_grey(middle), TILE))
    tiles += [_place_in(store, label, scan) for scan in _non_members(store, label)]
    return encode_tiles(tiles, MEMBER_SLICES + 4)


def card_tiles(store: PatchStore, label: int, mean: NDArray[np.float64]) -> list[Grey]:
    """Pictures of a class in the overview: mean, reference, front and side view with its place."""
    reference = int(store.classes.reference[label])
    own = next(_members(store, label))["rows"][0]
    front, side = projections(store.thumbnails.read([reference])[0])
    crop = store.train.read([own])[0]
    return [
        fit(to_grey(mean[len(mean) // 2]), TILE),
        fit(to_grey(crop[len(crop) // 2]), TILE),
        fit(front, TILE),
        fit(side, TILE),
    ]


def crop_sheet(store: PatchStore, split: str, row: int) -> bytes:
    """All axial slices of one crop, compressed without loss."""
    return encode_tiles(
        list(to_grey(store.split(split).read([row])[0])), CROP_COLUMNS, lossless=True
    )


def _shown(members: list[dict[str, Any]]) -> dict[int, str]:
    """The members that are shown, by number, and why; the reference is the first."""
    order = sorted(range(len(members)), key=lambda number: members[number]["distance"])
    shown = dict.fromkeys(order[:NEAREST], "nearest")
    shown |= dict.fromkeys(order[NEAREST:][-FARTHEST:], "farthest")
    others = [number for number in order if number not in shown and "score" in members[number]]
    others.sort(key=lambda number: members[number]["score"])
    return shown | dict.fromkeys(others[:WEAKEST], "lowest scores of the rest")


def _members(store: PatchStore, label: int) -> Iterator[dict[str, Any]]:
    """Training members, nearest first, then validation members; `rows` are theirs by scale.

    Score, there-and-back distance and whether they only just passed are known of matched members.
    """
    for split in SPLITS:
        members, table = store.members(label, split), store.split(split)
        rows = store.rows(split, label)
        weak = find_weak(store, label, members)
        for number, scan in enumerate(members.scans.tolist()):
            of_scan = rows[table.scan[rows] == scan]
            member = {
                "scan": scan,
                "split": split,
                "distance": round(float(members.distances[number]), 4),
                "rows": {int(table.scale[row]): int(row) for row in of_scan},
            }
            if store.is_matched:
                member |= {
                    "score": round(float(members.scores[number]), 3),
                    "cycle": round(float(members.cycles[number]), 2),
                    "weak": bool(weak[number]),
                }
            yield member


def mean_crop(store: PatchStore, label: int) -> NDArray[np.float64]:
    """The mean of a class's base crops, in HU."""
    total, count = np.zeros(store.crop_shape), 0
    for name in SPLITS:
        rows = store.rows(name, label, scale=0)
        for crops in store.split(name).read_batches(rows):
            total += crops.sum(axis=0, dtype=np.float64)
            count += len(crops)
    return total / count


def _box(
    store: PatchStore, label: int, scan: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Corners of the reference's base crop as fractions of its frame, and its size in mm."""
    rows = store.train
    (row,) = np.flatnonzero((rows.label == label) & (rows.scale == 0) & (rows.scan == scan))[:1]
    first, last = store.scans.frame_mm[scan]
    low = (rows.origin_mm[row] - first) / (last - first)
    return low, low + rows.extent_mm[row] / (last - first), rows.extent_mm[row]


def _non_members(store: PatchStore, label: int) -> list[int]:
    """Non-members whose embeddings are farthest from the reference's.

    Empty if members were matched: the same coordinate is not the same place in another scan.
    """
    if store.is_matched:
        return []
    classes, embedding = store.classes, store.scans.embedding
    known = {*classes.neighbour[label].tolist(), *classes.validation_neighbour[label].tolist()}
    apart = np.linalg.norm(embedding - embedding[classes.reference[label]], axis=1)
    far = np.argsort(-apart, kind="stable").tolist()
    return [scan for scan in far if scan not in known][:NON_MEMBERS]


def _place_in(store: PatchStore, label: int, scan: int) -> Grey:
    """The middle axial slice at the class's place in any scan, from its thumbnail."""
    low, high, extent_mm = _box(store, label, int(store.classes.reference[label]))
    image, (least, most) = store.thumbnails.read([scan])[0], store.window_hu
    first, last = store.scans.frame_mm[scan]
    half, centre = extent_mm / (last - first) / 2, (low + high) / 2
    spans = [_span(c - h, c + h, n) for c, h, n in zip(centre, half, image.shape, strict=True)]
    depth = min(int(centre[0] * len(image)), len(image) - 1)
    part = image[depth][slice(*spans[1]), slice(*spans[2])].astype(np.float64)
    return fit(to_grey(least + part / 255 * (most - least)), TILE)


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """First and last index of a part of an axis; at least one voxel."""
    first = int(np.clip(np.floor(low * length), 0, length - 1))
    return first, int(np.clip(np.ceil(high * length), first + 1, length))
