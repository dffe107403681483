"""Memory of batches that are no longer used, for the next ones: the kernel clears new memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Arrays that are given out again once nothing refers to them. Safe to use from threads.

    There is no lock, which a process that is forked could find locked for ever: a thread looks only
    at arrays that it took out of the queue.
    """

    def __init__(self, most: int) -> None:
        """Keep about this number of arrays at most; others are made when all are in use."""
        self._most = most
        self._kept: deque[tuple[NDArray[np.int16], weakref.ref[NDArray[np.int16]]]] = deque()

    def __reduce__(self) -> tuple[type[Buffers], tuple[int]]:
        return Buffers, (self._most,)

    def take(self, shape: Sequence[int]) -> NDArray[np.int16]:
        """An array of int16 with undefined values. Its views and tensors count as use."""
        memory = self._find_idle(shape)
        if memory is None:
            memory = np.empty(shape, np.int16)
        # An array of its own on this memory: NumPy lets views refer to it, and not to `memory`.
        lent = np.asarray(memory.data)
        if len(self._kept) < self._most:
            self._kept.append((memory, weakref.ref(lent)))
        return lent[: shape[0]]

    def _find_idle(self, shape: Sequence[int]) -> NDArray[np.int16] | None:
        for _ in range(len(self._kept)):
            try:
                memory, lent = self._kept.popleft()
            except IndexError:  # other threads look at them
                return None
            fits = memory.shape[1:] == tuple(shape[1:]) and len(memory) >= shape[0]
            if fits and lent() is None:
                return memory
            self._kept.append((memory, lent))
        return None
