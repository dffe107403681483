"""The store of the phantoms is the one that is recorded: a change of its bytes is seen.

A change that is meant to alter content renews the record, and says so in the changelog:

    RENEW_GOLDEN=1 python -m pytest tests/pipeline/test_golden.py

Tables are compared by digest. What is interpolated, trained or matched in float32 may differ in its
last bit from one kind of processor to the next, so crops are compared by the sums of their voxels.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import PatchStore
from store.format import TABLES
from store.group import digest_values

RECORD = Path(__file__).parents[1] / "golden" / "store.json"
TRAINED = ("scans/embedding", "classes/distance", "classes/validation_distance")
MATCHED = (
    "train/origin_mm",
    "validation/origin_mm",
    *(
        f"classes/{prefix}{name}"
        for prefix in ("", "validation_")
        for name in ("place_mm", "score", "cycle_mm")
    ),
)
ROUNDED = {**dict.fromkeys(TRAINED, 1e-3), **dict.fromkeys(MATCHED, 1e-2)}
"""Tables that were computed in float32, and the tolerance of their norms."""
SUM_TOLERANCE = 32
"""Of a crop's sum in HU: some of its voxels may be rounded the other way."""


def describe(store: PatchStore) -> dict[str, Any]:
    tables = {name: np.asarray(store.group[name][...]) for name in TABLES}  # type: ignore[index]
    return {
        "tables": {n: digest_values(v) for n, v in tables.items() if n not in ROUNDED},
        "rounded": {
            name: {"shape": list(tables[name].shape), "norm": float(np.nansum(tables[name] ** 2))}
            for name in ROUNDED
        },
        "sums": {
            name: reader.read(range(len(reader))).sum(axis=(1, 2, 3), dtype=np.int64).tolist()
            for name, reader in (
                ("scans/thumbnail", store.thumbnails),
                ("train/patch", store.train.patch),
                ("validation/patch", store.validation.patch),
            )
        },
    }


@pytest.fixture(scope="module")
def found(patches: PatchStore) -> dict[str, Any]:
    described = describe(patches)
    if os.environ.get("RENEW_GOLDEN"):
        RECORD.write_text(json.dumps(described, indent=1) + "\n")
    return described


@pytest.fixture(scope="module")
def recorded(found: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RECORD.read_text())
    return content


def test_tables_are_the_recorded_ones(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    ours, theirs = found["tables"], recorded["tables"]
    assert [name for name in TABLES if ours.get(name) != theirs.get(name)] == []


@pytest.mark.parametrize("name", ["scans/thumbnail", "train/patch", "validation/patch"])
def test_every_crop_is_the_recorded_one(
    found: dict[str, Any], recorded: dict[str, Any], name: str
) -> None:
    np.testing.assert_allclose(
        found["sums"][name], recorded["sums"][name], rtol=0, atol=SUM_TOLERANCE
    )


@pytest.mark.parametrize("name", ROUNDED)
def test_what_was_trained_or_matched_is_the_recorded_one(
    found: dict[str, Any], recorded: dict[str, Any], name: str
) -> None:
    assert found["rounded"][name]["shape"] == recorded["rounded"][name]["shape"]
    assert found["rounded"][name]["norm"] == pytest.approx(
        recorded["rounded"][name]["norm"], rel=ROUNDED[name]
    )
