"""Which matches only just passed, relative to the store's own limits."""

import numpy as np
import pytest

from store import PatchStore
from store.inspect import describe_classes, describe_store
from store.matches import Matching, describe_matching, find_weak, weak_limits
from store.reader import Members
from tests.support.synthetic_store import make_store

SCORES = [1.0, 0.9, 0.5, 0.49, 0.8, 0.8]
CYCLES = [0.0, 1.0, 7.0, 1.0, 7.1, 2.0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    """One class, placed by the frame."""
    return PatchStore(make_store(tmp_path_factory.mktemp("data") / "s", num_classes=1))


@pytest.fixture
def matched(store: PatchStore, monkeypatch: pytest.MonkeyPatch) -> PatchStore:
    """One class with a reference and five other members, which were matched."""

    def members(label: int, split: str = "train") -> Members:
        num = len(SCORES) if (label, split) == (0, "train") else 0
        return Members(
            scans=np.arange(num, dtype=np.int32),
            distances=np.zeros(num, np.float32),
            places=np.zeros((num, 3)),
            scores=np.array(SCORES[:num], np.float32),
            cycles=np.array(CYCLES[:num], np.float32),
            rows=np.arange(num),
        )

    settings = {"place": "match", "min_score": 0.4, "max_cycle_mm": 10.0}
    monkeypatch.setattr(store, "config", store.config | settings)
    monkeypatch.setattr(store, "members", members)
    return store


def test_a_weak_match_is_near_one_of_the_limits(matched: PatchStore) -> None:
    assert weak_limits(matched) == (0.5, 7.0)
    weak = find_weak(matched, 0, matched.members(0))
    assert weak.tolist() == [False, False, False, True, True, False]


def test_the_reference_is_not_counted(matched: PatchStore) -> None:
    assert describe_matching(matched, 0) == Matching(
        body_share=1.0, median_score=0.8, weak_members=2
    )
    matched.config["min_score"] = 0.95  # the reference is less than 0.1 above it
    assert describe_matching(matched, 0).weak_members == 5


def test_members_that_were_not_matched_have_no_scores(store: PatchStore) -> None:
    assert describe_matching(store, 0) == Matching(
        body_share=1.0, median_score=None, weak_members=None
    )


def test_lists_and_quality_agree(patches: PatchStore) -> None:
    listed = {row["class"]: row for row in describe_store(patches)["classes"]}
    for row in describe_classes(patches, quality=True):
        for name in ("body_share", "median_score", "weak_members"):
            assert row[name] == listed[row["class"]][name]
            assert row[name] is not None
