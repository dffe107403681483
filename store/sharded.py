"""Rows of a sharded array, read directly from its shards.

zarr-python reads the same arrays, but takes three times as long for random rows with the fused
pipeline of 3.4.2, six times with its default pipeline, and 21 times in 3.1.6
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from store.format import CorruptStore
from store.group import digest_values, open_sharded
from store.location import Where, locate
from store.shards import decode_chunk

Rows: TypeAlias = Sequence[int] | slice | NDArray[np.integer[Any]] | NDArray[np.bool_]
"""Rows of a split: their numbers, a slice, or a mask of all."""


class ShardedReader:
    """Random access to the rows of one sharded array. Safe to use from several threads."""

    def __init__(self, store: Where, name: str, *, fingerprint: str | None = None) -> None:
        """Open an array of a store, such as "train/patch".

        fingerprint
            That of the store. If it is given, shards of a remote store are cached on disk.
        """
        self._location, self._fingerprint = locate(store), fingerprint
        array, self.grid = open_sharded(self._location, name)
        self.name = name
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self._chunks = self._location.chunks(
            name, self.grid.rows_per_shard, array.ndim, fingerprint
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} x {self.shape[1:]} {self.dtype}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the location only: a worker process opens the array again."""
        return _open, (self._location.absolute(), self.name, self._fingerprint)

    def read(self, rows: Rows) -> NDArray[Any]:
        """The given rows, in the given order: (number of rows, ...).

        rows
            Row numbers, a slice, or a boolean mask of all rows, as in numpy. Negative numbers and a
            single number are refused: give [3] for row 3.

        Raises IndexError or TypeError for anything else, CorruptStore naming every row that fails
        its checksum or is missing, and Unreachable when a server does not answer.
        """
        wanted = self._number(rows)
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        bad = self._read_numbered(wanted, out)
        if bad:
            raise CorruptStore.of_rows(self.name.split("/")[0], bad)
        return out

    def read_into(self, rows: Rows, out: NDArray[Any]) -> list[int]:
        """Read rows into `out`; returns those that cannot be read (their values are undefined).

        Raises Unreachable when a server does not answer.
        """
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
        order = np.argsort(wanted, kind="stable").tolist()  # a shard is opened once
        shards, numbers = (part.tolist() for part in np.divmod(wanted, self.grid.rows_per_shard))
        groups = [
            (shard, list(slots)) for shard, slots in itertools.groupby(order, shards.__getitem__)
        ]
        fetched = self._chunks.fetch(
            [(shard, [numbers[slot] for slot in slots]) for shard, slots in groups]
        )
        return [
            int(wanted[slot])
            for (_, slots), chunks in zip(groups, fetched, strict=True)
            for slot, chunk in zip(slots, chunks, strict=True)
            if not decode_chunk(chunk, out[slot])
        ]

    def digest(self, shard: int) -> str | None:
        """The SHA-256 of a shard's values; None unless all are present and pass their checksums."""
        rows = self.grid.rows_of(shard)
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        return None if self.read_into(rows, values) else digest_values(values)


def _open(store: Where, name: str, fingerprint: str | None) -> ShardedReader:
    return ShardedReader(store, name, fingerprint=fingerprint)
