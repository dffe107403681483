"""Stream crops from the store to the device, in the order of a plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from store import CorruptStore, PatchStore, Split
from trainer.config import TrainConfig
from trainer.data.cache import CropCache, make_cache
from trainer.data.intensity import ZScores
from trainer.data.plan import EpochPlan, draw_patients, select_rows, thin
from trainer.data.readahead import read_ahead
from trainer.errors import TrainError
from trainer.ranks import Ranks

_AHEAD_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of one optimiser step, on the device."""

    index: int
    """Position in the epoch, from 0."""
    rows: NDArray[np.int64]
    """(n,) rows of the split."""
    labels: Tensor
    """(n,) int64 class of each crop."""
    crops: Tensor
    """(n, 1, Z, Y, X) int16 HU."""
    window_hu: tuple[float, float]
    """The HU values that `images` maps to 0 and 1."""
    zscores: ZScores | None = None
    """Maps `images` to what the net sees, if these are z-scores."""

    def __len__(self) -> int:
        return len(self.rows)

    def images(self) -> Tensor:
        """The crops as perturbations take them: (n, 1, Z, Y, X) float32, window mapped to [0, 1].

        The net sees the same, or their z-scores.
        """
        low, high = self.window_hu
        return self.crops.float().sub_(low).mul_(1.0 / (high - low)).clamp_(0.0, 1.0)


class Stream:
    """Batches of one split, read ahead by threads (decoding releases Python's lock).

    Attribute `skipped`: the corrupt rows left out so far.
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
        statistics_hu: NDArray[np.float64] | None = None,
    ) -> None:
        """Stream `split` in the order of `plan`.

        skip_corrupt
            Leave out rows that cannot be read, and count them, instead of raising CorruptStore.
            A batch may then be shorter, or empty.
        cache
            Keeps every crop after it was read once.
        statistics_hu
            (scans, 2) mean and standard deviation of each scan, for z-scores.
        """
        self.plan = plan
        self.device = torch.device(device)
        self.window_hu = window_hu
        self.skipped: set[int] = set()
        self._split = split
        self._threads = threads
        self._skip_corrupt = skip_corrupt
        self._cache = cache
        self._statistics_hu = statistics_hu

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch in order, from batch `start` on.

        At most `threads` + 1 batches are read ahead, fewer where they would exceed 2 GiB. Raises
        CorruptStore naming split and rows, unless corrupt rows are skipped.
        """
        planned = itertools.islice(enumerate(self.plan.batches(epoch)), start, None)
        batch_bytes = 2 * self.plan.batch_size * math.prod(self._split.patch.shape[1:])
        threads = min(self._threads, max(1, _AHEAD_BYTES // batch_bytes))
        ahead = read_ahead(lambda item: (item[0], *self._read(item[1])), planned, threads=threads)
        return (self._load(*read) for read in ahead)

    def read(self, rows: NDArray[np.int64], index: int = 0) -> Batch:
        """One batch of these rows, without threads."""
        return self._load(index, *self._read(rows))

    def _read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor | None]:
        """The rows that can be read, and their crops (n, 1, Z, Y, X) on the CPU.

        The crops are None when the cache holds all of them.
        """
        if self._cache is not None and self._cache.holds(rows):
            return rows, None
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
            readable = ~np.isin(rows, corrupt)
            rows, crops = rows[readable], crops[torch.from_numpy(readable)]
        return rows, crops

    def _load(self, index: int, rows: NDArray[np.int64], crops: Tensor | None) -> Batch:
        """The batch on the device, from the CPU or from the cache."""
        if crops is not None:
            crops = crops.to(self.device, non_blocking=True)
            if self._cache is not None:
                self._cache.put(rows, crops)
        else:
            assert self._cache is not None
            crops = self._cache.take(rows).to(self.device, non_blocking=True)
        labels = torch.from_numpy(self._split.label[rows].astype(np.int64))
        labels, zscores = labels.to(self.device, non_blocking=True), None
        if self._statistics_hu is not None:
            statistics = torch.from_numpy(self._statistics_hu[self._split.scan[rows]]).float()
            statistics = statistics.to(self.device, non_blocking=True)
            zscores = ZScores.of_scans(statistics, self.window_hu)
        return Batch(index, rows, labels, crops, self.window_hu, zscores)


def open_stream(
    store: PatchStore, split: Split, config: TrainConfig, device: torch.device, ranks: Ranks
) -> Stream:
    """The stream of a run's crops of one split.

    `scales` and `fraction` select train crops only. Raises TrainError when z-scores are wanted and
    the store has no statistics of its scans.
    """
    training = split.name == "train"
    rows = select_rows(
        split.label,
        split.scale,
        scales=config.scales if training else None,
        classes=config.classes,
        excluded=config.excluded_classes or (),
    )
    if training and config.fraction < 1:
        patients = store.scans.patient[split.scan]
        drawn = draw_patients(patients, config.fraction, config.seed)
        rows = rows[np.isin(patients[rows], drawn)]
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
        statistics_hu=read_statistics(store) if config.normalise == "zscore" else None,
    )


def read_statistics(store: PatchStore) -> NDArray[np.float64]:
    """(scans, 2) mean and standard deviation of each scan's HU.

    Raises TrainError for a store of an earlier version, which has none.
    """
    if not store.has_statistics:
        raise TrainError(
            f"{store.path}: was made by an earlier version, without mean and deviation of each"
            " scan, which normalise zscore needs; prepare the archive again into another folder, or"
            " use normalise window"
        )
    return np.stack([store.scans.mean_hu, store.scans.std_hu], axis=1)
