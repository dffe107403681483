"""Open the group and arrays of a store, and compute its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.format import (
    ATTRIBUTE,
    AUTOENCODER_FILE,
    DIGESTS,
    FORMAT,
    SHARDED,
    StoreError,
    Unreachable,
    tables_of,
)
from store.layout import ShardGrid
from store.location import Location, Where, locate

_KEYS = {
    "state": str, "fingerprint": str | None, "config": dict, "software": dict, "stages": dict,
}  # fmt: skip
"""Of the group attribute, in a store of any format and state; `format` apart."""


def open_group(store: Where, mode: str = "r") -> zarr.Group:
    """Open the group of a store; StoreError if there is something else or nothing."""
    where = locate(store)
    where.check()
    with read_errors(where, f"{where}: not a semgen store (no readable Zarr v3 group)"):
        group = zarr.open_group(where.for_zarr(), mode=mode, zarr_format=3)  # type: ignore[arg-type]
        attribute = group.attrs.get(ATTRIBUTE)
    if not isinstance(attribute, dict) or "format" not in attribute:
        raise StoreError(f'{where}: not a semgen store (no "{ATTRIBUTE}" attribute)')
    if attribute["format"] not in range(1, FORMAT + 1):
        raise StoreError(
            f"{where}: store format {attribute['format']}, but this version of semgen reads formats"
            f" 1 to {FORMAT}; use the version that wrote the store, or prepare it again"
        )
    broken = [key for key, kind in _KEYS.items() if not isinstance(attribute.get(key, ...), kind)]
    if broken:
        raise StoreError(
            f'{where}: "{broken[0]}" is missing from the attribute "{ATTRIBUTE}", or damaged; copy'
            " the store's zarr.json again from where it was made"
        )
    return group


@contextmanager
def read_errors(where: Location, text: str) -> Iterator[None]:
    """Raise StoreError with this text for what zarr raises on missing or broken metadata.

    Where the server is at fault, Unreachable is raised instead.
    """
    try:
        with where.explained():
            yield
    except Unreachable:
        raise
    except Exception as error:  # broken metadata can make zarr raise anything
        raise StoreError(text) from error


def read_attribute(group: zarr.Group) -> dict[str, Any]:
    """Content of the group attribute `semgen`."""
    attribute = group.attrs[ATTRIBUTE]
    assert isinstance(attribute, dict)
    return attribute


def open_sharded(store: Where, name: str) -> tuple[zarr.Array[Any], ShardGrid]:
    """A sharded array of a store and its grid; StoreError when it is missing or broken."""
    where = locate(store)
    with read_errors(where, f"{where}: array {name} is missing or its metadata broken"):
        array = zarr.open_array(where.for_zarr(), path=name, mode="r", zarr_format=3)
    if array.shards is None:
        raise StoreError(f"{where}: array {name} is not sharded")
    return array, ShardGrid(num_rows=array.shape[0], rows_per_shard=array.shards[0])


def digest_values(values: NDArray[Any]) -> str:
    """SHA-256 (hex) of an array's values in C order."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def compute_fingerprint(store: Where) -> str:
    """SHA-256 (hex) over settings, tables, autoencoder weights and the shards' digests.

    It covers decoded values, not their compressed form, and no class name or exclusion.
    """
    where = locate(store)
    group = open_group(where)
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
    total.update(hashlib.sha256(where.read(AUTOENCODER_FILE)).digest())
    return total.hexdigest()


def _digest_table(table: Any) -> str:
    """`digest_values` of a table, holding one chunk at a time."""
    digest = hashlib.sha256()
    for first in range(0, table.shape[0], table.chunks[0]):
        digest.update(np.ascontiguousarray(table[first : first + table.chunks[0]]).data)
    return digest.hexdigest()
