"""Batches of crops from a store, in the order of a plan; `pretrain` trains on them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from store import CorruptStore, PatchStore, StoreError, read_annotation
from store.decisions import list_excluded_members, parse_member
from store.format import SPLITS, format_rows
from store.reader import Split
from store.settings import differences, require, require_choice
from trainer.config import CacheMode, Normalise
from trainer.data.buffers import Buffers
from trainer.data.cache import CropCache, make_cache
from trainer.data.epochs import EpochCounter
from trainer.data.intensity import ZScores
from trainer.data.plan import EpochPlan, draw_patients, leave_out_members, select_rows, thin
from trainer.data.readahead import read_ahead
from trainer.device import upload
from trainer.errors import SettingError, TrainError
from trainer.ranks import Ranks

_AHEAD_BYTES = 2**31
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of one optimiser step."""

    epoch: int
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; a DataLoader with `pin_memory` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        zscores = self.zscores
        if zscores is not None:
            zscores = ZScores(change(zscores.gain), change(zscores.offset))
        return dataclasses.replace(
            self, labels=change(self.labels), crops=change(self.crops), zscores=zscores
        )


class PatchDataset(IterableDataset[Batch]):
    """Batches of one split, shuffled, read ahead by threads; what `pretrain` trains on.

    Iterating over it gives one epoch, each time the next one. The order depends on seed and epoch
    alone. It needs no DataLoader, because decoding releases Python's lock: threads keep a GPU busy.
    In a DataLoader, give `batch_size=None`; its workers then read different batches.

    With several processes (torch.distributed), each gets its part of every batch.

    Attributes: `plan`, an EpochPlan; `skipped`, the corrupt rows that were left out, also by
    DataLoader workers.

    >>> for batch in PatchDataset("chest.store", batch_size=64):  # doctest: +SKIP
    ...     loss = step(batch.images(), batch.labels)
    """

    def __init__(
        self,
        store: str | Path | PatchStore,
        split: str = "train",
        *,
        batch_size: int = 64,
        classes: Collection[int] | None = None,
        scales: Collection[int] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        threads: int = 2,
        cache: CacheMode = "auto",
        device: torch.device | str = "cpu",
        rows: Collection[int] | NDArray[np.integer[Any]] | None = None,
        excluded_classes: Collection[int] | None = None,
        excluded_members: Collection[str] | None = None,
        max_batches: int | None = None,
        shuffle: bool | None = None,
        normalise: Normalise = "window",
        skip_corrupt: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        """Choose rows of a store.

        store
            An opened store, or its path.
        batch_size
            Crops of one step, over all processes. The batches of an epoch differ by at most one.
        classes, scales
            Classes and scales (0 is the base crop) to use. Default: all.
        fraction
            Share of the split's patients to use, drawn by the seed.
        seed
            Seed of the order and of `fraction`.
        threads
            Threads that read and decode; in a DataLoader, of each worker.
        cache
            Where decoded crops are kept after they were read once: "memory", "device" (the GPU's
            memory), "none", or "auto": where they need at most half of the free memory, preferably
            on the device. DataLoader workers have no cache.
        device
            Where the tensors of a batch are; "cpu" in DataLoader workers.
        rows
            Use only these rows of the split, in store order before they are shuffled. Default: all.
        excluded_classes
            Classes to leave out. Default: those excluded by `semgen classes --exclude`.
        excluded_members
            Members of classes to leave out, each as CLASS=SCAN with a scan id. Default: those
            excluded by `semgen classes --exclude-member`.
        max_batches
            Use at most this many batches, of rows spread evenly over the others. Default: all.
        shuffle
            Default: True for "train"; "validation" is read in store order, the same in each epoch.
        normalise
            "zscore" gives each batch `zscores`, from the mean and deviation of each scan.
        skip_corrupt
            Leave out rows that cannot be read, and collect them in `skipped`, instead of raising
            CorruptStore. A batch may then be shorter, or empty.
        ranks
            This process among all. Default: as torch.distributed says when iterating begins.

        Raises StoreError when the store cannot be read; TrainError for a wrong setting.
        """
        super().__init__()
        for name, choice, allowed in (
            ("split", split, SPLITS),
            ("cache", cache, get_args(CacheMode)),
            ("normalise", normalise, get_args(Normalise)),
        ):
            require_choice(name, choice, allowed, error=SettingError)
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("threads", threads, 1),
            ("max_batches", 1 if max_batches is None else max_batches, 1),
        ):
            require(_is_whole(number), name, "a whole number", number, error=SettingError)
            require(number >= least, name, f">= {least}", number, error=SettingError)
        holds = isinstance(fraction, Real) and 0 < fraction <= 1
        require(holds, "fraction", "in (0, 1]", fraction, error=SettingError)
        store = store if isinstance(store, PatchStore) else PatchStore(store)
        self.window_hu = store.window_hu
        self._store, self._split = store, store.split(split)
        self._threads, self._skip_corrupt = threads, skip_corrupt
        self._cache_mode: CacheMode = cache
        self._cache: CropCache | None = None
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise SettingError(f"device must be one of PyTorch, got {device!r}") from error
        # of each row, in memory that DataLoader workers share
        self._skipped = torch.zeros(len(self._split), dtype=torch.bool).share_memory_()
        self._buffers = Buffers(threads + 3)  # being read, waiting, and with the caller
        self._statistics_hu = read_statistics(store) if normalise == "zscore" else None
        selected = _choose_rows(
            store,
            self._split,
            classes=classes,
            scales=scales,
            rows=rows,
            excluded_classes=excluded_classes,
            excluded_members=excluded_members,
            fraction=fraction,
            seed=seed,
        )
        self._ranks = ranks
        self._plan = EpochPlan(
            rows=thin(selected, None if max_batches is None else max_batches * batch_size),
            batch_size=batch_size,
            seed=seed,
            shuffle=split == "train" if shuffle is None else shuffle,
        )
        self._epochs = EpochCounter()
        self._position: tuple[int, int] | None = None  # epoch and batch to come; None before both
        self._start: int | None = None  # the batch to resume at, with as many workers as then
        self._start_workers = 0

    @property
    def plan(self) -> EpochPlan:
        """The batches of every epoch, and the part of them that belongs to this process."""
        ranks = self._ranks
        if ranks is None and dist.is_available() and dist.is_initialized():
            ranks = Ranks(dist.get_rank(), dist.get_world_size())
        if ranks is None:
            return self._plan
        return dataclasses.replace(self._plan, rank=ranks.rank, world_size=ranks.size)

    @property
    def skipped(self) -> set[int]:
        """The corrupt rows that were left out."""
        return set(self._skipped.nonzero().ravel().tolist())

    @property
    def num_classes(self) -> int:
        """Classes of the store, those not used included: labels are below it."""
        return self._store.num_classes

    def __len__(self) -> int:
        """Batches in an epoch, over all DataLoader workers."""
        return len(self._plan)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as in a DataLoader worker, opens the store again, and has no cache yet."""
        plan = self.plan  # of this process: a worker does not belong to torch.distributed
        ranks = Ranks(plan.rank, plan.world_size)
        return {**self.__dict__, "_cache": None, "_ranks": ranks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._skipped.share_memory_()  # a copy outside a DataLoader has memory of its own

    # Epochs, for a loop that is written as `for batch in dataset`

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch, or the rest of the one to resume."""
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if self._start is not None and self._start_workers != self._num_workers():
            raise TrainError(
                f"the state that was loaded is one of {self._start_workers} DataLoader workers, not"
                f" {self._num_workers()}; with workers, load it into torchdata's"
                " StatefulDataLoader"
            )
        epoch = self._epochs.begin(worker.seed - worker.id if worker else 0)
        start, self._start = number if self._start is None else self._start, None
        self._position = epoch, start
        return self._advance(epoch, start, step)

    def _advance(self, epoch: int, start: int, step: int) -> Iterator[Batch]:
        for batch in self.batches(epoch, start, step):
            self._position = epoch, batch.index + step
            yield batch
        if not self._num_workers():  # other workers may still be in this epoch
            self._position = None

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one; without this, each pass over the dataset is the next epoch."""
        holds = _is_whole(epoch) and epoch >= 0
        require(holds, "epoch", "a whole number >= 0", epoch, error=SettingError)
        self._epochs.set(epoch)
        self._start = self._position = None

    def state_dict(self) -> dict[str, Any]:
        """Where this process is: loaded later, reading resumes at the batch after the last one.

        With DataLoader workers, their datasets know it, not this one: use torchdata's
        StatefulDataLoader, which asks them.
        """
        epoch, batch = self._position or (self._epochs.peek(), None)
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "batch": batch,
            "order": self._describe_order(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was called.

        Raises TrainError where it was called for another order: another store, other settings, or
        another number of processes or workers.
        """
        if state.get("version") != _STATE_VERSION:
            raise TrainError(
                f"state_dict of version {state.get('version')}, but this version of semgen reads"
                f" version {_STATE_VERSION}"
            )
        changed = differences(self._describe_order(), state["order"])
        if changed:
            raise TrainError(
                f"state_dict of batches in another order ({'; '.join(changed)}); resume with the"
                " same store, settings and number of processes and workers"
            )
        self.set_epoch(state["epoch"])
        self._start, self._start_workers = state["batch"], self._num_workers()
        if self._start is not None:
            self._position = state["epoch"], self._start

    def _describe_order(self) -> dict[str, Any]:
        """All that the order of this process's batches depends on."""
        plan = self.plan
        return {
            "fingerprint": self._store.fingerprint,
            "split": self._split.name,
            "rows": len(plan.rows),
            "rows_crc32": zlib.crc32(plan.rows.tobytes()),
            "batch_size": plan.batch_size,
            "seed": plan.seed,
            "shuffle": plan.shuffle,
            "processes": plan.world_size,
            "workers": self._num_workers(),
        }

    @staticmethod
    def _num_workers() -> int:
        """Workers of the DataLoader whose worker this process is; 0 if it is none."""
        worker = get_worker_info()
        return worker.num_workers if worker else 0

    # Batches

    def batches(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """The batches of any epoch in order, from batch `start` on; of these, every `step`-th.

        At most `threads` + 1 batches are read ahead, fewer where they would exceed 2 GiB. Raises
        CorruptStore naming split and rows, unless corrupt rows are skipped.
        """
        if get_worker_info():
            if self._device.type != "cpu":
                raise TrainError(
                    f"device {self._device}: DataLoader workers read into main memory; use no"
                    " workers, or leave device out and move each batch with Batch.to"
                )
        elif self._cache is None:
            shape = self._split.patch.shape[1:]
            self._cache = make_cache(self._cache_mode, self._plan.rows, shape, self._device)
        planned = itertools.islice(enumerate(self.plan.batches(epoch)), start, None, step)
        batch_bytes = 2 * self._plan.batch_size * math.prod(self._split.patch.shape[1:])
        threads = min(self._threads, max(1, _AHEAD_BYTES // batch_bytes))
        ahead = read_ahead(lambda item: (item[0], *self._read(item[1])), planned, threads=threads)
        return (self._load(epoch, *read) for read in ahead)

    def read(self, rows: NDArray[np.int64]) -> Batch:
        """One batch of these rows, without threads."""
        return self._load(0, 0, *self._read(rows))

    def _read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor | None]:
        """The rows that can be read, and their crops (n, 1, Z, Y, X) on the CPU.

        The crops are None when a cache on the device holds all of them.
        """
        cache = self._cache if self._cache is not None and self._cache.holds(rows) else None
        if cache is not None and cache.device.type != "cpu":
            return rows, None
        shape = (len(rows), 1, *self._split.patch.shape[1:])
        if self._device.type == "cuda":  # torch keeps pinned memory itself
            crops = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        else:
            crops = torch.from_numpy(self._buffers.take(shape))
        if cache is not None:
            return rows, cache.take(rows, out=crops)
        corrupt = self._split.patch.read_into(rows, crops[:, 0].numpy())
        if corrupt:
            if not self._skip_corrupt:
                raise CorruptStore.of_rows(self._split.name, corrupt)
            self._skipped[corrupt] = True
            readable = ~np.isin(rows, corrupt)
            rows, crops = rows[readable], crops[torch.from_numpy(readable)]
        return rows, crops

    def _load(self, epoch: int, index: int, rows: NDArray[np.int64], crops: Tensor | None) -> Batch:
        """The batch on the device, from the CPU or from the cache."""
        device, cache, zscores = self._device, self._cache, None
        if crops is None:
            assert cache is not None
            crops = cache.take(rows)
        else:
            if cache is not None and not cache.holds(rows):
                cache.put(rows, crops)
            crops = upload(crops, device)
        labels = upload(torch.from_numpy(self._split.label[rows].astype(np.int64)), device)
        if self._statistics_hu is not None:
            statistics = torch.from_numpy(self._statistics_hu[self._split.scan[rows]]).float()
            zscores = ZScores.of_scans(upload(statistics, device), self.window_hu)
        return Batch(epoch, index, rows, labels, crops, self.window_hu, zscores)


def _choose_rows(
    store: PatchStore,
    split: Split,
    *,
    classes: Collection[int] | None,
    scales: Collection[int] | None,
    rows: Collection[int] | NDArray[np.integer[Any]] | None,
    excluded_classes: Collection[int] | None,
    excluded_members: Collection[str] | None,
    fraction: float,
    seed: int,
) -> NDArray[np.intp]:
    """The rows of a split that these arguments of `PatchDataset` leave, in store order."""
    if excluded_classes is None:
        excluded_classes = read_annotation(store.location).excluded
    for name, chosen, what, count in (
        ("classes", classes, "store has classes", store.num_classes),
        ("excluded_classes", excluded_classes, "store has classes", store.num_classes),
        ("scales", scales, "store has scales", store.num_scales),
        ("rows", rows, "split has rows", len(split)),
    ):
        if chosen is not None:
            _check_numbers(name, chosen, what, count)
    for name, chosen in (("classes", classes), ("scales", scales)):
        empty = chosen is not None and not len(chosen)
        require(not empty, name, "None for all, or not empty", chosen, error=SettingError)
    selected = select_rows(
        split.label,
        split.scale,
        scales=scales,
        classes=classes,
        excluded=excluded_classes,
    )
    if excluded_members is None:
        excluded_members = list_excluded_members(store)
    selected = leave_out_members(
        selected, split.label, split.scan, _find_members(store, excluded_members)
    )
    if rows is not None:
        selected = selected[np.isin(selected, np.asarray(rows))]
    if fraction < 1:
        patients = store.scans.patient[split.scan]
        drawn = draw_patients(patients, fraction, seed)
        selected = selected[np.isin(patients[selected], drawn)]
    return selected


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_numbers(
    name: str, chosen: Collection[int] | NDArray[Any], what: str, count: int
) -> None:
    """Raise TrainError for a number that the store does not have."""
    if not isinstance(chosen, Collection | np.ndarray):
        raise TrainError(f"{name} must be a list or array of whole numbers, got {chosen!r}")
    numbers = np.asarray(list(chosen))
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise TrainError(f"{name} must be whole numbers, got {numbers.dtype}")
    unknown = numbers[(numbers < 0) | (numbers >= count)].tolist()
    if unknown:
        raise TrainError(f"{name}: the {what} 0 to {count - 1}, not {format_rows(unknown)}")


def _find_members(store: PatchStore, members: Collection[str]) -> list[tuple[int, int]]:
    """Class and row in `scans` of each member; TrainError where there is no such member."""
    try:
        return [parse_member(store, member) for member in members]
    except StoreError as error:
        raise TrainError(f"excluded_members: {error}") from error


def read_statistics(store: PatchStore) -> NDArray[np.float64]:
    """(scans, 2) mean and standard deviation of each scan's HU.

    Raises TrainError for a store of an earlier version, which has none.
    """
    if not store.has_statistics:
        raise TrainError(
            f"{store.location}: was made by an earlier version, without mean and deviation of each"
            " scan, which normalise zscore needs; prepare the archive again into another folder, or"
            " use normalise window"
        )
    return np.stack([store.scans.mean_hu, store.scans.std_hu], axis=1)
