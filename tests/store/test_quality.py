"""How good classes are: the measure against its plain definition, and what it tells."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from store import PatchStore
from store.quality import Quality, assess, describe_crops, load_quality, share_above
from tests.support.command import Semgen
from tests.support.progress import CountedProgress
from tests.support.synthetic_store import make_store


def slow_similarity(one: NDArray[np.int16], other: NDArray[np.int16]) -> float:
    """Local normalised cross-correlation of two (32, 64, 64) crops, in plain words."""

    def cells(crop: NDArray[np.int16]) -> NDArray[np.float64]:
        found = np.empty((4, 8, 8))
        for z, y, x in np.ndindex(4, 8, 8):
            cell = crop[8 * z : 8 * z + 8, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            found[z, y, x] = np.clip(cell, -1000, 1000).mean()
        return found

    products = []
    for y, x in np.ndindex(2, 2):
        windows = [c[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for c in (cells(one), cells(other))]
        a, b = (w - w.mean() for w in windows)
        products.append((a * b).mean() / np.sqrt((a.var() + 20**2) * (b.var() + 20**2)))
    return float(np.mean(products))


@pytest.fixture(scope="module")
def crops() -> NDArray[np.int16]:
    """(5, 32, 64, 64) with structure of many sizes; the last one is flat."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 300, (5, 8, 16, 16)).repeat(4, 1).repeat(4, 2).repeat(4, 3)
    found = (coarse + rng.normal(0, 50, coarse.shape)).astype(np.int16)
    found[4] = 40
    return found


def test_similarity_is_local_normalised_cross_correlation(crops: NDArray[np.int16]) -> None:
    features = describe_crops(crops)
    for i, j in np.ndindex(5, 5):
        assert features[i] @ features[j] == pytest.approx(
            slow_similarity(crops[i], crops[j]), abs=1e-4
        )


def test_similarity_ignores_brightness_and_contrast(crops: NDArray[np.int16]) -> None:
    brighter = (crops[:1] // 2 + 100).astype(np.int16)
    alike = describe_crops(crops[:1])[0] @ describe_crops(brighter)[0]
    assert alike > 0.9
    assert describe_crops(crops[:1])[0] @ describe_crops(crops[4:])[0] == pytest.approx(0, abs=1e-6)


def test_a_share_counts_pairs_that_exceed_the_null_and_half_of_equal_ones() -> None:
    rng = np.random.default_rng(3)
    pairs, null = (rng.integers(0, 20, size).astype(np.float32) / 7 for size in (30, 50))
    plain = [1.0 if pair > other else 0.5 * (pair == other) for pair in pairs for other in null]
    assert share_above(pairs, null) == pytest.approx(np.mean(plain), abs=1e-15)
    assert share_above(pairs[:0], null) == 0.5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    """Six classes that differ by where their structure lies."""
    folder = tmp_path_factory.mktemp("data")
    return PatchStore(make_store(folder / "s", shape=(16, 32, 32), num_train=12))


def shuffled(store: PatchStore, monkeypatch: pytest.MonkeyPatch) -> list[Quality]:
    """The quality of classes whose members were dealt out anew."""
    rng = np.random.default_rng(1)
    for split in (store.train, store.validation):
        monkeypatch.setattr(split, "label", rng.permutation(split.label))
    return assess(store)


def test_consistency_separates_classes_from_shuffled_ones(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [quality.consistency for quality in assess(store)]
    assert min(good) > 0.7
    bad = [quality.consistency for quality in shuffled(store, monkeypatch)]
    assert max(bad) < min(good)
    assert np.mean(bad) == pytest.approx(0.5, abs=0.1)


def test_a_member_with_other_anatomy_is_an_outlier(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = store.train.label.copy()
    base = np.flatnonzero(store.train.scale == 0)
    (odd,) = base[label[base] == 5][:1]
    label[odd] = 2
    monkeypatch.setattr(store.train, "label", label)
    scan = store.train.scan.copy()
    scan[odd] = 2
    monkeypatch.setattr(store.train, "scan", scan)
    monkeypatch.setattr(store.validation, "scan", np.full_like(store.validation.scan, 3))
    assert assess(store)[2].outliers == (2,)


def test_tissue_and_members_are_counted(patches: PatchStore) -> None:
    for label, quality in enumerate(assess(patches)):
        members = patches.classes.neighbour[label]
        assert quality.members == (members >= 0).sum()
        rows = np.flatnonzero((patches.train.label == label) & (patches.train.scale == 0))
        more = np.flatnonzero(patches.validation.label == label)
        crops = np.concatenate([patches.train.read(rows), patches.validation.read(more)])
        assert quality.tissue["lung"] == pytest.approx(((crops >= -950) & (crops < -500)).mean())
        assert sum(quality.tissue.values()) <= 1
        assert quality.patients == len(rows) + len(more)


def test_overlap_is_the_share_of_a_crop_that_another_class_covers(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class 1 lies half in class 0; the others lie apart."""
    for split in (store.train, store.validation):
        origin = np.zeros((len(split), 3))
        origin[:, 0] = np.array([0, 5, 100, 200, 300, 400])[split.label]
        monkeypatch.setattr(split, "origin_mm", origin)
        monkeypatch.setattr(split, "extent_mm", np.full((len(split), 3), 10.0))
    found = assess(store)
    assert [(q.overlap, q.overlap_class) for q in found[:3]] == [(0.5, 1), (0.5, 0), (0.0, -1)]


def test_the_result_is_cached_for_one_fingerprint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = PatchStore(shutil.copytree(prepared, tmp_path / "mine"))
    progress = CountedProgress()
    first = load_quality(mine, progress=progress)
    num_crops = progress.totals["quality"]
    assert num_crops
    assert progress.units["quality"] == num_crops
    assert load_quality(mine, progress=progress) == first
    assert progress.units["quality"] == num_crops
    monkeypatch.setattr(mine, "fingerprint", "another")
    load_quality(mine, progress=progress)
    assert progress.units["quality"] == 2 * num_crops


def test_the_null_is_bounded_and_spread_over_the_store(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sum(int((split.scale == 0).sum()) for split in (store.train, store.validation))
    in_train = int((store.train.scale == 0).sum())
    for limit, num_null in ((1024, in_train), (7, 7)):
        monkeypatch.setattr("store.quality.NULL_CROPS", limit)
        progress = CountedProgress()
        assess(store, progress=progress)
        assert progress.units == progress.totals == {"quality": base + num_null}


def test_classes_are_listed_best_first(prepared: Path, semgen: Semgen, tmp_path: Path) -> None:
    mine = shutil.copytree(prepared, tmp_path / "mine")
    done = semgen("classes", mine, "--quality", "--json")
    rows = json.loads(done.stdout)
    grades = ["good", "fair", "mixed"]
    ranks = [(grades.index(row["grade"]), -row["consistency"] * row["body_share"]) for row in rows]
    assert ranks == sorted(ranks)
    table = semgen("classes", mine, "--quality", "--csv").stdout.splitlines()
    assert table[0].split(",")[:5] == ["class", "name", "note", "excluded", "members"]
    assert len(table) == 5
    assert "consistency" in semgen("classes", mine, "--quality").stdout.splitlines()[0]
