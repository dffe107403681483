"""The patch store: what is written is read, by us and by plain zarr, and damage is named."""

import json
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from store import ClassNote, CorruptStore, PatchStore, StoreError, annotate, read_annotation
from store.format import SPLITS, TABLES, format_rows
from store.group import compute_fingerprint
from store.layout import ShardGrid
from store.reader import ShardedReader, Split
from store.verification import Problem, verify
from store.writer import StoreWriter, write_shard
from tests.support.progress import CountedProgress
from tests.support.synthetic_store import make_store

NUM_ROWS, ROWS_PER_SHARD = 21, 4
CROP = (4, 6, 5)
NAME = "train/patch"


# Layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "rows_per_shard"), [(0, 4), (1, 4), (4, 4), (10, 4), (7, 1)])
def test_shards_hold_every_row_once_and_in_order(num_rows: int, rows_per_shard: int) -> None:
    grid = ShardGrid(num_rows=num_rows, rows_per_shard=rows_per_shard)
    rows = [row for shard in range(grid.num_shards) for row in grid.rows_of(shard)]
    assert rows == list(range(num_rows))


def test_shard_of_names_the_shard_that_holds_a_row() -> None:
    grid = ShardGrid(num_rows=10, rows_per_shard=4)
    assert all(row in grid.rows_of(grid.shard_of(row)) for row in range(10))


@pytest.mark.parametrize(("first", "stop"), [(0, 10), (3, 4), (3, 5), (8, 10), (5, 5)])
def test_shards_of_names_the_shards_of_consecutive_rows(first: int, stop: int) -> None:
    grid = ShardGrid(num_rows=10, rows_per_shard=4)
    expected = sorted({grid.shard_of(row) for row in range(first, stop)})
    assert list(grid.shards_of(range(first, stop))) == expected


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_the_grid_does_not_have_is_refused(shard: int) -> None:
    with pytest.raises(IndexError, match=r"shard must be in \[0, 3\)"):
        ShardGrid(num_rows=10, rows_per_shard=4).rows_of(shard)


def test_a_grid_of_empty_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="rows_per_shard >= 1"):
        ShardGrid(num_rows=10, rows_per_shard=0)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([3], "3"),
        ([9, 7, 8, 3], "3, 7-9"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, 10, 12, 14, ... (20 in all)"),
    ],
)
def test_rows_are_printed_as_ranges_and_long_lists_are_shortened(
    rows: list[int], text: str
) -> None:
    assert format_rows(rows) == text


# Writing and reading -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth() -> NDArray[np.int16]:
    """Crops of noise, rough enough that every bit counts."""
    rng = np.random.default_rng(0)
    return rng.integers(-1000, 1000, (NUM_ROWS, *CROP), endpoint=True).astype(np.int16)


@pytest.fixture
def written(tmp_path: Path, truth: NDArray[np.int16]) -> Path:
    """A store with nothing but `truth`."""
    path = tmp_path / "crops.store"
    writer = StoreWriter.create(path, config={}, software={})
    grid = writer.create_sharded(
        NAME, shape=truth.shape, dtype="int16", rows_per_shard=ROWS_PER_SHARD
    )
    for shard in reversed(range(grid.num_shards)):
        write_shard(path, NAME, shard, truth[list(grid.rows_of(shard))])
    return path


def shard_file(path: Path, shard: int) -> Path:
    return path / NAME / f"c/{shard}/0/0/0"


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


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


def test_a_loader_of_torch_reads_a_split_in_spawned_workers(patches: PatchStore) -> None:
    loader: DataLoader[Any] = DataLoader(
        range(4),  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=patches.train.read,
    )
    found = np.concatenate([batch.numpy() for batch in map(torch.as_tensor, loader)])
    np.testing.assert_array_equal(found, patches.train.read(range(4)))


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


def test_tensorstore_reads_the_same_crops(written: Path, truth: NDArray[np.int16]) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(written / NAME)}}
    array = tensorstore.open(spec, read=True).result()
    np.testing.assert_array_equal(array.read().result(), truth)


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


# Broken crops ------------------------------------------------------------------------------------


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


# A whole store -----------------------------------------------------------------------------------


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy.store")


def problems_of(path: Path) -> list[Problem]:
    return list(verify(path))


def test_a_valid_store_has_no_problems(prepared: Path) -> None:
    assert problems_of(prepared) == []


