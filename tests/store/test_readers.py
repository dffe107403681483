"""Other readers of Zarr find what semgen wrote, and the names of its dimensions."""

import json
from collections.abc import Callable
from pathlib import Path

import dask.array
import numpy as np
import pandas as pd
import pytest
import tensorstore
import xarray as xr
import zarr
from numpy.typing import NDArray

from store import PatchStore
from store.format import SHARDED, TABLES
from store.sharded import ShardedReader
from store.verification import verify

GROUPS = ("scans", "classes", "train", "validation")


def read_with_zarr(path: Path, name: str) -> NDArray[np.generic]:
    return np.asarray(zarr.open_array(path / name, mode="r")[...])


def read_with_tensorstore(path: Path, name: str) -> NDArray[np.generic]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def read_with_xarray(path: Path, name: str) -> NDArray[np.generic]:
    group, variable = name.split("/")
    return xr.open_zarr(path, group=group, consolidated=False)[variable].to_numpy()


def read_with_dask(path: Path, name: str) -> NDArray[np.generic]:
    return np.asarray(dask.array.from_zarr(str(path / name)).compute(scheduler="synchronous"))


@pytest.mark.parametrize(
    "read", [read_with_zarr, read_with_tensorstore, read_with_xarray, read_with_dask]
)
def test_a_reader_finds_the_values_of_every_array(
    patches: PatchStore, read: Callable[[Path, str], NDArray[np.generic]]
) -> None:
    for name in (*TABLES, *SHARDED):
        group, table = name.split("/")
        if name in SHARDED:
            values = ShardedReader(patches.path, name).read(slice(None))
        elif group in {"train", "validation"}:
            values = getattr(patches.split(group), table)
        else:
            values = getattr(getattr(patches, group), table)
        np.testing.assert_array_equal(read(patches.path, name), values, name, strict=True)


@pytest.mark.parametrize("group", GROUPS)
def test_xarray_opens_a_group_without_reading_or_indexing_it(
    patches: PatchStore, group: str
) -> None:
    opened = xr.open_zarr(patches.path, group=group, consolidated=False)
    dimensions = {name: table.dimensions for name, table in TABLES.items()} | SHARDED
    assert {f"{group}/{name}": variable.dims for name, variable in opened.items()} == {
        name: names for name, names in dimensions.items() if name.split("/")[0] == group
    }
    assert all(dask.is_dask_collection(variable) for variable in opened.values())
    assert not opened.coords


def test_xarray_opens_the_root_as_a_tree(patches: PatchStore) -> None:
    tree = xr.open_datatree(patches.path, engine="zarr", consolidated=False, chunks={})
    assert sorted(tree.children) == sorted(GROUPS)
    assert tree.attrs["semgen"]["fingerprint"] == patches.fingerprint
    centre = tree["classes"].dataset.isel(label=tree["train/label"].to_numpy())["centre"]
    np.testing.assert_array_equal(centre, patches.classes.centre[patches.train.label])


def test_pandas_makes_a_frame_of_the_table_of_a_split(patches: PatchStore) -> None:
    frame = pd.DataFrame(patches.table("train"))
    assert len(frame) == len(patches.train)
    assert frame[frame["class"] == 1]["row"].tolist() == patches.rows("train", label=1).tolist()


def test_a_store_of_earlier_versions_has_no_names_of_dimensions_and_is_valid(copy: Path) -> None:
    for file in copy.glob("*/*/zarr.json"):
        metadata = json.loads(file.read_text())
        del metadata["dimension_names"]
        file.write_text(json.dumps(metadata))
    assert list(verify(copy)) == []
