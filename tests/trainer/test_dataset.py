"""Batches of crops from a store: order, cache, corrupt rows."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from store import CorruptStore, PatchStore
from tests.support.synthetic_store import make_store
from trainer import Batch, PatchDataset, TrainError
from trainer.data.cache import make_cache
from trainer.data.plan import EpochPlan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    return PatchStore(make_store(tmp_path_factory.mktemp("data") / "tiny.store"))


def make_plan(store: PatchStore) -> EpochPlan:
    return EpochPlan(rows=np.arange(len(store.train)), batch_size=10, seed=1)


def open_dataset(store: PatchStore, **options: Any) -> PatchDataset:
    return PatchDataset(store, **{"batch_size": 10, "seed": 1, "cache": "none", **options})


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.crops, other.crops)
        assert torch.equal(one.labels, other.labels)


def test_images_are_the_hu_window_mapped_to_zero_and_one(store: PatchStore) -> None:
    dataset = open_dataset(store)
    dataset.window_hu = (-200.0, 300.0)
    batch = next(dataset.batches(0))
    images = batch.images()
    hu = store.train.read(batch.rows).astype(np.float64)
    expected = np.clip((hu + 200) / 500, 0, 1)[:, None]
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert images.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of train, validation, got 'test'"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"threads": "2"}, "threads must be a whole number, got '2'"),
        ({"fraction": "x"}, "fraction must be in"),
        ({"device": "abacus"}, "device must be one of PyTorch, got 'abacus'"),
        ({"classes": []}, "classes must be None for all, or not empty"),
        ({"scales": 0}, "scales must be a list or array of whole numbers, got 0"),
        ({"fraction": 3}, "fraction must be in"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"cache": "disk"}, "cache must be one of auto, none"),
        ({"max_batches": 0}, "max_batches must be >= 1"),
        ({"normalise": "z-score"}, "normalise must be one of window, zscore"),
        ({"scales": [9]}, "scales: the store has scales 0 to 2, not 9"),
        ({"rows": [10**6]}, "rows: the split has rows 0 to 71, not 1000000"),
    ],
)
def test_wrong_settings_are_refused(
    store: PatchStore, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        open_dataset(store, **options)


def test_labels_belong_to_their_rows(store: PatchStore) -> None:
    for batch in open_dataset(store).batches(0):
        assert batch.labels.tolist() == store.train.label[batch.rows].tolist()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_order_is_that_of_the_plan_for_any_number_of_threads(
    store: PatchStore, threads: int
) -> None:
    streamed = [batch.rows for batch in open_dataset(store, threads=threads).batches(2)]
    for ours, planned in zip(streamed, make_plan(store).batches(2), strict=True):
        np.testing.assert_array_equal(ours, planned)


def test_an_epoch_can_start_at_any_batch(store: PatchStore) -> None:
    whole = list(open_dataset(store).batches(1))
    assert_same(list(open_dataset(store).batches(1, start=5)), whole[5:])


@pytest.fixture
def broken(store: PatchStore, tmp_path: Path) -> PatchStore:
    """The store with one bit of train row 20 flipped."""
    copy = PatchStore(shutil.copytree(store.path, tmp_path / "broken.store"))
    # The second shard begins with its first row, row 16; row 20 lies a few chunks on.
    offset, _ = copy.train.patch._chunks._index(1)[20 - 16]
    file = Path(copy.train.patch._chunks.file(1))
    content = bytearray(file.read_bytes())
    content[offset + 40] ^= 1
    file.write_bytes(content)
    return copy


def test_a_corrupt_crop_stops_the_stream_and_is_named(broken: PatchStore) -> None:
    with pytest.raises(CorruptStore, match=r"train rows 20\b") as caught:
        list(open_dataset(broken).batches(0))
    assert (caught.value.split, caught.value.rows) == ("train", [20])


def test_corrupt_crops_are_skipped_and_counted_on_request(broken: PatchStore) -> None:
    dataset = open_dataset(broken, skip_corrupt=True)
    rows = np.concatenate([batch.rows for batch in dataset.batches(0)])
    assert sorted(rows.tolist()) == [row for row in range(72) if row != 20]
    assert dataset.skipped == {20}


def test_corrupt_crops_in_a_worker_are_counted_and_named(broken: PatchStore) -> None:
    options: dict[str, Any] = {"batch_size": None, "num_workers": 2}
    options["multiprocessing_context"] = "fork"
    dataset = open_dataset(broken, skip_corrupt=True)
    assert sum(len(batch) for batch in DataLoader(dataset, **options)) == 71
    assert dataset.skipped == {20}
    with pytest.raises(CorruptStore, match=r"train rows 20\b"):
        list(DataLoader(open_dataset(broken), **options))


def test_skipping_does_not_change_the_other_crops(broken: PatchStore, store: PatchStore) -> None:
    for batch in open_dataset(broken, skip_corrupt=True).batches(0):
        assert_same([batch], [open_dataset(store).read(batch.rows)])


def test_a_cached_epoch_reads_nothing_and_is_the_same(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(store, cache="memory")
    list(dataset.batches(0))
    plain = list(open_dataset(store).batches(1))
    monkeypatch.setattr(store.train.patch, "read_into", None)
    assert_same(list(dataset.batches(1)), plain)


def test_an_epoch_that_starts_in_the_middle_fills_the_cache_later(
    store: PatchStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = open_dataset(store, cache="memory")
    for epoch, start in ((0, 5), (1, 0), (2, 0)):
        for batch in dataset.batches(epoch, start=start):
            assert_same([batch], [open_dataset(store).read(batch.rows)])
    monkeypatch.setattr(store.train.patch, "read_into", None)
    assert len(list(dataset.batches(3))) == len(dataset)


def test_a_cache_that_does_not_fit_is_refused_and_auto_uses_none(store: PatchStore) -> None:
    many = np.broadcast_to(np.int64(0), 10**9)
    assert make_cache("auto", many, (32, 64, 64), CPU) is None
    with pytest.raises(TrainError, match=r"GiB of crops do not fit.*use --cache auto"):
        make_cache("memory", many, (32, 64, 64), CPU)


def test_a_stream_left_early_leaves_no_thread_behind(store: PatchStore) -> None:
    batches = open_dataset(store, threads=3).batches(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
