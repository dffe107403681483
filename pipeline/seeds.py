"""Seeds of everything that is random in preparing a store: keys (seed, role, index...).

The numbers of the roles decide the bytes of every store: never change one; a new role gets a new
number. Synthetic patients have their own, in `pipeline.phantom.patients`.
"""

from __future__ import annotations

import hashlib
from typing import Final

REFERENCES: Final = 1
"""Order in which scans are tried as references; index: the round."""
COORDINATE: Final = 2
"""Coordinates tried in a reference; index: the round, the scan's row."""
SCALES: Final = 3
"""Sizes and shifts of the crops at larger scales; index: the class."""
VALIDATION: Final = 4
"""Which patients are for validation."""
TRAINING_ORDER: Final = 11
"""Order of the scans in training the autoencoder; index: the epoch."""
AUGMENTATION: Final = 12
"""Changes to the autoencoder's inputs; index: the step."""
INITIAL_WEIGHTS: Final = 13
"""Weights of the untrained autoencoder."""


def hash_seed(*key: int) -> int:
    """A 63-bit seed from (seed, role, index...), for torch, which takes one number."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
