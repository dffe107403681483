"""Verification finds all damage; the fingerprint covers all content."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from store import PatchStore
from store.format import TABLES, StoreError
from store.group import compute_fingerprint
from store.verification import Problem, verify
from store.writer import write_shard
from tests.support.crops import NAME, change_attribute, flip_bit
from tests.support.progress import CountedProgress


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
def test_a_table_has_its_dtype_and_dimensions(prepared: Path, name: str) -> None:
    values = zarr.open_array(str(prepared / name), mode="r")
    assert values.dtype == TABLES[name].dtype
    assert values.metadata.dimension_names == TABLES[name].dimensions  # type: ignore[union-attr]


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
    expected = {
        Problem(NAME, "differs from what was written", tuple(range(n, n + 8))) for n in (8, 16)
    }
    assert set(problems_of(copy)) == expected


def test_verify_finds_a_rewritten_crop(copy: Path, patches: PatchStore) -> None:
    crops = patches.train.read(range(8)).copy()
    crops[3, 0, 0, 0] ^= 1
    write_shard(copy, NAME, 0, crops)
    assert problems_of(copy) == [Problem(NAME, "differs from what was written", tuple(range(8)))]


@pytest.mark.parametrize("name", TABLES)
def test_verify_finds_a_flipped_bit_in_any_table(copy: Path, name: str) -> None:
    (file,) = (path for path in (copy / name / "c").rglob("*") if path.is_file())
    flip_bit(file, -1)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", ["scans/id", "classes/neighbour", "validation/label"])
def test_verify_finds_a_table_without_its_chunks(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name / "c")
    group, table = name.split("/")
    with pytest.raises(StoreError, match=f"table {name} is missing or broken"):
        getattr(getattr(PatchStore(copy), group), table)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("name", ["scans/id", "classes/neighbour", "validation/label"])
def test_verify_finds_a_missing_table(copy: Path, name: str) -> None:
    shutil.rmtree(copy / name)
    assert name in {problem.where for problem in problems_of(copy)}


@pytest.mark.parametrize("key", ["state", "fingerprint", "config", "software", "stages"])
def test_a_damaged_attribute_is_reported(copy: Path, key: str) -> None:
    file = copy / "zarr.json"
    file.write_text(file.read_text().replace(f'"{key}"', f'"{key[:-1]}!"', 1))
    with pytest.raises(StoreError, match=f'"{key}" is missing from the attribute "semgen", or dam'):
        PatchStore(copy)


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


def test_verify_finds_a_changed_fingerprint(copy: Path) -> None:
    change_attribute(copy, "fingerprint", "0" * 64)
    assert problems_of(copy) == [Problem("store", "fingerprint does not match the content")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"discover"', '"discoveR"', "no record of stage discover"),
        ('"accepted": 5', '"accepted": 6', "zarr.json counts 6 accepted, the tables 5"),
        (
            '"accepted": 5',
            '"near_duplicates": [[0, 5, 1]], "accepted": 5',
            "scans that do not exist",
        ),
    ],
)
def test_verify_finds_changed_records_of_stages(
    copy: Path, old: str, new: str, message: str
) -> None:
    file = copy / "zarr.json"
    file.write_text(file.read_text().replace(old, new))
    (problem,) = problems_of(copy)
    assert message in problem.what


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"x": 5}, "cannot be read"),
        ({"999": {"excluded": True}}, "names class 999"),
        ({"0": {"excluded_members": [4711]}}, "names a scan that is no member"),
    ],
)
def test_verify_finds_a_broken_annotation(
    copy: Path, annotation: dict[str, object], message: str
) -> None:
    group = zarr.open_group(str(copy), path="classes", mode="r+")
    group.attrs["annotation"] = annotation
    (problem,) = problems_of(copy)
    assert (problem.where, message in problem.what) == ("classes", True)


@pytest.mark.parametrize(("old", "new"), [('"end"', '"start"'), ('"little"', '"big"')])
def test_verify_finds_metadata_with_which_others_read_other_values(
    copy: Path, old: str, new: str
) -> None:
    file = copy / "train/patch/zarr.json"
    file.write_text(file.read_text().replace(old, new))
    assert {problem.where for problem in problems_of(copy)} == {"train/patch"}


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


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("classes/reference", 99, "is not a member at distance 0"),
        ("classes/distance", 0.5, "is not a member at distance 0"),
        ("classes/distance", 1e9, "members are not in order of distance"),
        ("classes/body_share", 1.5, "must be 0 to 1"),
        ("classes/place_mm", np.nan, "has no value for a member"),
        ("classes/place_mm", 0, "differs from the base crops"),
        ("classes/score", np.nan, "has no value for a member"),
        ("classes/score", 0.39, "below min_score 0.4"),
        ("classes/cycle_mm", np.nan, "has no value for a member"),
        ("classes/cycle_mm", 10.1, "above max_cycle_mm 10.0"),
    ],
)
def test_verify_finds_impossible_members(copy: Path, name: str, value: float, what: str) -> None:
    array = zarr.open_array(str(copy / name), mode="r+")
    values = np.asarray(array[...])
    values[(1, *[0] * (values.ndim - 1))] = value
    array[...] = values
    where = "classes/reference" if what.endswith("distance 0") else name
    assert Problem(where, what, (1,)) in problems_of(copy)


def test_verify_finds_scores_of_members_that_were_not_matched(
    copy: Path, patches: PatchStore
) -> None:
    change_attribute(copy, "config", {**patches.config, "place": "frame"})
    found = {problem.where: problem for problem in problems_of(copy)}
    for name in ("score", "cycle_mm", "validation_score", "validation_cycle_mm"):
        assert found[f"classes/{name}"].what == "has a value where none belongs"
    assert "classes/place_mm" not in found


def test_verify_reports_an_unfinished_store(copy: Path) -> None:
    change_attribute(copy, "state", "building")
    (problem,) = problems_of(copy)
    assert 'state is "building"' in problem.what
    assert "run the same `semgen prepare` to finish it" in problem.what


def test_the_fingerprint_is_recorded_and_computed_alike(prepared: Path) -> None:
    assert compute_fingerprint(prepared) == PatchStore(prepared).fingerprint


def test_a_file_beside_the_arrays_does_not_change_the_fingerprint(
    copy: Path, patches: PatchStore
) -> None:
    (copy / "classes.json").write_text('{"names": {"3": "right pulmonary artery"}}')
    assert compute_fingerprint(copy) == patches.fingerprint
    assert problems_of(copy) == []
