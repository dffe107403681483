"""Crops per second of ways to write a training loop, against the loop of `semgen pretrain`.

    python -m benchmarks.loops STORE [--rounds 5] [--limit CROPS]

All read the training crops of STORE in batches of 64, without a cache, with two threads or two
worker processes. Each round measures every way once, in another order; a ratio is within a round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchdata
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from store import PatchStore
from trainer import PatchDataset

BATCH_SIZE = 64
PRETRAIN = "`semgen pretrain`: dataset.batches(epoch)"


class RowByRow(Dataset[tuple[Any, int]]):
    """What a researcher writes who knows `PatchStore` alone."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self.split, self.num_rows = PatchStore(path).train, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.split.read([row])[0], int(self.split.label[row])


def open_loops(path: Path, num_rows: int) -> dict[str, Callable[[int], Iterable[Any]]]:
    """Functions that give the batches of an epoch, by name; workers are kept between epochs."""

    def dataset() -> PatchDataset:
        return PatchDataset(path, batch_size=BATCH_SIZE, rows=range(num_rows), cache="none")

    kept: dict[str, Any] = {
        "num_workers": 2,
        "persistent_workers": True,
        "multiprocessing_context": "spawn",
    }
    own, plain = dataset(), dataset()
    loaders = {
        "DataLoader": DataLoader(dataset(), batch_size=None),
        "DataLoader, 2 workers": DataLoader(dataset(), batch_size=None, **kept),
        "StatefulDataLoader": StatefulDataLoader(dataset(), batch_size=None),
        "rows one by one, DataLoader with 2 workers": DataLoader(
            RowByRow(path, num_rows), batch_size=BATCH_SIZE, shuffle=True, **kept
        ),
    }
    return {
        PRETRAIN: own.batches,
        "for batch in PatchDataset": lambda _: plain,
        **{name: lambda _, loader=loader: loader for name, loader in loaders.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="use the first crops only")
    given = parser.parse_args()
    num_rows = min(len(PatchStore(given.store).train), given.limit or 2**62)
    loops = open_loops(given.store, num_rows)
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(given.rounds + 1):  # round 0 starts workers and fills the page cache
        names = list(loops)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began, count = time.perf_counter(), 0
            for batch in loops[name](number):
                count += len(batch) if hasattr(batch, "rows") else len(batch[1])
            assert count == num_rows, (name, count)
            if number:
                rates[name].append(num_rows / (time.perf_counter() - began))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, torchdata"
        f" {torchdata.__version__}; {num_rows} crops; medians of {given.rounds} rounds\n"
    )
    print("| loop | crops/s | over `semgen pretrain` (range) |\n|---|---|---|")
    for name, found in rates.items():
        ratios = [ours / its for ours, its in zip(found, rates[PRETRAIN], strict=True)]
        print(
            f"| {name} | {statistics.median(found):.0f} | {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
