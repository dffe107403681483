"""Cache of decoded crops in main memory or GPU memory: only the first epoch reads the store."""

from __future__ import annotations

import math
import os

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.device import upload
from trainer.errors import TrainError

_SHARE = 0.5
"""Maximum share of the free memory that cache "auto" takes."""


class CropCache:
    """Crops of some rows of a split, int16 HU; filled while the first epoch is read."""

    def __init__(
        self, rows: NDArray[np.int64], shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Allocate memory on `device` for the crops, each (Z, Y, X), of these rows."""
        self._rows = np.sort(rows)
        self._crops = torch.empty((len(rows), 1, *shape), dtype=torch.int16, device=device)
        self._filled = np.zeros(len(rows), bool)

    def holds(self, rows: NDArray[np.int64]) -> bool:
        """Whether all of these rows are cached."""
        return bool(self._filled[self._slots(rows)].all())

    @property
    def device(self) -> torch.device:
        return self._crops.device

    def take(self, rows: NDArray[np.int64], out: Tensor | None = None) -> Tensor:
        """The crops of these rows, (n, 1, Z, Y, X) int16, on the cache's device; in `out`."""
        slots = upload(torch.from_numpy(self._slots(rows)), self.device)
        return torch.index_select(self._crops, 0, slots, out=out)

    def put(self, rows: NDArray[np.int64], crops: Tensor) -> None:
        """Keep (n, 1, Z, Y, X) crops."""
        slots = self._slots(rows)
        self._crops[upload(torch.from_numpy(slots), self.device)] = upload(crops, self.device)
        self._filled[slots] = True

    def _slots(self, rows: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.searchsorted(self._rows, rows)


def make_cache(
    mode: str, rows: NDArray[np.int64], shape: tuple[int, ...], device: torch.device
) -> CropCache | None:
    """A cache for rows of a split, where `mode` (`TrainConfig.cache`) says; None for no cache.

    Raises TrainError when memory is too small for a mode other than "auto".
    """
    chosen = _choose(mode, 2 * len(rows) * math.prod(shape), device)
    if chosen == "none":
        return None
    return CropCache(rows, shape, device if chosen == "device" else torch.device("cpu"))


def _choose(mode: str, needed: int, device: torch.device) -> str:
    """Resolve "auto": "device" if `needed` bytes fit there, else "memory", else "none"."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = {"memory": psutil.virtual_memory().available // processes, "none": needed}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    if mode == "device" and device.type != "cuda":
        mode = "memory"  # the CPU's memory is main memory
    if mode != "auto":
        if needed > free[mode]:
            raise TrainError(
                f"cache {mode}: {needed / 2**30:.3g} GiB of crops do not fit into"
                f" {free[mode] / 2**30:.3g} GiB of free memory; use --cache auto"
            )
        return mode
    return next(name for name, size in free.items() if name == "none" or needed <= _SHARE * size)
