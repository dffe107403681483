"""Opening a store, its rows and members, pickling, tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from store import PatchStore, StoreError
from store.format import SPLITS


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
    zarr.create_group(str(tmp_path / "new"), attributes={"semgen": {"format": 3}})
    with pytest.raises(StoreError, match=r"store format 3, .* reads formats 1 to 2"):
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
        assert np.array_equal(members.places, middle)
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
