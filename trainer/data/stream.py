"""Stream crops from the store to the device: threads read ahead, the order never changes."""

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

from store import CorruptStore, PatchStore, Split
from trainer.config import TrainConfig
from trainer.data.cache import CropCache, make_cache
from trainer.data.plan import EpochPlan, draw_persons, select_rows, thin
from trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of one optimiser step, still on the host; `Stream.load` takes them to the device."""

    index: int
    """Place in the epoch, from 0."""
    rows: NDArray[np.int64]
    """(n,) rows of the split."""
    labels: Tensor
    """(n,) int64 class of each crop."""
    crops: Tensor | None
    """(n, 1, Z, Y, X) int16 HU; None when the cache has all of them."""

    def __len__(self) -> int:
        return len(self.rows)


class Stream:
    """Batches of one split, read ahead by a few threads (decoding releases the lock).

    Attributes: `waited_s`, seconds that the consumer waited for data so far, `skipped`, the
    corrupt rows left out so far, and `window_hu`, what becomes 0 and 1.
    """

    def __init__(
        self,
        split: Split,
        plan: EpochPlan,
        *,
        device: torch.device | str = "cpu",
        window_hu: tuple[float, float] = (-1000.0, 1000.0),
        threads: int = 2,
        skip_corrupt: bool = False,
        cache: CropCache | None = None,
    ) -> None:
        """Stream `split` in the order of `plan`.

        skip_corrupt
            Leave out rows that cannot be read, and count them, instead of raising
            CorruptStore. A batch may then be shorter, or empty.
        cache
            Keeps what was read once.
        """
        self.plan = plan
        self.device = torch.device(device)
        self.waited_s = 0.0
        self.skipped: set[int] = set()
        self._split = split
        self.window_hu = window_hu
        self._threads = threads
        self._skip_corrupt = skip_corrupt
        self._cache = cache

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
        crops = None
        if self._cache is None or not self._cache.holds(rows):
            crops = torch.empty(
                (len(rows), 1, *self._split.patch.shape[1:]),
                dtype=torch.int16,
                pin_memory=self.device.type == "cuda",
            )
            corrupt = self._split.patch.read_into(rows, crops[:, 0].numpy())
            if corrupt:
                if not self._skip_corrupt:
                    raise CorruptStore(self._split.name, corrupt, "checksum failed or data missing")
                self.skipped.update(corrupt)
                whole = ~np.isin(rows, corrupt)
                rows, crops = rows[whole], crops[torch.from_numpy(whole)]
        labels = torch.from_numpy(self._split.label[rows].astype(np.int64))
        return Batch(index, rows, labels, crops)

    def load(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch on the device: (n, 1, Z, Y, X) float32, HU window to [0, 1], and labels (n,)."""
        if batch.crops is not None:
            crops = batch.crops.to(self.device, non_blocking=True)
            if self._cache is not None:
                self._cache.put(batch.rows, crops)
        else:
            assert self._cache is not None
            crops = self._cache.take(batch.rows).to(self.device, non_blocking=True)
        low, high = self.window_hu
        cubes = crops.float().sub_(low).mul_(1.0 / (high - low))
        return cubes.clamp_(0.0, 1.0), batch.labels.to(self.device, non_blocking=True)


def open_stream(
    store: PatchStore, split: Split, config: TrainConfig, device: torch.device, ranks: Ranks
) -> Stream:
    """The crops of a split that a run wants, in its order; validation takes every one of its."""
    training = split.name == "train"
    rows = select_rows(
        split.label,
        split.scale,
        scales=config.scales if training else None,
        classes=config.classes,
        excluded=config.excluded_classes or (),
    )
    if training and config.fraction < 1:
        persons = store.scans.patient[split.scan]
        rows = rows[np.isin(persons[rows], draw_persons(persons, config.fraction, config.seed))]
    if not training and config.validation_batches is not None:
        rows = thin(rows, config.validation_batches * config.batch_size)
    return Stream(
        split,
        EpochPlan(
            rows=rows,
            batch_size=config.batch_size // (1 if training else config.accumulate),
            seed=config.seed,
            shuffle=training,
            rank=ranks.rank,
            world_size=ranks.size,
        ),
        device=device,
        window_hu=store.window_hu,
        threads=config.threads,
        skip_corrupt=config.skip_corrupt,
        cache=make_cache(config.cache, rows, split.patch.shape[1:], device),
    )
