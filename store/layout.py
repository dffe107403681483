"""Row <-> shard arithmetic of a sharded array: pure, no input or output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ShardGrid:
    """Rows cut into shards of equal length; the last may be short.

    >>> grid = ShardGrid(num_rows=10, rows_per_shard=4)
    >>> grid.num_shards, grid.shard_of(9), list(grid.rows_of(2))
    (3, 2, [8, 9])
    """

    num_rows: int
    rows_per_shard: int

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.rows_per_shard < 1:
            raise ValueError(f"num_rows must be >= 0 and rows_per_shard >= 1, got {self}")

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def shard_of(self, row: int) -> int:
        return row // self.rows_per_shard

    def rows_of(self, shard: int) -> range:
        """The rows of one shard, in order."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard must be in [0, {self.num_shards}), got {shard}")
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def shards_of(self, rows: range) -> range:
        """The shards that hold any of these consecutive rows."""
        if not rows:
            return range(0)
        return range(self.shard_of(rows[0]), self.shard_of(rows[-1]) + 1)


def shard_key(shard: int, num_axes: int) -> str:
    """The file of a shard, or of a chunk of an unsharded array, in its array's folder.

    >>> shard_key(12, 4)
    'c/12/0/0/0'
    """
    return f"c/{shard}" + "/0" * (num_axes - 1)


def list_chunks(name: str, array: Any) -> list[str]:
    """Keys of a table's chunks, which are cut along the first axis only.

    array
        The zarr array with this name.
    """
    if 0 in array.shape:
        return []
    num_chunks = ShardGrid(num_rows=array.shape[0], rows_per_shard=array.chunks[0]).num_shards
    return [f"{name}/{shard_key(chunk, array.ndim)}" for chunk in range(num_chunks)]
