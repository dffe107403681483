"""Rows of a sharded array, read directly from the shard files.

zarr-python reads the same arrays, but takes ten times as long for random rows
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from store.format import CorruptStore
from store.group import digest_values, open_sharded, shard_key
from store.shards import MISSING, decode_chunk, read_index

_CACHED_ROWS = 2**18
"""Rows whose offsets are kept in memory, after their shard was first read."""

Rows: TypeAlias = Sequence[int] | slice | NDArray[np.integer[Any]] | NDArray[np.bool_]
"""Rows of a split: their numbers, a slice, or a mask of all."""


class ShardedReader:
    """Random access to the rows of one sharded array. Safe to use from several threads."""

    def __init__(self, path: Path, name: str) -> None:
        """`path` is the store, `name` such as "train/patch"."""
        array, self.grid = open_sharded(path, name)
        self.name = name
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self._rows_per_shard = self.grid.rows_per_shard
        self._path, self._folder = path, path / name
        cached_shards = max(1, _CACHED_ROWS // self._rows_per_shard)
        self._index = lru_cache(maxsize=cached_shards)(self._read_index)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} x {self.shape[1:]} {self.dtype}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path only: a worker process opens the file again."""
        return ShardedReader, (self._path.absolute(), self.name)

    def read(self, rows: Rows) -> NDArray[Any]:
        """The given rows, in the given order: (number of rows, ...).

        rows
            Row numbers, a slice, or a boolean mask of all rows, as in numpy. Negative numbers and a
            single number are refused: give [3] for row 3.

        Raises IndexError or TypeError for anything else, and CorruptStore naming every row that
        fails its checksum or is missing.
        """
        wanted = self._number(rows)
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        bad = self._read_numbered(wanted, out)
        if bad:
            raise CorruptStore(self.name.split("/")[0], bad, "checksum failed or data missing")
        return out

    def read_into(self, rows: Rows, out: NDArray[Any]) -> list[int]:
        """Read rows into `out`; returns those that cannot be read (their values are undefined)."""
        return self._read_numbered(self._number(rows), out)

    def _number(self, rows: Rows) -> NDArray[np.int64]:
        """Rows as numbers."""
        if isinstance(rows, slice):
            return np.arange(len(self), dtype=np.int64)[rows]
        given = np.asarray(rows)
        if given.ndim != 1:
            raise IndexError(f"rows of {self.name} must be a list, got {given.ndim} axes")
        if given.dtype == bool:
            if len(given) != len(self):
                raise IndexError(
                    f"a mask of {self.name} must have {len(self)} values, got {len(given)}"
                )
            return np.flatnonzero(given).astype(np.int64)
        if not len(given):
            return np.empty(0, np.int64)
        if not np.issubdtype(given.dtype, np.integer):
            raise TypeError(f"rows of {self.name} must be whole numbers, got {given.dtype}")
        if given.min() < 0 or given.max() >= len(self):
            raise IndexError(f"rows of {self.name} must be in [0, {len(self)})")
        return given.astype(np.int64, copy=False)

    def _read_numbered(self, wanted: NDArray[np.int64], out: NDArray[Any]) -> list[int]:
        order = np.argsort(wanted, kind="stable")  # a shard is opened once
        places = itertools.groupby(order.tolist(), key=(wanted // self._rows_per_shard).__getitem__)
        bad: list[int] = []
        for shard, of_shard in places:
            bad += self._read_from_shard(int(shard), wanted, list(of_shard), out)
        return bad

    def _read_from_shard(
        self, shard: int, rows: NDArray[np.int64], places: list[int], out: NDArray[Any]
    ) -> list[int]:
        bad: list[int] = []
        every = [int(rows[place]) for place in places]
        try:
            index = self._index(shard)
            descriptor = os.open(self._file(shard), os.O_RDONLY)
        except (OSError, ValueError):
            return every
        try:
            for place, row in zip(places, every, strict=True):
                offset, length = index[row - shard * self._rows_per_shard]
                if offset == MISSING or not decode_chunk(
                    os.pread(descriptor, length, offset), out[place]
                ):
                    bad.append(row)
        except OSError:
            return every
        finally:
            os.close(descriptor)
        return bad

    def digest(self, shard: int) -> str | None:
        """The SHA-256 of a shard's values; None unless all are present and pass their checksums."""
        rows = self.grid.rows_of(shard)
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        return None if self.read_into(rows, values) else digest_values(values)

    def _file(self, shard: int) -> str:
        return f"{self._folder}/{shard_key(shard, len(self.shape))}"

    def _read_index(self, shard: int) -> list[list[int]]:
        """Offset and length of each chunk."""
        with open(self._file(shard), "rb") as file:
            return read_index(file, self._rows_per_shard)
