"""Rows are read as they were written, and broken ones are named."""

import json
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from store import CorruptStore, PatchStore, StoreError
from store.reader import Split
from store.sharded import ShardedReader
from store.writer import write_shard
from tests.support.crops import (
    CROP,
    NAME,
    NUM_ROWS,
    ROWS_PER_SHARD,
    change_attribute,
    flip_bit,
    shard_file,
)


@pytest.mark.parametrize("seed", range(3))
def test_any_rows_in_any_order_come_back_as_written(
    written: Path, truth: NDArray[np.int16], seed: int
) -> None:
    rows = np.random.default_rng(seed).integers(0, NUM_ROWS, 50)  # with repeats
    np.testing.assert_array_equal(ShardedReader(written, NAME).read(rows), truth[rows])


def test_no_rows_are_an_empty_array(written: Path) -> None:
    assert ShardedReader(written, NAME).read([]).shape == (0, *CROP)


@pytest.mark.parametrize("row", [-1, NUM_ROWS])
def test_a_row_that_the_array_does_not_have_is_refused(written: Path, row: int) -> None:
    with pytest.raises(IndexError, match=r"must be in \[0, 21\)"):
        ShardedReader(written, NAME).read([0, row])


@pytest.mark.parametrize(
    "rows",
    [slice(3, 9), slice(None, None, 5), slice(-2, None), np.arange(NUM_ROWS) % 3 == 0, [2, 2, 1]],
    ids=["slice", "every fifth", "the last two", "mask", "twice"],
)
def test_rows_are_understood_as_numpy_understands_them(
    written: Path, truth: NDArray[np.int16], rows: Any
) -> None:
    np.testing.assert_array_equal(ShardedReader(written, NAME).read(rows), truth[rows])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (3, "must be a list, got 0 axes"),
        ([[0, 1], [2, 3]], "must be a list, got 2 axes"),
        ([0.0, 1.0], "whole numbers, got float64"),
        ([True, False], "a mask of train/patch must have 21 values, got 2"),
    ],
)
def test_invalid_rows_are_refused(written: Path, rows: Any, words: str) -> None:
    with pytest.raises((IndexError, TypeError), match=words):
        ShardedReader(written, NAME).read(rows)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_split_is_read_by_a_process_of_its_own(patches: PatchStore, method: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        found = pool.submit(Split.read, patches.train, [0, 1]).result()
    np.testing.assert_array_equal(found, patches.train.read([0, 1]))


def test_a_pickled_store_is_the_same_store_or_refused(copy: Path) -> None:
    store = PatchStore(copy)
    packed = pickle.dumps((store, store.train, store.train.patch))
    again, split, patch = pickle.loads(packed)
    assert again.fingerprint == store.fingerprint
    np.testing.assert_array_equal(split.label, store.train.label)
    np.testing.assert_array_equal(patch.read([1]), split.read([1]))
    change_attribute(copy, "fingerprint", "0" * 64)
    with pytest.raises(StoreError, match="changed since it was opened"):
        pickle.loads(packed)


def test_several_threads_may_share_a_reader(written: Path, truth: NDArray[np.int16]) -> None:
    reader = ShardedReader(written, NAME)
    orders = [np.random.default_rng(seed).permutation(NUM_ROWS) for seed in range(32)]
    with ThreadPoolExecutor(8) as pool:
        for rows, crops in zip(orders, pool.map(reader.read, orders), strict=True):
            np.testing.assert_array_equal(crops, truth[rows])


def test_plain_zarr_reads_the_same_crops(written: Path, truth: NDArray[np.int16]) -> None:
    np.testing.assert_array_equal(zarr.open_array(str(written / NAME), mode="r")[...], truth)


def test_shards_that_plain_zarr_wrote_are_read(written: Path, truth: NDArray[np.int16]) -> None:
    zarr.open_array(str(written / NAME), mode="r+")[...] = truth[::-1]
    np.testing.assert_array_equal(ShardedReader(written, NAME).read(range(NUM_ROWS)), truth[::-1])


def test_a_crop_is_a_chunk_with_a_checksum_in_a_shard(written: Path) -> None:
    sharding = json.loads((written / NAME / "zarr.json").read_text())["codecs"][0]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, *CROP]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]][-1] == "crc32c"


