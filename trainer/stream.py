"""Stream crops from the store as torch tensors: threads read ahead, the order never changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from store import CorruptStore, Split
from trainer.plan import EpochPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of one optimiser step."""

    index: int
    """Place in the epoch, from 0."""
    cubes: Tensor
    """(n, 1, Z, Y, X) float32 in [0, 1]: the HU window mapped linearly."""
    labels: Tensor
    """(n,) int64 class of each crop."""
    rows: NDArray[np.int64]
    """(n,) rows of the split."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cubes and labels on a device."""
        return self.cubes.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)


class Stream:
    """Batches of one split, read ahead by a few threads (decoding releases the lock).

    Attributes: `waited_s`, seconds that the consumer waited for data so far, and `skipped`,
    the corrupt rows left out so far.
    """

    def __init__(
        self,
        split: Split,
        plan: EpochPlan,
        *,
        window_hu: tuple[float, float] = (-1000.0, 1000.0),
        threads: int = 2,
        skip_corrupt: bool = False,
    ) -> None:
        """Stream `split` in the order of `plan`.

        skip_corrupt
            Leave out rows that cannot be read, and count them, instead of raising
            CorruptStore. A batch may then be shorter, or empty.
        """
        self.plan = plan
        self.waited_s = 0.0
        self.skipped: set[int] = set()
        self._split = split
        self._low_hu, self._high_hu = window_hu
        self._threads = threads
        self._skip_corrupt = skip_corrupt

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from batch `start` on, in order.

        Raises CorruptStore naming split and rows, unless those are to be skipped.
        """
        plans = deque(list(enumerate(self.plan.batches(epoch)))[start:])
        ahead: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="crops") as pool:
            try:
                while plans or ahead:
                    while plans and len(ahead) <= self._threads:  # bounds memory, too
                        index, rows = plans.popleft()
                        ahead.append(pool.submit(self.read, rows, index))
                    began = time.perf_counter()
                    batch = ahead.popleft().result()
                    self.waited_s += time.perf_counter() - began
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def read(self, rows: NDArray[np.int64], index: int = 0) -> Batch:
        """One batch of these rows, in this thread."""
        crops_nzyx = np.empty((len(rows), *self._split.patch.shape[1:]), np.int16)
        corrupt = self._split.patch.read_into(rows, crops_nzyx)
        if corrupt:
            if not self._skip_corrupt:
                raise CorruptStore(self._split.name, corrupt, "checksum failed or data missing")
            self.skipped.update(corrupt)
            whole = ~np.isin(rows, corrupt)
            rows, crops_nzyx = rows[whole], crops_nzyx[whole]
        cubes = crops_nzyx.astype(np.float32)
        cubes -= self._low_hu
        cubes *= 1.0 / (self._high_hu - self._low_hu)
        np.clip(cubes, 0.0, 1.0, out=cubes)
        return Batch(
            index=index,
            cubes=torch.from_numpy(cubes[:, None]),  # (n, 1, Z, Y, X)
            labels=torch.from_numpy(self._split.label[rows].astype(np.int64)),
            rows=rows,
        )
