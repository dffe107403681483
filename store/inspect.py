"""What a store holds, as plain values for JSON (`describe_...`) and as text (`format_...`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.classes import ClassNote, check_class, read_annotation
from store.format import SPLITS, StoreError
from store.matches import describe_matching
from store.progress import SILENT, Progress
from store.quality import as_row, load_quality
from store.reader import PatchStore
from store.scans import scan_name

Facts = dict[str, Any]


def describe_store(store: PatchStore) -> Facts:
    """Counts, settings, and one entry for each class; counts that are not known yet are 0."""
    surveyed = store.stages.get("survey", {"accepted": 0, "rejected": {}})
    planned = "discover" in store.stages
    facts: Facts = {
        "format": store.format,
        "state": store.state,
        "fingerprint": store.fingerprint,
        "scans": surveyed["accepted"],
        "patients": len(np.unique(store.scans.patient)) if surveyed["accepted"] else 0,
        "rejected": surveyed["rejected"],
        "near_duplicates": describe_near_duplicates(store),
        "statistics": store.has_statistics,
        "crops": {split: len(store.split(split)) if planned else 0 for split in SPLITS},
        "shape": store.config["shape"],
        "spacing_mm": store.config["spacing_mm"],
        "frame": store.config["frame"],
        "classes": [],
        "stages": store.stages,
        "software": store.software,
    }
    if planned:
        facts["classes"] = [_class_line(store, label) for label in range(store.num_classes)]
    return facts


def describe_near_duplicates(store: PatchStore) -> list[Facts] | None:
    """Pairs of scans of different patients that are almost the same; None if not searched for.

    Patients differ by PatientID or manifest: `scans/patient` may join them.
    """
    pairs = store.stages.get("survey", {}).get("near_duplicates")
    if pairs is None:
        return None
    return [
        {
            "scans": [scan_name(store.scans.id[row]) for row in rows],
            "splits": [SPLITS[store.scans.split[row]] for row in rows],
            "similarity": similarity,
        }
        for *rows, similarity in pairs
    ]


def describe_class(store: PatchStore, label: int) -> Facts:
    """One class and its members, nearest first. Raises StoreError when there is no such class."""
    if "discover" not in store.stages:
        raise StoreError(f"{store.location}: no class {label}; the store has no classes yet")
    check_class(label, store.num_classes, where=store.location)
    lines = []
    for split in SPLITS:
        members = store.members(label, split)
        lines += [
            {
                "split": split,
                "scan": scan_name(store.scans.id[members.scans[number]]),
                "row": int(members.rows[number]),
                "distance": float(members.distances[number]),
                "centre_mm": members.places[number].tolist(),
                "score": float(members.scores[number]),
                "cycle_mm": float(members.cycles[number]),
            }
            for number in range(len(members))
        ]
    return {**_class_line(store, label), "members": lines}


def describe_classes(
    store: PatchStore, *, quality: bool = False, progress: Progress = SILENT
) -> list[Facts]:
    """One entry for each class, with its annotation; with its quality, too, the best first."""
    annotation = read_annotation(store.location)
    found = [
        _annotated(store, label, annotation[label], members=int(members))
        for label, members in enumerate((store.classes.neighbour >= 0).sum(1))
    ]
    if quality:
        judged = load_quality(store, progress=progress)
        for facts, one in zip(found, judged, strict=True):
            facts |= {name: value for name, value in as_row(one).items() if name != "label"}
        found.sort(key=lambda facts: judged[facts["class"]].rank)
    return found


def format_store(name: object, facts: Facts) -> str:
    """What `describe_store` found, as lines of text; `name` is how the user calls the store."""
    crops = facts["crops"]
    lines = [
        f"{name}: {facts['state']}, format {facts['format']}, fingerprint"
        f" {(facts['fingerprint'] or '-')[:16]}",
        f"scans: {facts['scans']} of {facts['patients']} patients; rejected:"
        f" {format_counts(facts['rejected']) or 'none'}",
        *(f"  {scan['file']}: scan {scan['scan']}" for scan in facts.get("scan_files", ())),
    ]
    lines += format_near_duplicates(facts["near_duplicates"] or [], limit=10)
    if "survey" in facts["stages"] and not facts["statistics"]:
        lines.append(
            "made by an earlier version, without mean and deviation of each scan:"
            " `semgen pretrain --normalise zscore` needs a store that is prepared again"
        )
    for series in facts.get("rejected_files", ()):
        lines.append(f"  {series['file']}: {format_reason(series['reason'], series['detail'])}")
    lines.append(
        f"crops: {crops['train']} train, {crops['validation']} validation, {facts['shape']} voxels"
        f" of {facts['spacing_mm']} mm, frame {facts['frame']}"
    )
    if facts["classes"]:
        lines.append(
            "class  reference         centre (z, y, x)        members  validation  median distance"
            "  median score  body"
        )
    for row in facts["classes"]:
        centre = ", ".join(f"{c:.3g}" for c in row["centre"])
        lines.append(
            f"{row['class']:5d}  {row['reference']}  {centre:22s}  {row['members']:7d}"
            f"  {row['validation_members']:10d}  {row['median_distance']:15.3g}"
            f"  {_number(row['median_score'], 12, 2)}  {_share(row['body_share'])}"
        )
    return "\n".join(lines)


def format_near_duplicates(pairs: Sequence[Facts], *, limit: int) -> list[str]:
    """What `describe_near_duplicates` found, as lines of text; no lines if there is nothing.

    limit
        Maximum number of pairs to list, those in both splits first.
    """
    if not pairs:
        return []
    apart = sum(len(set(pair["splits"])) > 1 for pair in pairs)
    where = "each pair in one split"
    if apart:
        where = (
            f"{apart} in both splits; `--near-duplicates same-split` or a manifest prevents this"
        )
    lines = [f"near-duplicates of different patients: {len(pairs)} pairs, {where}"]
    for pair in sorted(pairs, key=lambda pair: len(set(pair["splits"])) == 1)[:limit]:
        named = zip(pair["scans"], pair["splits"], pair.get("files", ("", "")), strict=True)
        scans = (f"{scan} ({split}) {file}".rstrip() for scan, split, file in named)
        lines.append(f"  {' and '.join(scans)}: similarity {pair['similarity']:.2f}")
    if len(pairs) > limit:
        lines.append(f"  {len(pairs) - limit} more: see `semgen inspect STORE --json`")
    return lines


def format_class(facts: Facts) -> str:
    """What `describe_class` found, as lines of text."""
    centre = ", ".join(f"{c:.4g}" for c in facts["centre"])
    lines = [
        f"class {facts['class']}: centre ({centre}) in frame units, z y x",
        "split       scan              distance  score  there and back, mm  centre, mm (z, y, x)",
    ]
    for row in facts["members"]:
        place = ", ".join(f"{p:.1f}" for p in row["centre_mm"])
        file = f"  {row['file']}" if "file" in row else ""
        lines.append(
            f"{row['split']:10s}  {row['scan']}  {row['distance']:8.4g}"
            f"  {_number(row['score'], 5, 2)}  {_number(row['cycle_mm'], 18, 1)}  {place}{file}"
        )
    return "\n".join(lines)


def format_classes(rows: Sequence[Facts]) -> str:
    """What `describe_classes` found, as lines of text."""
    with_quality = "consistency" in rows[0]
    columns = "  grade  consistency  outliers  overlap  mostly  median score  weak  body"
    quality = columns if with_quality else ""
    lines = [f"class  members{quality}  name"]
    for row in rows:
        words = " ".join(
            filter(None, (row["name"], *(f"[{tag}]" for tag in row["tags"]), _decision(row)))
        )
        words += f"  - {' '.join(row['note'].split())}" if row["note"] else ""
        if with_quality:
            tissue = {k.removeprefix("tissue_"): v for k, v in row.items() if "tissue_" in k}
            quality = (
                f"  {row['grade']:5s}  {row['consistency']:11.2f}  {row['outliers']:8d}"
                f"  {row['overlap']:7.0%}"
                f"  {max(tissue, key=lambda name: tissue[name]):6s}"
                f"  {_number(row['median_score'], 12, 2)}  {_number(row['weak_members'], 4, 0)}"
                f"  {_share(row['body_share'])}"
            )
        lines.append(f"{row['class']:5d}  {row['members']:7d}{quality}  {words}".rstrip())
    return "\n".join(lines)


def format_json(value: Any, *, compact: bool = False) -> str:
    """Values and dataclasses as JSON; a number that is not finite becomes null, a path text."""

    def plain(part: Any) -> Any:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            part = dataclasses.asdict(part)
        if isinstance(part, dict):
            return {str(name): plain(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    separators = (",", ":") if compact else None
    return json.dumps(plain(value), default=str, allow_nan=False, separators=separators)


def format_counts(counts: Mapping[str, int]) -> str:
    """Counts by name in one line: `3 duplicate, 1 unreadable`."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def format_reason(reason: str, detail: str | None) -> str:
    """Why a series was rejected, in one line."""
    return f"{reason} ({detail.splitlines()[-1]})" if detail else reason


