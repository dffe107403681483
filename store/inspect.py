"""What a store holds, as plain values that print and turn to JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import FORMAT, SPLITS, StoreError
from store.reader import PatchStore


def describe_store(store: PatchStore) -> dict[str, Any]:
    """Counts, settings and a line for each class; what an unfinished store does not have is 0."""
    surveyed = store.stages.get("survey", {"accepted": 0, "rejected": {}})
    planned = "discover" in store.stages
    facts: dict[str, Any] = {
        "format": FORMAT,
        "state": store.state,
        "fingerprint": store.fingerprint,
        "scans": surveyed["accepted"],
        "patients": len(np.unique(store.scans.patient)) if surveyed["accepted"] else 0,
        "rejected": surveyed["rejected"],
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


def describe_class(store: PatchStore, label: int) -> dict[str, Any]:
    """One class and its members, nearest first. Raises StoreError when there is no such class."""
    if "discover" not in store.stages or label >= store.num_classes:
        count = store.num_classes if "discover" in store.stages else 0
        raise StoreError(f"{store.path}: no class {label}; there are {count}, from 0")
    lines = []
    for split in SPLITS:
        members = store.members(label, split)
        lines += [
            {"split": split, "scan": scan_name(store, scan), "row": row, "distance": distance,
             "centre_mm": place}
            for scan, row, distance, place in zip(
                members.scans.tolist(),
                members.rows.tolist(),
                members.distances.tolist(),
                members.places_mm.tolist(),
                strict=True,
            )
        ]  # fmt: skip
    return {**_class_line(store, label), "members": lines}


def scan_name(store: PatchStore, scan: int) -> str:
    """A scan's pseudonym: 16 hex digits."""
    return f"{int(store.scans.id[scan]):016x}"


def _class_line(store: PatchStore, label: int) -> dict[str, Any]:
    distance: NDArray[np.float32] = store.classes.distance[label]
    return {
        "class": label,
        "reference": scan_name(store, int(store.classes.reference[label])),
        "centre": store.classes.centre[label].tolist(),
        "members": int((store.classes.neighbour[label] >= 0).sum()),
        "validation_members": int((store.classes.validation_neighbour[label] >= 0).sum()),
        "median_distance": float(np.nanmedian(distance)),
    }
