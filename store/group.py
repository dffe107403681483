"""Open the group and arrays of a store, and compute its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.errors import check_local
from store.format import (
    ATTRIBUTE,
    AUTOENCODER_FILE,
    DIGESTS,
    FORMAT,
    SHARDED,
    StoreError,
    tables_of,
)
from store.layout import ShardGrid


def open_group(path: Path, mode: str = "r") -> zarr.Group:
    """Open the group of a store; StoreError if the path is something else."""
    check_local(path)
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: is a file; a store is a folder")
    if not path.is_dir():
        raise StoreError(f"{path}: no such store")
    try:
        # absolute: with a relative root, zarr removes that text anywhere in a key
        group = zarr.open_group(str(path.absolute()), mode=mode, zarr_format=3)  # type: ignore[arg-type]
        attribute = group.attrs.get(ATTRIBUTE)
    except Exception as error:  # broken metadata can make zarr raise anything
        raise StoreError(f"{path}: not a semgen store (no readable Zarr v3 group)") from error
    if not isinstance(attribute, dict) or "format" not in attribute:
        raise StoreError(f'{path}: not a semgen store (no "{ATTRIBUTE}" attribute)')
    if attribute["format"] not in range(1, FORMAT + 1):
        raise StoreError(
            f"{path}: store format {attribute['format']}, but this version of semgen reads formats"
            f" 1 to {FORMAT}; use the version that wrote the store, or prepare it again"
        )
    return group


def read_attribute(group: zarr.Group) -> dict[str, Any]:
    """Content of the group attribute `semgen`."""
    attribute = group.attrs[ATTRIBUTE]
    assert isinstance(attribute, dict)
    return attribute


def open_sharded(path: Path, name: str) -> tuple[zarr.Array[Any], ShardGrid]:
    """A sharded array of a store and its grid; StoreError when it is missing or broken."""
    try:
        array = zarr.open_array(str(path.absolute() / name), mode="r", zarr_format=3)
    except Exception as error:  # broken metadata can make zarr raise anything
        raise StoreError(f"{path}: array {name} is missing or its metadata broken") from error
    if array.shards is None:
        raise StoreError(f"{path}: array {name} is not sharded")
    return array, ShardGrid(num_rows=array.shape[0], rows_per_shard=array.shards[0])


def shard_key(shard: int, num_axes: int) -> str:
    """A shard's file, in its array's folder."""
    return f"c/{shard}" + "/0" * (num_axes - 1)


def digest_values(values: NDArray[Any]) -> str:
    """SHA-256 (hex) of an array's values in C order."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def compute_fingerprint(path: Path) -> str:
    """SHA-256 (hex) over settings, tables, autoencoder weights and the shards' digests.

    It covers decoded values, not their compressed form, and no class name or exclusion.
    """
    group = open_group(path)
    attribute = read_attribute(group)
    total = hashlib.sha256(
        json.dumps([attribute["format"], attribute["config"]], sort_keys=True).encode()
    )
    for name in sorted(tables_of(attribute)):
        table: Any = group[name]
        total.update(f"{name} {table.dtype} {table.shape} {_digest_table(table)}".encode())
    for name in SHARDED:
        array = group[name]
        total.update(f"{name} {array.shape} {array.attrs[DIGESTS]}".encode())  # type: ignore[union-attr]
    total.update(hashlib.sha256((path / AUTOENCODER_FILE).read_bytes()).digest())
    return total.hexdigest()


def _digest_table(table: Any) -> str:
    """`digest_values` of a table, holding one chunk at a time."""
    digest = hashlib.sha256()
    for first in range(0, table.shape[0], table.chunks[0]):
        digest.update(np.ascontiguousarray(table[first : first + table.chunks[0]]).data)
    return digest.hexdigest()