def format_size(num_bytes: float) -> str:
    """Bytes in a unit that people read: `1.21 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def _number(value: float | None, width: int, digits: int) -> str:
    """A number in a column of text; "-" where it is not known."""
    known = value is not None and math.isfinite(value)
    return f"{value:{width}.{digits}f}" if known else f"{'-':>{width}}"


def _share(value: float | None) -> str:
    """A share in a column of text, in percent; "-" where it is not known."""
    return "   -" if value is None else f"{value:4.0%}"


def _annotated(store: PatchStore, label: int, note: ClassNote, *, members: int) -> Facts:
    """A class and its annotation, with scan ids of excluded members."""
    left_out = [scan_name(store.scans.id[row]) for row in note.excluded_members]
    known = {"name": note.name, "note": note.note, "excluded": note.excluded, "members": members}
    return {
        "class": label,
        **known,
        "tags": list(note.tags),
        "kept": note.kept,
        "excluded_members": left_out,
    }


def _decision(row: Facts) -> str:
    """What was decided on a class: `(kept, 2 members excluded)`."""
    parts = [word for word in ("kept", "excluded") if row[word]]
    if count := len(row["excluded_members"]):
        parts.append(f"{count} member{'s' * (count > 1)} excluded")
    return f"({', '.join(parts)})" if parts else ""


def _class_line(store: PatchStore, label: int) -> Facts:
    distance: NDArray[np.float32] = store.classes.distance[label]
    return {
        "class": label,
        "reference": scan_name(store.scans.id[store.classes.reference[label]]),
        "centre": store.classes.centre[label].tolist(),
        "members": int((store.classes.neighbour[label] >= 0).sum()),
        "validation_members": int((store.classes.validation_neighbour[label] >= 0).sum()),
        "median_distance": float(np.nanmedian(distance)),
        **dataclasses.asdict(describe_matching(store, label)),
    }
