"""Stores in tests: their files, copies of them, and unfinished ones."""

import hashlib
import shutil
from pathlib import Path

import zarr

from pipeline.archive.lookup import catalogue_folder
from store.format import SHARDED


def contents(store: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the store."""
    return {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in store.rglob("*")
        if file.is_file()
    }


def copy_with_catalogue(store: Path, to: Path) -> Path:
    """A copy of a store and of its private catalogue."""
    shutil.copytree(catalogue_folder(store), catalogue_folder(to))
    return shutil.copytree(store, to)


def unseal(store: Path) -> Path:
    """Turn a complete store into one that was not sealed yet."""
    for name in SHARDED:
        del zarr.open_array(str(store / name), mode="r+").attrs["shard_sha256"]
    group = zarr.open_group(str(store), mode="r+")
    changed = {"state": "building", "fingerprint": None}
    group.attrs["semgen"] = {**group.attrs["semgen"], **changed}  # type: ignore[dict-item]
    return store


def assert_same_bytes(store: Path, other: Path) -> None:
    one, two = contents(store), contents(other)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
