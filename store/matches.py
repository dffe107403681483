"""How well the members of a class matched its reference, and which of them only just passed.

From the tables; no crop is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from store.format import SPLITS
from store.reader import Members, PatchStore

SCORE_MARGIN: Final = 0.1
"""A match whose score is less than this above the store's `min_score` only just passed."""
CYCLE_SHARE: Final = 0.7
"""A match whose there-and-back distance is above this share of `max_cycle_mm` only just passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """The members of a class in both splits; the reference is not counted."""

    body_share: float | None
    """Share of the reference's base crop that is body; None in a store of format 1."""
    median_score: float | None
    """Median match score of the members; None if there are none or if they were not matched."""
    weak_members: int | None
    """Members whose match only just passed; None if they were not matched."""


def describe_matching(store: PatchStore, label: int) -> Matching:
    """What the tables say about one class; rounded to 4 digits."""
    body_share = round(float(store.classes.body_share[label]), 4) if store.format > 1 else None
    if not store.is_matched:
        return Matching(body_share=body_share, median_score=None, weak_members=None)
    members = [store.members(label, split) for split in SPLITS]
    others = np.concatenate([m.scans for m in members]) != store.classes.reference[label]
    scores = np.concatenate([m.scores for m in members])[others]
    return Matching(
        body_share=body_share,
        median_score=round(float(np.median(scores)), 4) if len(scores) else None,
        weak_members=sum(int(find_weak(store, label, m).sum()) for m in members),
    )


def find_weak(store: PatchStore, label: int, members: Members) -> NDArray[np.bool_]:
    """(n,) whether the match of each of the members of a class only just passed.

    False for the reference, and for all if members were not matched.
    """
    if not store.is_matched:
        return np.zeros(len(members), bool)
    score, cycle_mm = weak_limits(store)
    weak = (members.scores < score) | (members.cycles > cycle_mm)
    return np.asarray(weak & (members.scans != store.classes.reference[label]))


def weak_limits(store: PatchStore) -> tuple[float, float]:
    """Score below which, and distance in mm above which, a match only just passed.

    For a store whose members were matched.
    """
    score, cycle_mm = store.config["min_score"], store.config["max_cycle_mm"]
    return round(score + SCORE_MARGIN, 6), round(CYCLE_SHARE * cycle_mm, 6)
