"""Which rows a training run reads, and in which order: pure arithmetic, no input or output.

The order depends on seed and epoch alone. A run that is resumed at any batch therefore sees the
same rows, and tests can prove without a store that every row is read once.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.seeds import derive_seeds


def select_rows(
    label: NDArray[np.integer[Any]],
    scale: NDArray[np.integer[Any]],
    *,
    scales: Collection[int] | None = None,
    classes: Collection[int] | None = None,
    excluded: Collection[int] = (),
) -> NDArray[np.int64]:
    """Rows of the given scales and classes, without excluded classes, in store order.

    label, scale
        (n,) class and scale of each row of a split.
    scales, classes
        None: all.
    """
    wanted = ~np.isin(label, list(excluded))
    for values, chosen in ((scale, scales), (label, classes)):
        if chosen is not None:
            wanted &= np.isin(values, list(chosen))
    return np.flatnonzero(wanted).astype(np.int64)


def leave_out_members(
    rows: NDArray[np.int64],
    label: NDArray[np.integer[Any]],
    scan: NDArray[np.integer[Any]],
    members: Collection[tuple[int, int]],
) -> NDArray[np.int64]:
    """The rows without those of some members, at all scales.

    label, scan
        (n,) class and scan of each row of the split.
    members
        Class and scan of each member to leave out.
    """
    if not members:
        return rows
    pairs = label[rows].astype(np.int64) << 32 | scan[rows]
    return rows[~np.isin(pairs, [number << 32 | row for number, row in members])]


def draw_patients(
    patients: NDArray[np.integer[Any]], fraction: float, seed: int
) -> NDArray[np.integer[Any]]:
    """Draw a share of the patients, at least one; a smaller share is a subset of a larger one.

    >>> draw_patients(np.array([3, 3, 5, 7, 9]), 0.5, seed=0).size
    2
    """
    distinct = np.unique(patients)
    order = np.random.default_rng(derive_seeds(seed, "fraction")[0]).permutation(distinct)
    return order[: max(1, round(fraction * len(order)))]


def thin(rows: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the rows, evenly spread over the store.

    >>> thin(np.arange(10), 4).tolist()
    [0, 2, 5, 7]
    """
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.arange(limit, dtype=np.int64) * len(rows) // limit]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """The batches of every epoch.

    Batches of one epoch differ by at most one row in length: a last batch of two or three crops
    would disturb batch normalisation. With several processes, each takes its part of every batch,
    so `batch_size` counts the rows of one optimiser step over all processes.
    """

    rows: NDArray[np.int64]
    """The rows of one epoch, each once."""
    batch_size: int
    """Maximum rows of one optimiser step, over all processes."""
    seed: int = 0
    shuffle: bool = True
    """False keeps the order of `rows`, for validation."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def share(self, batch: int) -> float:
        """The fraction of a batch's rows that belongs to this process."""
        of_batch = _part_length(len(self.rows), len(self), batch)
        return _part_length(of_batch, self.world_size, self.rank) / of_batch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows in the order of this epoch, for all processes together."""
        if not self.shuffle:
            return self.rows
        generator = np.random.default_rng(derive_seeds(self.seed, "order", epoch)[0])
        return generator.permutation(self.rows)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each batch of this epoch that belong to this process."""
        if not len(self.rows):
            return []
        batches = np.array_split(self.order(epoch), len(self))
        return [np.array_split(batch, self.world_size)[self.rank] for batch in batches]


def _part_length(length: int, parts: int, part: int) -> int:
    """Length of one of the parts that `numpy.array_split` makes."""
    shortest, num_longer = divmod(length, parts)
    return shortest + (part < num_longer)
