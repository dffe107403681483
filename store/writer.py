"""Write a store: tables whole, sharded arrays a shard at a time, the seal last.

Every write goes to a temporary name and is renamed, so what exists under its final name was
written whole; a resumed job still reads a shard back before it trusts it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
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
    TABLES,
    StoreError,
    codecs,
)
from store.layout import ShardGrid
from store.shards import encode_shard

_TABLE_CHUNK_ROWS, _TABLE_CHUNK_BYTES = 2**16, 2**23


class StoreWriter:
    """A store in state "building"."""

    def __init__(self, path: Path) -> None:
        """Open a store that `create` made; raises StoreError where there is none."""
        self.path = path
        self.group = open_group(path, mode="r+")

    @classmethod
    def create(cls, path: Path, *, config: dict[str, Any], software: dict[str, str]) -> StoreWriter:
        """Make an empty store; `config` and `software` must be JSON."""
        attribute = {
            "format": FORMAT,
            "state": "building",
            "fingerprint": None,
            "config": config,
            "software": software,
            "stages": {},
        }
        zarr.create_group(str(path.absolute()), zarr_format=3, attributes={ATTRIBUTE: attribute})
        return cls(path)

    @property
    def attribute(self) -> dict[str, Any]:
        return read_attribute(self.group)

    @property
    def stages(self) -> dict[str, Any]:
        """The finished stages and what each recorded."""
        stages: dict[str, Any] = self.attribute["stages"]
        return stages

    def finish_stage(self, stage: str, facts: dict[str, Any]) -> None:
        """Mark a stage done; what it wrote is trusted from now on, so it must be on the disk."""
        _flush(self.path)
        self._update(stages={**self.stages, stage: facts})

    def _update(self, **changes: Any) -> None:
        self.group.attrs[ATTRIBUTE] = {**self.attribute, **changes}

    def remove(self, name: str) -> None:
        """Delete an array or group that an interrupted stage left behind."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def write_table(self, name: str, values: NDArray[Any]) -> None:
        """Write one small array, replacing what an interrupted run left."""
        table = TABLES[name]
        values = np.ascontiguousarray(values, dtype=table.dtype)
        if values.ndim != 1 + len(table.columns):
            raise ValueError(f"{name} must have {1 + len(table.columns)} axes, got {values.shape}")
        self.remove(name)
        row_shape = tuple(max(1, n) for n in values.shape[1:])
        most = _TABLE_CHUNK_BYTES // (values.itemsize * math.prod(row_shape))
        chunks = (max(1, min(len(values), most, _TABLE_CHUNK_ROWS)), *row_shape)
        array = self.group.create_array(
            name,
            shape=values.shape,
            dtype=table.dtype,
            chunks=chunks,
            compressors=codecs(values.dtype.itemsize),
            config={"write_empty_chunks": True},
        )
        array[...] = values

    def create_sharded(
        self, name: str, *, shape: tuple[int, ...], dtype: str, rows_per_shard: int
    ) -> ShardGrid:
        """Lay out a sharded array, one row a chunk, without its shards."""
        self.remove(name)
        item = shape[1:]
        self.group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(1, *item),
            shards=(rows_per_shard, *item),
            compressors=codecs(np.dtype(dtype).itemsize),
            config={"write_empty_chunks": True},
        )
        return ShardGrid(num_rows=shape[0], rows_per_shard=rows_per_shard)

    def seal(self, digests: dict[str, list[str]]) -> str:
        """Record the shards' digests and the fingerprint; the store is complete. Returns it."""
        for name in SHARDED:
            self.group[name].attrs[DIGESTS] = digests[name]
        _flush(self.path)
        fingerprint = compute_fingerprint(self.path)
        self._update(fingerprint=fingerprint, state="complete")
        _flush(self.path, recurse=False)
        return fingerprint


def open_group(path: Path, mode: str = "r") -> zarr.Group:
    """Open a format 1 store's group; raises StoreError that says what is there instead."""
    check_local(path)
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: is a file; a store is a folder")
    if not path.is_dir():
        raise StoreError(f"{path}: no such store")
    try:
        # absolute: zarr cuts a relative root out of the middle of its keys, too
        group = zarr.open_group(str(path.absolute()), mode=mode, zarr_format=3)  # type: ignore[arg-type]
        attribute = group.attrs.get(ATTRIBUTE)
    except Exception as error:  # broken metadata can make zarr raise anything
        raise StoreError(f"{path}: not a semgen store (no readable Zarr v3 group)") from error
    if not isinstance(attribute, dict) or "format" not in attribute:
        raise StoreError(f'{path}: not a semgen store (no "{ATTRIBUTE}" attribute)')
    if attribute["format"] != FORMAT:
        raise StoreError(
            f"{path}: store format {attribute['format']}, this version reads format {FORMAT}"
        )
    return group


def read_attribute(group: zarr.Group) -> dict[str, Any]:
    """The group attribute that `store.format.ATTRIBUTE` names."""
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


def write_shard(path: Path, name: str, shard: int, values: NDArray[Any]) -> str:
    """Write one whole shard and return the SHA-256 of its values.

    values
        All rows of the shard, in order: (rows, ...) of the array's dtype.

    Raises ValueError when `values` is not exactly one shard: two tasks that each wrote a part
    of one would lose each other's rows.
    """
    array, grid = open_sharded(path, name)
    rows = grid.rows_of(shard)
    if values.shape != (len(rows), *array.shape[1:]) or values.dtype != array.dtype:
        raise ValueError(
            f"{name} shard {shard} takes {(len(rows), *array.shape[1:])} {array.dtype}, "
            f"got {values.shape} {values.dtype}; write whole shards only"
        )
    file = path / name / shard_key(shard, array.ndim)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{uuid.uuid4().hex}.partial")
    with partial.open("wb") as opened:
        for piece in encode_shard(values, grid.rows_per_shard):
            opened.write(piece)
    os.replace(partial, file)
    return digest_values(values)


def shard_key(shard: int, num_axes: int) -> str:
    """A shard's file, in its array's folder."""
    return f"c/{shard}" + "/0" * (num_axes - 1)


def sweep(path: Path) -> None:
    """Delete temporary files that a killed writer left."""
    for stray in path.rglob("*.partial"):
        stray.unlink(missing_ok=True)


def digest_values(values: NDArray[Any]) -> str:
    """SHA-256 (hex) of an array's values in C order."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def compute_fingerprint(path: Path) -> str:
    """SHA-256 (hex) over settings, tables, autoencoder weights and the shards' digests.

    It covers decoded values, not their compressed form, and no class name or exclusion.
    """
    group = open_group(path)
    attribute = read_attribute(group)
    total = hashlib.sha256(json.dumps([FORMAT, attribute["config"]], sort_keys=True).encode())
    for name in sorted(TABLES):
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


def _flush(path: Path, *, recurse: bool = True) -> None:
    """Force files and folders to the disk, so that a power cut cannot undo the seal."""
    targets = [path, *(path.rglob("*") if recurse else path.glob("*"))]
    for target in targets:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
