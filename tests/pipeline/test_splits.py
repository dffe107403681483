"""Which scans belong to one patient, and which patients are for validation."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.splits import NO_PAIRS, split_patients
from store.errors import SemgenError

PATIENTS = np.array(["d", "a", "a", "c", "d", "b", "e", "f", "f", "f"])


def split(
    keys: Sequence[str] | NDArray[np.str_],
    *,
    scan: Sequence[int] | NDArray[np.intp] | None = None,
    wanted: Sequence[int] | None = None,
    same: NDArray[np.intp] = NO_PAIRS,
    seed: int = 0,
    fraction: float = 0.4,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Number and split by scan; one scan for each key unless `scan` is given."""
    return split_patients(
        scan=np.arange(len(keys)) if scan is None else np.array(scan),
        patient=np.array(keys),
        wanted_split=np.full(len(keys), -1) if wanted is None else np.array(wanted),
        same=same,
        config=PrepareConfig(seed=seed, validation_fraction=fraction),
    )


@pytest.mark.parametrize("seed", range(5))
def test_all_scans_of_a_patient_are_in_one_split(seed: int) -> None:
    _, found = split(PATIENTS, seed=seed)
    for key in set(PATIENTS.tolist()):
        assert len(set(found[key == PATIENTS].tolist())) == 1


@pytest.mark.parametrize(
    ("fraction", "num_patients"), [(0.0, 0), (0.01, 1), (0.34, 2), (0.5, 3), (0.9, 5)]
)
def test_validation_has_its_share_of_patients_and_training_at_least_one(
    fraction: float, num_patients: int
) -> None:
    _, found = split(PATIENTS, fraction=fraction)
    assert len(set(PATIENTS[found == 1].tolist())) == num_patients


def test_a_single_patient_is_for_training() -> None:
    assert split(["a", "a"], fraction=0.5)[1].tolist() == [0, 0]


def test_patients_are_numbered_by_their_first_scan_whatever_their_keys() -> None:
    number, found = split(PATIENTS)
    assert number.tolist() == [0, 1, 1, 2, 0, 3, 4, 5, 5, 5]
    renamed = [f"{255 - ord(key)}" for key in PATIENTS.tolist()]
    np.testing.assert_array_equal((number, found), split(renamed))


SHARED: list[tuple[int, str]] = [
    (0, "a"), (1, "b"), (2, "c"), (3, "b"), (3, "c"), (4, "d"), (5, "a"), (6, "c"), (6, "e"),
    (7, "e"), (8, "f"),
]  # fmt: skip
"""(scan, patient): b and c have scan 3, c and e scan 6, so that b, c and e are one patient."""


def test_patients_with_a_scan_in_common_are_one_also_through_others() -> None:
    scan, keys = zip(*SHARED, strict=True)
    number, _ = split(keys, scan=scan)
    assert number.tolist() == [0, 1, 1, 1, 2, 0, 1, 1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_entries_does_not_matter(seed: int) -> None:
    scan, keys = zip(*SHARED, strict=True)
    order = np.random.default_rng(seed).permutation(len(SHARED))
    shuffled = split(np.array(keys)[order], scan=np.array(scan)[order], seed=seed)
    np.testing.assert_array_equal(shuffled, split(keys, scan=scan, seed=seed))


def test_splits_follow_the_manifest_and_the_rest_is_drawn() -> None:
    wanted = [1, 1, 0, -1, -1, -1, -1, -1, -1, -1, -1]
    _, found = split(list("aabcdefghij"), wanted=wanted, fraction=0.3)
    assert found[:3].tolist() == [1, 1, 0]
    assert found.sum() == 4  # three of ten patients, one of them with two scans


def test_a_patient_wanted_in_both_splits_is_refused() -> None:
    with pytest.raises(SemgenError, match=r"scans of 1 patient\(s\) to both splits"):
        split(["a", "a"], wanted=[0, 1])


def test_a_manifest_that_leaves_no_patient_for_training_is_refused() -> None:
    with pytest.raises(SemgenError, match="no patient for training"):
        split(["a", "b"], wanted=[1, 1])


def test_pairs_that_are_the_same_join_their_patients() -> None:
    same = np.array([[0, 2], [2, 3]])
    number, _ = split(list("abcd"), same=same)
    assert number.tolist() == [0, 1, 0, 0]


def test_pairs_that_a_manifest_wants_in_both_splits_are_ignored() -> None:
    same = np.array([[0, 1], [2, 3]])
    number, found = split(list("abcd"), same=same, wanted=[0, 1, -1, -1])
    assert number.tolist() == [0, 1, 2, 2]
    assert found[:2].tolist() == [0, 1]