def test_verify_reads_every_row(prepared: Path, patches: PatchStore) -> None:
    progress = CountedProgress()
    list(verify(prepared, progress=progress))
    num_rows = len(patches.scans.id) + len(patches.train) + len(patches.validation)
    assert progress.units["verify"] == progress.totals["verify"] == num_rows


def test_a_store_has_the_arrays_of_the_format_and_no_others(prepared: Path) -> None:
    group = zarr.open_group(str(prepared), mode="r")
    arrays = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == {*TABLES, "scans/thumbnail", "train/patch", "validation/patch"}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_its_dtype_and_shape(prepared: Path, name: str) -> None:
    values = zarr.open_array(str(prepared / name), mode="r")
    assert values.dtype == TABLES[name].dtype
    assert len(values.shape[1:]) == len(TABLES[name].columns)
    assert all(c in (None, n) for c, n in zip(TABLES[name].columns, values.shape[1:]))


@pytest.mark.parametrize(
    ("name", "shard", "rows"),
    [("train/patch", 2, range(16, 24)), ("scans/thumbnail", 0, range(5))],
)
def test_verify_names_the_rows_of_a_truncated_shard(
    copy: Path, name: str, shard: int, rows: range
) -> None:
    file = copy / name / f"c/{shard}/0/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    assert Problem(name, "checksum failed or data missing", tuple(rows)) in problems_of(copy)


@pytest.mark.parametrize("name", ["train/patch", "validation/patch", "scans/thumbnail"])
def test_verify_names_the_row_of_a_flipped_bit(copy: Path, name: str) -> None:
    flip_bit(copy / name / "c/0/0/0/0", 5)  # in the first chunk
    (problem,) = problems_of(copy)
    assert (problem.where, len(problem.rows)) == (name, 1)


