"""Decoded crops kept in memory or on the GPU, so that an epoch after the first reads nothing."""

from __future__ import annotations

import math
import os

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import TrainError

_SHARE = 0.5
"""Of what is free, the most that `auto` takes."""


class CropCache:
    """Crops of some rows of a split, as int16; filled by use."""

    def __init__(
        self, rows: NDArray[np.int64], shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Room for `rows`, each a (Z, Y, X) crop, on a device."""
        self._rows = np.sort(rows)
        self._crops = torch.empty((len(rows), 1, *shape), dtype=torch.int16, device=device)
        self._filled = np.zeros(len(rows), bool)

    def holds(self, rows: NDArray[np.int64]) -> bool:
        """Whether all of these rows are here."""
        return bool(self._filled[self._places(rows)].all())

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """(n, 1, Z, Y, X) int16, where the cache is."""
        return self._crops[torch.from_numpy(self._places(rows)).to(self._crops.device)]

    def put(self, rows: NDArray[np.int64], crops: Tensor) -> None:
        """Keep (n, 1, Z, Y, X) crops."""
        places = self._places(rows)
        there = torch.from_numpy(places).to(self._crops.device)
        self._crops[there] = crops.to(self._crops.device)
        self._filled[places] = True

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.searchsorted(self._rows, rows)


def make_cache(
    mode: str, rows: NDArray[np.int64], shape: tuple[int, ...], device: torch.device
) -> CropCache | None:
    """A cache for rows of a split where `mode` says; None for no cache.

    Raises TrainError when a mode that was asked for by name does not fit.
    """
    place = _choose(mode, 2 * len(rows) * math.prod(shape), device)
    if place == "none":
        return None
    return CropCache(rows, shape, device if place == "device" else torch.device("cpu"))


def _choose(mode: str, needed: int, device: torch.device) -> str:
    """What `auto` comes to: the device where so many bytes fit, else memory, else none."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = {"memory": psutil.virtual_memory().available // processes, "none": needed}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    if mode == "device" and device.type != "cuda":
        mode = "memory"  # the CPU's own
    if mode != "auto":
        if needed > free[mode]:
            raise TrainError(
                f"cache {mode}: {needed / 2**30:.3g} GiB of crops, {free[mode] / 2**30:.3g} GiB"
                " free; use --cache auto"
            )
        return mode
    return next(name for name, room in free.items() if name == "none" or needed <= _SHARE * room)
