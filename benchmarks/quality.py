"""Does the consistency score tell discovered classes from shuffled ones: its AUC.

    python -m benchmarks.quality STORE...

For each store: the probability that a class of the store scores higher than one whose members were
dealt out at random (its AUC), and the mean scores.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from store import PatchStore
from store.quality import assess, share_above

SHUFFLES = 5


def measure(store: PatchStore) -> str:
    """One line of the table."""
    began = time.perf_counter()
    true = np.array([quality.consistency for quality in assess(store)])
    seconds = time.perf_counter() - began
    rng = np.random.default_rng(0)
    shuffled = []
    for _ in range(SHUFFLES):
        for split in (store.train, store.validation):
            split.label = rng.permutation(split.label)
        shuffled += [quality.consistency for quality in assess(store)]
    return (
        f"| {store.path.name} | {len(true)} | {share_above(true, np.array(shuffled)):.3f}"
        f" | {true.mean():.3f} | {np.mean(shuffled):.3f} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    print("| store | classes | AUC | mean consistency | shuffled | s |\n|---|---|---|---|---|---|")
    for path in sys.argv[1:]:
        print(measure(PatchStore(path)), flush=True)
