"""Memory of batches that are no longer used, for the next ones: the kernel clears new memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_IDLE_REFERENCES = 2
"""Of an array that nothing else refers to: a local variable, and an argument."""


class Buffers:
    """Arrays that are given out again once nothing refers to them. Safe to use from threads.

    There is no lock, which a process that is forked could find locked for ever: a thread looks only
    at arrays that it took out of the queue.
    """

    def __init__(self, most: int) -> None:
        """Keep about this number of arrays at most; others are made when all are in use."""
        self._most = most
        self._kept: deque[NDArray[np.int16]] = deque()

    def __reduce__(self) -> tuple[type[Buffers], tuple[int]]:
        return Buffers, (self._most,)

    def take(self, shape: Sequence[int]) -> NDArray[np.int16]:
        """An array of int16 with undefined values. Its views and tensors count as use."""
        for _ in range(len(self._kept)):
            try:
                array = self._kept.popleft()
            except IndexError:  # other threads look at them
                break
            fits = array.shape[1:] == tuple(shape[1:]) and len(array) >= shape[0]
            idle = sys.getrefcount(array) == _IDLE_REFERENCES
            view = array[: shape[0]] if fits and idle else None
            self._kept.append(array)
            if view is not None:
                return view
        made = np.empty(shape, np.int16)
        if len(self._kept) < self._most:
            self._kept.append(made)
        return made[:]
