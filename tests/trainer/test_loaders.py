"""PatchDataset in loops of one's own: DataLoader, StatefulDataLoader, Lightning, MONAI, ranks."""

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from store import PatchStore, annotate
from tests.support.synthetic_store import make_store
from trainer import Batch, PatchDataset, TrainConfig, TrainError, perturb
from trainer.data.epochs import EpochCounter
from trainer.ranks import Ranks

NUM_ROWS, BATCH_SIZE = 72, 8  # 9 batches: two workers have different numbers of them


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "tiny.store", shape=(8, 16, 16))


def open_dataset(store: Path | PatchStore, **options: Any) -> PatchDataset:
    return PatchDataset(store, **{"batch_size": BATCH_SIZE, "seed": 3, **options})


def load(dataset: PatchDataset, **options: Any) -> DataLoader[Batch]:
    return DataLoader(dataset, batch_size=None, **options)


def rows_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def join(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def planned(dataset: PatchDataset, epoch: int) -> list[list[int]]:
    return [rows.tolist() for rows in dataset.plan.batches(epoch)]


# Epochs


def test_each_pass_is_the_next_epoch_of_the_plan(store: Path) -> None:
    dataset = open_dataset(store)
    assert len(dataset) == 9
    for epoch in range(3):
        assert rows_of(dataset) == planned(dataset, epoch)
    dataset.set_epoch(1)
    assert rows_of(dataset) == planned(dataset, 1)
    with pytest.raises(TrainError, match="epoch must be a whole number >= 0, got -1"):
        dataset.set_epoch(-1)


def test_a_pass_that_was_left_early_is_followed_by_the_next_epoch(store: Path) -> None:
    dataset = open_dataset(store)
    next(iter(dataset))
    assert rows_of(dataset) == planned(dataset, 1)


def test_validation_crops_come_in_store_order(store: Path) -> None:
    dataset = open_dataset(store, split="validation")
    for _ in range(2):
        assert join(rows_of(dataset)) == list(range(len(PatchStore(store).validation)))


def test_classes_scales_and_excluded_classes_choose_rows(store: Path) -> None:
    train = PatchStore(store).train
    dataset = open_dataset(store, classes=[1, 2], scales=[0], excluded_classes=[2])
    rows = np.concatenate([batch.rows for batch in dataset])
    assert set(train.label[rows]) == {1}
    assert set(train.scale[rows]) == {0}
    assert len(rows) == ((train.label == 1) & (train.scale == 0)).sum()
    dataset = open_dataset(store, classes=[1], rows=[0, *np.flatnonzero(train.label == 1)[:3]])
    assert set(join(rows_of(dataset))) == {*np.flatnonzero(train.label == 1)[:3].tolist()}
    with pytest.raises(TrainError, match="classes: the store has classes 0 to 5, not 9"):
        open_dataset(store, classes=[1, 9])


def test_excluded_members_are_left_out_of_their_class_alone(store: Path) -> None:
    train = PatchStore(store).train
    dataset = open_dataset(store, excluded_members=["2=0000000000000001"])
    left_out = (train.label == 2) & (train.scan == 1)
    assert sorted(join(rows_of(dataset))) == np.flatnonzero(~left_out).tolist()
    assert {*train.scale[left_out].tolist()} == {0, 1, 2}
    with pytest.raises(
        TrainError, match=r"excluded_members: .* class 2 has no member with scan id"
    ):
        open_dataset(store, excluded_members=["2=0000000000000009"])
    with pytest.raises(TrainError, match="give class and scan id, such as"):
        open_dataset(store, excluded_members=["liver"])


@pytest.mark.parametrize(("split", "scan"), [("train", 1), ("validation", 3)])
def test_members_excluded_by_the_annotation_are_left_out_by_default(
    store: Path, tmp_path: Path, split: str, scan: int
) -> None:
    mine = shutil.copytree(store, tmp_path / "mine.store")
    annotate(mine, {2: {"excluded_members": [1, 3]}, 4: {"excluded": True}})
    table = PatchStore(mine).split(split)
    wanted = (table.label != 4) & ~((table.label == 2) & (table.scan == scan))
    assert sorted(join(rows_of(open_dataset(mine, split=split)))) == np.flatnonzero(wanted).tolist()
    all_rows = open_dataset(mine, split=split, excluded_classes=(), excluded_members=())
    assert len(join(rows_of(all_rows))) == len(table)


# Workers


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_workers_share_each_epoch_without_reading_a_row_twice(store: Path, context: str) -> None:
    dataset = open_dataset(store)
    loader = load(dataset, num_workers=2, multiprocessing_context=context)
    for epoch in range(1 if context == "forkserver" else 2):
        assert rows_of(loader) == planned(dataset, epoch)


def test_workers_that_are_kept_read_the_next_epoch(store: Path) -> None:
    dataset = open_dataset(store)
    loader = load(dataset, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in range(3):
        assert rows_of(loader) == planned(dataset, epoch)
    dataset.set_epoch(7)
    assert rows_of(loader) == planned(dataset, 7)


def test_workers_agree_on_the_epoch_after_a_pass_was_left_at_once(store: Path) -> None:
    dataset = open_dataset(store)
    loader = load(dataset, num_workers=2, multiprocessing_context="fork")
    next(iter(loader))
    assert rows_of(loader) in (planned(dataset, 0), planned(dataset, 1))


def note_epochs(counter: EpochCounter, barrier: Any, results: Any) -> None:
    found = []
    for _ in range(200):
        barrier.wait()
        found.append(counter.begin(key=7))
    results.put(found)


def test_workers_that_begin_a_pass_at_the_same_moment_take_the_same_epoch() -> None:
    context = torch.multiprocessing.get_context("fork")
    counter, barrier, results = EpochCounter(), context.Barrier(4), context.Queue()
    arguments = (counter, barrier, results)
    workers = [context.Process(target=note_epochs, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert results.get(timeout=60) == list(range(200))
    for worker in workers:
        worker.join()


def test_a_copy_counts_its_own_epochs(store: Path) -> None:
    dataset = open_dataset(store)
    list(dataset)
    other = copy.deepcopy(dataset)
    assert rows_of(dataset) == rows_of(other) == planned(dataset, 1)


def test_workers_do_not_read_into_the_memory_of_a_gpu(store: Path) -> None:
    loader = load(open_dataset(store, device="meta"), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(TrainError, match="DataLoader workers read into main memory"):
        list(loader)


# Processes


def test_processes_share_every_batch(store: Path) -> None:
    parts = [rows_of(open_dataset(store, ranks=Ranks(rank, 3))) for rank in range(3)]
    joined = [join(batch) for batch in zip(*parts, strict=True)]
    assert joined == planned(open_dataset(store), 0)


def test_workers_of_processes_read_the_part_of_their_process(store: Path) -> None:
    dataset = open_dataset(store, ranks=Ranks(1, 3))
    loader = load(dataset, num_workers=2, multiprocessing_context="fork")
    assert rows_of(loader) == planned(dataset, 0)


# Resuming


@pytest.mark.parametrize("num_read", [0, 4, 9, 12])
def test_a_loaded_state_resumes_at_the_next_batch(store: Path, num_read: int) -> None:
    whole = open_dataset(store)
    expected = [batch for epoch in range(3) for batch in planned(whole, epoch)]
    first, seen = open_dataset(store), []
    passes = iter(batch for _ in range(2) for batch in first)
    seen += rows_of(next(passes) for _ in range(num_read))
    resumed = open_dataset(store)
    resumed.load_state_dict(first.state_dict())
    while len(seen) < len(expected):
        seen += rows_of(resumed)
    assert seen == expected


def test_a_state_after_a_whole_pass_is_followed_by_the_next_epoch(store: Path) -> None:
    first, resumed = open_dataset(store), open_dataset(store)
    list(first)
    resumed.load_state_dict(first.state_dict())
    assert rows_of(resumed) == planned(first, 1)


def test_a_state_without_workers_is_refused_by_workers(store: Path) -> None:
    first, resumed = open_dataset(store), open_dataset(store)
    next(iter(first))
    resumed.load_state_dict(first.state_dict())
    loader = load(resumed, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(TrainError, match="is one of 0 DataLoader workers, not 2"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_resumes_at_the_next_batch(store: Path, num_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": None, "num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = "fork"
    dataset = open_dataset(store)
    expected = [planned(dataset, epoch) for epoch in range(3)]
    loader = StatefulDataLoader(dataset, **options)
    assert rows_of(loader) == expected[0]
    batches = iter(loader)
    seen = rows_of(next(batches) for _ in range(5))
    state = loader.state_dict()
    resumed = StatefulDataLoader(open_dataset(store), **options)
    resumed.load_state_dict(state)
    assert seen + rows_of(resumed) == expected[1]
    assert rows_of(resumed) == expected[2]


def test_a_state_of_another_order_is_refused(store: Path) -> None:
    state = open_dataset(store).state_dict()
    with pytest.raises(TrainError, match=r"another order \(batch_size: 8 -> 9; seed: 3 -> 4\)"):
        open_dataset(store, batch_size=9, seed=4).load_state_dict(state)
    with pytest.raises(TrainError, match=r"processes: 1 -> 2"):
        open_dataset(store, ranks=Ranks(0, 2)).load_state_dict(state)
    with pytest.raises(TrainError, match="version 2, but this version of semgen reads version 1"):
        open_dataset(store).load_state_dict({**state, "version": 2})


# Batches


def test_a_batch_moves_to_a_device_with_all_its_tensors(store: Path) -> None:
    batch = next(iter(open_dataset(store, normalise="zscore")))
    moved = batch.to("meta")
    assert moved.zscores is not None
    for values in (moved.crops, moved.labels, moved.zscores.gain, moved.zscores.offset):
        assert values.device.type == "meta"
    assert batch.crops.device.type == "cpu"


def test_perturbations_depend_on_seed_epoch_and_row_alone(store: Path) -> None:
    dataset, config = open_dataset(store), TrainConfig(pretext="inpainting", seed=1)
    batch = next(dataset.batches(0))
    inputs, target, mask = perturb(batch, config)
    assert torch.equal(target, batch.images())
    assert mask is None
    one = dataclasses.replace(
        batch, rows=batch.rows[2:3], crops=batch.crops[2:3], labels=batch.labels[2:3]
    )
    assert torch.equal(perturb(one, config).inputs, inputs[2:3])
    for other in (
        perturb(dataclasses.replace(batch, epoch=1), config),
        perturb(batch, dataclasses.replace(config, seed=2)),
    ):
        assert not torch.equal(other.inputs, inputs)