def test_verify_finds_two_swapped_shards(copy: Path) -> None:
    one, two = (copy / NAME / f"c/{shard}/0/0/0" for shard in (1, 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    expected = {Problem(NAME, "not what was sealed", tuple(range(n, n + 8))) for n in (8, 16)}
    assert set(problems_of(copy)) == expected


def test_verify_finds_a_rewritten_crop(copy: Path, patches: PatchStore) -> None:
    crops = patches.train.read(range(8)).copy()
    crops[3, 0, 0, 0] ^= 1
    write_shard(copy, NAME, 0, crops)
    assert problems_of(copy) == [Problem(NAME, "not what was sealed", tuple(range(8)))]


@pytest.mark.parametrize("name", TABLES)
def test_verify_finds_a_flipped_bit_in_any_table(copy: Path, name: str) -> None:
    (file,) = (path for path in (copy / name / "c").rglob("*") if path.is_file())
    flip_bit(file, -1)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", ["scans/id", "classes/neighbour", "validation/label"])
def test_verify_finds_a_table_without_its_chunks(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name / "c")
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", ["scans/id", "classes/neighbour", "validation/label"])
def test_verify_finds_a_missing_table(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", ["scans/thumbnail", "train/patch"])
def test_verify_finds_a_missing_array(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", TABLES)
def test_verify_finds_a_rewritten_table(copy: Path, name: str) -> None:
    array = zarr.open_array(str(copy / name), mode="r+")
    values = np.asarray(array[...])
    values.reshape(-1)[0] += 1
    array[...] = values
    assert Problem("store", "fingerprint does not match the content") in problems_of(copy)


def change_attribute(path: Path, name: str, value: object) -> None:
    group = zarr.open_group(str(path), mode="r+")
    group.attrs["semgen"] = {**group.attrs["semgen"], name: value}  # type: ignore[dict-item]


def test_verify_finds_a_changed_fingerprint(copy: Path) -> None:
    change_attribute(copy, "fingerprint", "0" * 64)
    assert problems_of(copy) == [Problem("store", "fingerprint does not match the content")]


def test_verify_finds_changed_settings(copy: Path, patches: PatchStore) -> None:
    change_attribute(copy, "config", {**patches.config, "seed": 1})
    assert problems_of(copy) == [Problem("store", "fingerprint does not match the content")]


def test_verify_finds_other_autoencoder_weights(copy: Path) -> None:
    flip_bit(copy / "scans/embedding/autoencoder.safetensors", -1)
    assert problems_of(copy) == [Problem("store", "fingerprint does not match the content")]


def test_verify_finds_that_the_autoencoder_is_missing(copy: Path) -> None:
    (copy / "scans/embedding/autoencoder.safetensors").unlink()
    assert {problem.where for problem in problems_of(copy)} == {"store"}


def test_verify_finds_a_patient_in_both_splits(copy: Path, patches: PatchStore) -> None:
    array = zarr.open_array(str(copy / "scans/patient"), mode="r+")
    array[...] = np.full(len(patches.scans.id), 5, np.int32)
    assert Problem("scans/split", "patient 5 is in both splits") in problems_of(copy)


def test_verify_reports_an_unfinished_store(copy: Path) -> None:
    change_attribute(copy, "state", "building")
    (problem,) = problems_of(copy)
    assert 'state is "building"' in problem.what
    assert "run the same `semgen prepare` to finish it" in problem.what


# The fingerprint ---------------------------------------------------------------------------------


def test_the_fingerprint_is_recorded_and_computed_alike(prepared: Path) -> None:
    assert compute_fingerprint(prepared) == PatchStore(prepared).fingerprint


def test_a_file_beside_the_arrays_does_not_change_the_fingerprint(
    copy: Path, patches: PatchStore
) -> None:
    (copy / "classes.json").write_text('{"names": {"3": "right pulmonary artery"}}')
    assert compute_fingerprint(copy) == patches.fingerprint
    assert problems_of(copy) == []


# Opening -----------------------------------------------------------------------------------------


def make_nothing(path: Path) -> None:
    del path


def make_plain_folder(path: Path) -> None:
    (path / "scan").mkdir(parents=True)


def make_foreign_group(path: Path) -> None:
    zarr.create_group(str(path), attributes={"title": "someone else's"})


def make_array(path: Path) -> None:
    zarr.create_array(str(path), shape=(3,), dtype="int16")


def make_broken_group(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_ty')


def make_zarr_2(path: Path) -> None:
    zarr.create_group(str(path), zarr_format=2, attributes={"semgen": {"format": 1}})


@pytest.mark.parametrize(
    "make",
    [
        make_nothing,
        make_plain_folder,
        make_foreign_group,
        make_array,
        make_broken_group,
        make_zarr_2,
    ],
)
def test_the_error_for_something_else_than_a_store_says_so(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "thing")
    with pytest.raises(StoreError, match=r"thing: (no such store|not a semgen store)"):
        PatchStore(tmp_path / "thing")


def test_a_store_of_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "new"), attributes={"semgen": {"format": 2}})
    with pytest.raises(StoreError, match="store format 2, this version reads format 1"):
        PatchStore(tmp_path / "new")


def test_an_unfinished_store_opens_on_request_only(written: Path) -> None:
    assert PatchStore(written, allow_building=True).state == "building"
    with pytest.raises(StoreError, match="still building; run the same `semgen prepare`"):
        PatchStore(written)


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_of_a_class_are_those_with_its_label(patches: PatchStore, split: str) -> None:
    labels = patches.split(split).label
    for label in range(patches.num_classes):
        assert patches.rows(split, label).tolist() == [
            row for row, other in enumerate(labels) if other == label
        ]


def test_rows_can_be_chosen_by_scale(patches: PatchStore) -> None:
    for scale in range(patches.num_scales):
        rows = patches.rows("train", 1, scale)
        assert set(patches.train.scale[rows].tolist()) == {scale}
    assert len(patches.rows("train")) == len(patches.train)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_members_are_in_order_of_distance_and_know_their_crops(
    patches: PatchStore, split: str
) -> None:
    table = patches.split(split)
    for label in range(patches.num_classes):
        members = patches.members(label, split)
        assert (np.diff(members.distances) >= 0).all()
        assert (table.scan[members.rows] == members.scans).all()
        assert set(table.scale[members.rows].tolist()) <= {0}
        assert len(members) == len(set(members.scans.tolist())) == len(members.rows)
        middle = table.origin_mm[members.rows] + table.extent_mm[members.rows] / 2
        assert np.array_equal(members.places_mm, middle)
    assert patches.members(0).scans[0] == patches.classes.reference[0]


@pytest.mark.parametrize("label", [-1, 4])
def test_an_unknown_class_has_no_rows(patches: PatchStore, label: int) -> None:
    with pytest.raises(IndexError, match=r"label must be in \[0, 4\)"):
        patches.rows("train", label)


def test_a_store_tells_the_shape_and_window_of_its_crops(patches: PatchStore) -> None:
    assert patches.crop_shape == (16, 32, 32)
    assert patches.window_hu == (-1000.0, 1000.0)
    assert patches.num_scales == 3


def test_tables_cannot_be_changed_by_accident(patches: PatchStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        patches.scans.id[0] = 0


# Annotation --------------------------------------------------------------------------------------


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    return make_store(tmp_path / "s")


def test_annotations_are_kept_and_changed_class_by_class(annotated: Path) -> None:
    annotate(annotated, {3: {"name": "Leber – rechts <b>", "excluded": True}, 1: {"note": "two"}})
    annotate(annotated, {3: {"note": "junk"}})
    said = read_annotation(annotated)
    assert said[3] == ClassNote(name="Leber – rechts <b>", note="junk", excluded=True)
    assert (said[1], said[0]) == (ClassNote(note="two"), ClassNote())
    assert said.excluded == (3,)
    annotate(annotated, {3: {"excluded": False, "name": "", "note": ""}})
    assert 3 not in read_annotation(annotated).notes


def test_an_annotation_changes_neither_content_nor_fingerprint(annotated: Path) -> None:
    before = PatchStore(annotated).fingerprint
    annotate(annotated, {2: {"excluded": True}})
    assert compute_fingerprint(annotated) == before
    assert [problem for problem in verify(annotated) if "classes" in problem.where] == []


def test_an_unknown_class_cannot_be_annotated(annotated: Path) -> None:
    with pytest.raises(StoreError, match="no class 6; there are 6, from 0"):
        annotate(annotated, {6: {"excluded": True}})


@pytest.mark.parametrize("text", ["half \ud800", "two\nlines", "bell \x07"])
def test_control_characters_in_a_name_are_refused_and_old_ones_replaced(
    annotated: Path, text: str
) -> None:
    with pytest.raises(StoreError, match="characters that cannot be shown"):
        annotate(annotated, {1: {"name": text}})
    group = zarr.open_group(str(annotated / "classes"), mode="r+")
    group.attrs["annotation"] = {"1": {"name": text}}
    assert read_annotation(annotated)[1].name == re.sub("[\ud800\n\x07]", "?", text)


def test_a_note_may_have_several_lines(annotated: Path) -> None:
    annotate(annotated, {1: {"note": "two\nlines"}})
    assert read_annotation(annotated)[1].note == "two\nlines"


def test_an_unfinished_store_is_not_annotated(copy: Path) -> None:
    change_attribute(copy, "state", "building")
    with pytest.raises(StoreError, match="still building"):
        annotate(copy, {0: {"name": "liver"}})
    assert read_annotation(copy).notes == {}


def test_the_error_for_a_file_says_that_a_store_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        PatchStore(tmp_path / "s")


def test_a_broken_annotation_is_reported(annotated: Path) -> None:
    group = zarr.open_group(annotated, mode="r+")["classes"]
    group.attrs["annotation"] = {"three": {"name": "x"}}
    with pytest.raises(StoreError, match='attribute "annotation" of group classes is broken'):
        read_annotation(annotated)


def test_concurrent_annotations_are_all_kept(annotated: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda c: annotate(annotated, {c: {"name": f"class {c}"}}), range(6)))
    assert [read_annotation(annotated)[c].name for c in range(6)] == [
        f"class {c}" for c in range(6)
    ]


# From Python -------------------------------------------------------------------------------------


def test_the_table_of_a_split_suits_pandas(patches: PatchStore) -> None:
    table = patches.table("train")
    assert {len(column) for column in table.values()} == {len(patches.train)}
    np.testing.assert_array_equal(table["class"], patches.train.label)
    middle = patches.train.origin_mm + patches.train.extent_mm / 2
    np.testing.assert_array_equal(table["y_mm"], middle[:, 1])
    np.testing.assert_array_equal(table["depth_mm"], patches.train.extent_mm[:, 0])


def test_a_notebook_shows_a_store_as_a_table(patches: PatchStore) -> None:
    shown = patches._repr_html_()
    assert "<th>classes</th><td>4</td>" in shown
    assert patches.fingerprint is not None
    assert patches.fingerprint[:16] in shown
