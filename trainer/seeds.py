"""Seeds of everything that is random in the trainer."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seeds(seed: int, role: str, *index: int) -> tuple[int, int]:
    """Two 63-bit seeds for one purpose of a run, independent of those for every other purpose.

    role, index
        What is drawn, such as "order", and of which epoch, row and so on.

    >>> len({*derive_seeds(0, "order", 1), *derive_seeds(0, "order", 2), *derive_seeds(0, "x", 2)})
    6
    """
    sequence = np.random.SeedSequence([seed, zlib.crc32(role.encode()), *index])
    first, second = (sequence.generate_state(2, np.uint64) >> np.uint64(1)).tolist()
    return first, second
