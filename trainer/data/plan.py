"""Which rows a training run reads, in which order: pure arithmetic, no input or output.

Everything follows from (seed, epoch), so a run resumed at any batch sees what it would have
seen, and coverage and disjointness can be proved without touching a store.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def derive_seeds(seed: int, role: str, *index: int) -> tuple[int, int]:
    """Two 63-bit seeds for one role and place, independent of every other.

    >>> len({*derive_seeds(0, "order", 1), *derive_seeds(0, "order", 2), *derive_seeds(0, "x", 2)})
    6
    """
    sequence = np.random.SeedSequence([seed, zlib.crc32(role.encode()), *index])
    one, other = (sequence.generate_state(2, np.uint64) >> np.uint64(1)).tolist()
    return one, other


def select_rows(
    label: NDArray[np.integer[Any]],
    scale: NDArray[np.integer[Any]],
    *,
    scales: Collection[int] | None = None,
    classes: Collection[int] | None = None,
    excluded: Collection[int] = (),
) -> NDArray[np.int64]:
    """Rows of the wanted scales and of wanted classes that are not excluded, in store order.

    label, scale
        (n,) class and scale of each row of a split.
    scales, classes
        None takes every one.
    """
    wanted = ~np.isin(label, list(excluded))
    for values, chosen in ((scale, scales), (label, classes)):
        if chosen is not None:
            wanted &= np.isin(values, list(chosen))
    return np.flatnonzero(wanted).astype(np.int64)


def draw_persons(
    persons: NDArray[np.integer[Any]], fraction: float, seed: int
) -> NDArray[np.integer[Any]]:
    """A share of the persons, one at least; a smaller share is part of a larger.

    >>> draw_persons(np.array([3, 3, 5, 7, 9]), 0.5, seed=0).size
    2
    """
    different = np.unique(persons)
    order = np.random.default_rng(derive_seeds(seed, "fraction")[0]).permutation(different)
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

    Batches of one epoch differ by at most one row in length: a last batch of two or three
    crops would upset batch normalisation. With several ranks each takes its part of every
    batch, so `batch_size` is what one optimiser step sees.
    """

    rows: NDArray[np.int64]
    """The rows of one epoch, each once."""
    batch_size: int
    """Rows of one optimiser step, over all ranks; the most that a batch holds."""
    seed: int = 0
    shuffle: bool = True
    """False keeps the order of `rows`, as validation does."""
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
        """What part of a batch is this rank's."""
        of_batch = _part_length(len(self.rows), len(self), batch)
        return _part_length(of_batch, self.world_size, self.rank) / of_batch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows in the order of this epoch, all ranks together."""
        if not self.shuffle:
            return self.rows
        generator = np.random.default_rng(derive_seeds(self.seed, "order", epoch)[0])
        return generator.permutation(self.rows)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each batch of this epoch that belong to this rank."""
        if not len(self.rows):
            return []
        whole = np.array_split(self.order(epoch), len(self))
        return [np.array_split(batch, self.world_size)[self.rank] for batch in whole]


def _part_length(length: int, parts: int, part: int) -> int:
    """How long `numpy.array_split` makes one of the parts."""
    each, more = divmod(length, parts)
    return each + (part < more)
