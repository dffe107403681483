"""Write a store: tables at once, sharded arrays shard by shard, the fingerprint last.

Every file is written under a temporary name and renamed, so a file with its final name is complete.
A resumed job still checks each shard before it uses it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from store.atomic import flush, replace_file
from store.format import ATTRIBUTE, DIGESTS, FORMAT, SHARDED, TABLES, codecs
from store.group import (
    compute_fingerprint,
    digest_values,
    open_group,
    open_sharded,
    read_attribute,
)
from store.layout import ShardGrid, shard_key
from store.shards import encode_shard

_TABLE_CHUNK_ROWS, _TABLE_CHUNK_BYTES = 2**16, 2**23


class StoreWriter:
    """A store in state "building"."""

    def __init__(self, path: Path) -> None:
        """Open a store that `create` made; StoreError if there is none."""
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
        """Mark a stage as done, after forcing what it wrote to the disk."""
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
        if values.ndim != len(table.dimensions):
            raise ValueError(f"{name} must have axes {table.dimensions}, got {values.shape}")
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
            dimension_names=table.dimensions,
            config={"write_empty_chunks": True},
        )
        array[...] = values

    def create_sharded(
        self, name: str, *, shape: tuple[int, ...], dtype: str, rows_per_shard: int
    ) -> ShardGrid:
        """Create a sharded array, one row per chunk, without its shards."""
        self.remove(name)
        item = shape[1:]
        self.group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(1, *item),
            shards=(rows_per_shard, *item),
            compressors=codecs(np.dtype(dtype).itemsize),
            dimension_names=SHARDED[name],
            config={"write_empty_chunks": True},
        )
        return ShardGrid(num_rows=shape[0], rows_per_shard=rows_per_shard)

    def seal(self, digests: dict[str, list[str]]) -> str:
        """Record digests and fingerprint: the store is complete. Returns the fingerprint."""
        for name in SHARDED:
            self.group[name].attrs[DIGESTS] = digests[name]
        _flush(self.path)
        fingerprint = compute_fingerprint(self.path)
        self._update(fingerprint=fingerprint, state="complete")
        _flush(self.path, recurse=False)
        return fingerprint


def write_shard(path: Path, name: str, shard: int, values: NDArray[Any]) -> str:
    """Write one whole shard and return the SHA-256 of its values.

    values
        All rows of the shard, in order: (rows, ...) of the array's dtype.

    Raises ValueError if `values` is not exactly one shard: two tasks that each write a part of a
    shard would overwrite each other's rows.
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
    with replace_file(file, shared=True) as partial, partial.open("wb") as opened:
        opened.writelines(encode_shard(values, grid.rows_per_shard))
    return digest_values(values)


def _flush(path: Path, *, recurse: bool = True) -> None:
    """Force files and folders to the disk, so that a power failure cannot undo the seal."""
    for target in (path, *(path.rglob("*") if recurse else path.glob("*"))):
        flush(target)
