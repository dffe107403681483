"""Share of a training's time that it waits for batches: from a store in a folder, and from memory.

    python -m benchmarks.stalls STORE [--step-ms 25 50 100] [--rounds 5] [--limit CROPS]

Batches of 64, two threads. After each batch the loop pauses for `--step-ms`, as a GPU needs for its
step; the cores are free meanwhile. Folder: every crop is read from its file, which is in the page
cache, and decoded. Memory: every crop was decoded before, and is cached. Each round reads an epoch
in every way, in another order; ratios are within a round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
from pathlib import Path

import torch

from benchmarks.remote import BATCH_SIZE, THREADS, read_epochs
from store import PatchStore
from trainer import PatchDataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[25, 50, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="use the first crops only")
    given = parser.parse_args()
    num_rows = min(len(PatchStore(given.store).train), given.limit or 2**62)
    datasets = {
        name: PatchDataset(
            given.store, batch_size=BATCH_SIZE, threads=THREADS, rows=range(num_rows), cache=cache
        )
        for name, cache in (("folder", "none"), ("memory", "memory"))
    }
    for dataset in datasets.values():  # fill the page cache and the cache
        read_epochs(dataset, range(1), 0)
    cases = [(name, step_ms) for step_ms in (0, *given.step_ms) for name in datasets]
    rates: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    waits: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for epoch in range(1, given.rounds + 1):
        for case in cases[epoch % len(cases) :] + cases[: epoch % len(cases)]:
            name, step_ms = case
            rate, waiting = read_epochs(datasets[name], range(epoch, epoch + 1), step_ms / 1000)
            rates[case].append(rate)
            waits[case].append(waiting)
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}; {num_rows}"
        f" crops, {-(-num_rows // BATCH_SIZE)} batches an epoch; medians of {given.rounds} rounds\n"
    )
    print("| step, ms | folder, crops/s | waiting | memory, crops/s | waiting | folder / memory |")
    print("|---|---|---|---|---|---|")
    for step_ms in (0, *given.step_ms):
        cells = []
        for name in datasets:
            cells.append(f"{statistics.median(rates[name, step_ms]):.0f}")
            cells.append(f"{statistics.median(waits[name, step_ms]):.1%}" if step_ms else "")
        pairs = zip(rates["folder", step_ms], rates["memory", step_ms], strict=True)
        cells.append(f"{statistics.median(folder / memory for folder, memory in pairs):.3f}")
        print(f"| {step_ms:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
