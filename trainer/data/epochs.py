"""The number of the epoch that a pass over a dataset reads, also in DataLoader workers."""

from __future__ import annotations

import torch

_SLOTS, _EPOCH_BITS = 256, 31


class EpochCounter:
    """Numbers the passes over a dataset: each pass is the next epoch.

    A DataLoader may start new workers for each pass, with new copies of the dataset, and may stop
    them before they begin. Still, all workers of a pass must take the same epoch. So the counter is
    in memory that is shared by all copies, and a pass is known by a key that its workers share. No
    lock is needed: workers that enter a pass at the same time find, and write, the same number.
    """

    def __init__(self) -> None:
        # the epoch to begin with; then, in the slot of a pass, its key and 1 + its epoch
        self._table = torch.zeros(1 + _SLOTS, dtype=torch.int64).share_memory_()
        self._num_local = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._table.share_memory_()  # a copy outside a DataLoader has memory of its own

    def set(self, epoch: int) -> None:
        """Make `epoch` the one of the next pass."""
        self._table[1:] = 0
        self._table[0] = epoch

    def peek(self) -> int:
        """The epoch of the next pass."""
        return max(int(self._table[0]), int((self._table[1:] & (2**_EPOCH_BITS - 1)).max()))

    def begin(self, key: int = 0) -> int:
        """The epoch of the pass that begins now.

        key
            Seed of the DataLoader, which all workers of a pass share; 0 without workers.
        """
        self._num_local += 1  # workers that are kept have one key for all passes
        key = hash((key, self._num_local)) % 2**32
        epoch = self.peek()  # first: without an entry after it, nobody of this pass was counted
        entry = int(self._table[1 + key % _SLOTS])
        if entry and entry >> _EPOCH_BITS == key:
            epoch = entry % 2**_EPOCH_BITS - 1
        self._table[1 + key % _SLOTS] = key << _EPOCH_BITS | (epoch + 1)
        return epoch
