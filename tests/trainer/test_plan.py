"""Which rows a run reads, in which order."""

import numpy as np
import pytest

from trainer.data.plan import EpochPlan, select_rows, thin
from trainer.seeds import derive_seeds

ROWS = np.arange(100, 203, dtype=np.int64)


def plan(**changes: int | bool) -> EpochPlan:
    return EpochPlan(**{"rows": ROWS, "batch_size": 16, "seed": 3, **changes})


@pytest.mark.parametrize("batch_size", [1, 7, 16, 103, 500])
def test_an_epoch_covers_every_row_once(batch_size: int) -> None:
    batches = plan(batch_size=batch_size).batches(0)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), ROWS)


def test_ranks_share_every_batch_without_overlap() -> None:
    whole = plan().batches(2)
    parts = [plan(rank=rank, world_size=3).batches(2) for rank in range(3)]
    for index, batch in enumerate(whole):
        joined = np.concatenate([part[index] for part in parts])
        np.testing.assert_array_equal(joined, batch)


def test_batches_of_an_epoch_differ_by_one_row_at_most() -> None:
    sizes = {len(batch) for batch in plan().batches(0)}
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    np.testing.assert_array_equal(plan().order(4), plan().order(4))


@pytest.mark.parametrize("other", [plan(seed=4).order(0), plan().order(1)])
def test_another_seed_or_epoch_gives_another_order(other: np.ndarray) -> None:
    assert (plan().order(0) != other).mean() > 0.9


def test_without_shuffling_rows_keep_their_order() -> None:
    np.testing.assert_array_equal(np.concatenate(plan(shuffle=False).batches(5)), ROWS)


def test_an_epoch_has_as_many_batches_as_the_plan_says() -> None:
    assert len(plan().batches(0)) == len(plan()) == 7


def test_no_rows_make_no_batches() -> None:
    empty = EpochPlan(rows=ROWS[:0], batch_size=4)
    assert (len(empty), empty.batches(0)) == (0, [])


def test_rows_are_selected_by_scale_and_class() -> None:
    label, scale = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 2, 0, 1])
    assert select_rows(label, scale).tolist() == [0, 1, 2, 3, 4, 5]
    assert select_rows(label, scale, scales=[0, 1], excluded=[2]).tolist() == [0, 1, 2]


def test_thinned_rows_still_hold_every_class() -> None:
    label = np.repeat(np.arange(5), 20)
    kept = thin(np.arange(100), 10)
    assert np.bincount(label[kept]).tolist() == [2, 2, 2, 2, 2]


def test_seeds_of_different_roles_and_indices_differ() -> None:
    seeds = {derive_seeds(s, role, i) for s in range(3) for role in ("a", "b") for i in range(50)}
    assert len(seeds) == 300


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2, "world_size": 2}])
def test_an_impossible_plan_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        plan(**wrong)