@pytest.mark.parametrize("rows", [[9], [8, 9, 10, 11]], ids=["one crop", "a whole shard"])
def test_crops_of_zeros_are_stored(
    written: Path, truth: NDArray[np.int16], rows: list[int]
) -> None:
    crops = truth.copy()
    crops[rows] = 0
    write_shard(written, NAME, 2, crops[8:12])
    np.testing.assert_array_equal(ShardedReader(written, NAME).read(range(NUM_ROWS)), crops)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((3, *CROP), np.int16),
        np.zeros((5, *CROP), np.int16),
        np.zeros((4, 4, 6, 6), np.int16),
        np.zeros((4, *CROP), np.int32),
    ],
    ids=["too few rows", "too many rows", "another crop shape", "another dtype"],
)
def test_only_whole_shards_can_be_written(
    written: Path, values: NDArray[np.int16], truth: NDArray[np.int16]
) -> None:
    with pytest.raises(ValueError, match="write whole shards only"):
        write_shard(written, NAME, 1, values)
    np.testing.assert_array_equal(ShardedReader(written, NAME).read(range(NUM_ROWS)), truth)


def test_the_last_shard_may_be_short_but_not_padded(written: Path) -> None:
    with pytest.raises(ValueError, match=r"takes \(1, 4, 6, 5\) int16, got \(4, 4, 6, 5\)"):
        write_shard(written, NAME, 5, np.zeros((4, *CROP), np.int16))


def test_a_shard_has_the_digest_that_writing_it_gave(
    written: Path, truth: NDArray[np.int16]
) -> None:
    digest = write_shard(written, NAME, 2, truth[8:12] + np.int16(1))
    assert ShardedReader(written, NAME).digest(2) == digest
    assert ShardedReader(written, NAME).digest(1) != digest


def assert_broken(path: Path, rows: list[int], truth: NDArray[np.int16]) -> None:
    """Exactly these rows are named, whatever else is read with them, and the others are whole."""
    reader = ShardedReader(path, NAME)
    asked = np.random.default_rng(1).permutation(NUM_ROWS)
    with pytest.raises(CorruptStore) as caught:
        reader.read(asked)
    assert (caught.value.split, caught.value.rows) == ("train", rows)
    whole = [row for row in range(NUM_ROWS) if row not in rows]
    np.testing.assert_array_equal(reader.read(whole), truth[whole])


def places_of(path: Path, shard: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk, from the index at the shard's end."""
    raw = shard_file(path, shard).read_bytes()
    index = np.frombuffer(raw[-16 * ROWS_PER_SHARD - 4 : -4], "<u8").reshape(-1, 2)
    return [tuple(line) for line in index.tolist()]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_breaks_the_crop_that_it_hits(
    written: Path, truth: NDArray[np.int16], where: str
) -> None:
    offset, length = places_of(written, 2)[1]
    flip_bit(
        shard_file(written, 2),
        offset + {"first": 0, "middle": length // 2, "last": length - 1}[where],
    )
    assert_broken(written, [9], truth)


def test_flipped_bits_in_two_shards_are_reported_together(
    written: Path, truth: NDArray[np.int16]
) -> None:
    for shard, chunk in ((0, 3), (4, 0)):
        flip_bit(shard_file(written, shard), places_of(written, shard)[chunk][0] + 30)
    assert_broken(written, [3, 16], truth)


def test_a_flipped_bit_in_the_index_breaks_its_shard(
    written: Path, truth: NDArray[np.int16]
) -> None:
    flip_bit(shard_file(written, 2), -20)
    assert_broken(written, [8, 9, 10, 11], truth)


@pytest.mark.parametrize("left", [0, 3, 200, -1])
def test_a_truncated_shard_breaks_its_rows(
    written: Path, truth: NDArray[np.int16], left: int
) -> None:
    file = shard_file(written, 1)
    file.write_bytes(file.read_bytes()[:left])
    assert_broken(written, [4, 5, 6, 7], truth)


def test_a_missing_shard_breaks_its_rows(written: Path, truth: NDArray[np.int16]) -> None:
    shard_file(written, 5).unlink()
    assert_broken(written, [20], truth)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: flip_bit(file, 100),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        Path.unlink,
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_a_broken_shard_has_no_digest(written: Path, damage: Callable[[Path], object]) -> None:
    damage(shard_file(written, 1))
    assert ShardedReader(written, NAME).digest(1) is None
