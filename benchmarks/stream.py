"""Shuffled batches of 64 from a store, against bulk decode of the same store and against peers.

    python -m benchmarks.stream STORE [--peers .venv-peers/bin/python] [--limit ROWS] [--rounds N]
        [--work FOLDER] [--only NAME...] [--write]
    make bench-peers STORE=STORE

Every contestant yields all train crops twice as batches of int16 tensors with labels (the floors
decode in storage order and yield nothing), on two cores: two threads, or two worker processes.
All take turns in fresh processes, for several rounds; medians and ratios within a round count.
A first, untimed round compares every crop with the store's and samples memory.

Rates are crops over the whole epoch, from making the stream or loader (imports done) to the last
batch; cold: nothing of its files in the page cache; warm: the second epoch of the same process,
workers kept. First batch: from the same beginning. Memory: the most above that of the process
before, with its workers and what they share, without pages of mapped files. On disk: its files as
prepared, and at the end where a library unpacks them. Shuffle: distinct scans and classes in a
batch, over those under a true random permutation. A peer that does not run is named with why.
The peers' files take about eight times the uncompressed crops, in --work or the temporary folder.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.peers import BATCH_SIZE, PEERS, Batch, Epochs, measure, read_ahead
from store import PatchStore
from trainer import PatchDataset

THREADS = 2
SEED = 0
RESULTS = Path(__file__).with_name("RESULTS.md")
OURS, BULK, ZARR = "semgen", "bulk decode", "zarr-python, bulk"
HOW = {
    OURS: "trainer.PatchDataset in a plain loop, without its cache",
    BULK: "floor: the store's reader in storage order, two threads, one buffer each",
    ZARR: "array[a:b] in storage order, its own threads",
}


def run_semgen(path: Path, num_rows: int) -> Epochs:
    dataset = PatchDataset(
        path,
        batch_size=BATCH_SIZE,
        rows=range(num_rows),
        seed=SEED,
        threads=THREADS,
        cache="none",
    )
    return lambda epoch: (Batch(b.crops, b.labels, b.rows) for b in dataset.batches(epoch))


def run_bulk(path: Path, num_rows: int) -> Epochs:
    patch = PatchStore(path).train.patch
    own = threading.local()

    def decode(rows: np.ndarray) -> Batch:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty((BATCH_SIZE, *patch.shape[1:]), patch.dtype)
        assert not patch.read_into(rows, own.buffer)
        return Batch(None, None, rows)

    return lambda _: read_ahead(decode, _spans(num_rows, BATCH_SIZE), THREADS)


def run_zarr(path: Path, num_rows: int) -> Epochs:
    patch = zarr.open_array(path / "train/patch", mode="r")

    def batches(_: int) -> Iterator[Batch]:
        for rows in _spans(num_rows, patch.shards[0]):
            assert len(patch[rows[0] : rows[-1] + 1]) == len(rows)
            yield Batch(None, None, rows)

    return batches


def _spans(num_rows: int, length: int) -> Iterable[np.ndarray]:
    return (np.arange(i, min(i + length, num_rows)) for i in range(0, num_rows, length))


RUNS = {OURS: run_semgen, BULK: run_bulk, ZARR: run_zarr}


def run_own(name: str, path: Path, num_rows: int, source: Path | None) -> dict[str, Any]:
    """Measure one of `RUNS` in this process."""
    folder = path / "train/patch"
    measured = measure(functools.partial(RUNS[name], path, num_rows), folder, source=source)
    shard = PatchStore(path).train.patch.grid.shard_of
    files = [folder / f"c/{i}/0/0/0" for i in range(shard(num_rows - 1) + 1)]
    stored = sum(file.stat().st_size for file in files)
    version = importlib.metadata.version("zarr" if name == ZARR else "semgen")
    return measured | {"bytes": stored, "bytes_used": stored, "version": version}


def export(path: Path, num_rows: int, folder: Path) -> None:
    """The crops as plain files, a shard at a time."""
    split = PatchStore(path).train
    folder.mkdir()
    np.save(folder / "labels.npy", split.label[:num_rows])
    np.save(folder / "scans.npy", split.scan[:num_rows])
    crops = np.lib.format.open_memmap(
        folder / "crops.npy", "w+", split.patch.dtype, (num_rows, *split.patch.shape[1:])
    )
    for rows in _spans(num_rows, split.patch.grid.rows_per_shard):
        crops[rows[0] : rows[-1] + 1] = split.read(rows)
    crops.flush()


def call(command: list[str], timeout_s: float) -> str:
    """What a contestant's process prints last; RuntimeError with its last words when it fails."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, complaint = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"not done after {timeout_s:.0f} s") from None
        raise
    if process.returncode:
        words = [line for line in complaint.splitlines() if line.strip()]
        raise RuntimeError(words[-1].strip() if words else f"status {process.returncode}")
    return printed.strip().rpartition("\n")[2]


class Bench:
    """The contestants, what they gave in each round, and why some dropped out."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given = given
        self.work = work
        split = PatchStore(given.store).train
        per_shard = split.patch.grid.rows_per_shard
        self.num_rows = len(split)
        if given.limit is not None and given.limit < len(split):
            self.num_rows = max(1, given.limit // per_shard) * per_shard
        self.source = work / "source"
        self.measured: dict[str, list[dict[str, Any]]] = {}
        self.refused: dict[str, str] = {}
        names = [*RUNS, *(PEERS if given.peers else ())]
        self.names = [n for n in names if not given.only or n in {OURS, BULK, *given.only}]

    def prepare(self) -> None:
        """Write the crops in every peer's format."""
        export(self.given.store, self.num_rows, self.source)
        for name in [name for name in self.names if name in PEERS]:
            print(f"preparing {name}", file=sys.stderr, flush=True)
            self._try(name, ["prepare", name, str(self.source), str(self._folder(name))])

    def round(self, number: int) -> None:
        """Let each run once, another one first each time; round 0 checks and samples."""
        names = [name for name in self.names if name not in self.refused]
        check = [] if number else ["--check", str(self.source)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            print(f"round {number}: {name}", file=sys.stderr, flush=True)
            if name in PEERS:
                printed = self._try(name, ["run", name, str(self._folder(name)), *check])
            else:
                command = [sys.executable, "-m", "benchmarks.stream", str(self.given.store)]
                command += ["--own", name, "--limit", str(self.num_rows), *check]
                printed = call(command, self.given.timeout)
            if printed:
                self.measured.setdefault(name, []).append(json.loads(printed))

    def _folder(self, name: str) -> Path:
        return self.work / PEERS[name].package

    def _try(self, name: str, arguments: list[str]) -> str | None:
        script = str(Path(__file__).with_name("peers.py"))
        try:
            return call([self.given.peers, script, *arguments], self.given.timeout)
        except RuntimeError as error:
            self.refused[name] = str(error)
            return None

    def rates(self, name: str, epoch: int) -> list[float]:
        """Crops per second in each timed round."""
        return [self.num_rows / one["seconds"][epoch] for one in self.measured[name][1:]]

    def lines(self) -> list[str]:
        """The table and what explains it, as Markdown."""
        label = np.load(self.source / "labels.npy")
        scan = np.load(self.source / "scans.npy")
        peers = f" (peers: {call([self.given.peers, '-V'], 60)})" if self.given.peers else ""
        lines = [
            f"{datetime.date.today()}, {os.cpu_count()} cores, {THREADS} of them used; Python"
            f" {sys.version.split()[0]}{peers}, torch {torch.__version__}; {self.num_rows} crops,"
            f" {len(np.unique(label))} classes, {len(np.unique(scan))} scans; medians of"
            f" {self.given.rounds} rounds, ratios within a round.",
            "",
            "| contestant | cold, crops/s | warm, crops/s | semgen / it, cold | warm"
            " | first batch, s | memory, MiB | on disk, MiB | shuffle: scans | classes |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        ran = [name for name in self.names if name not in self.refused]
        for name in ran:
            rounds = self.measured[name]
            cells = [f"{statistics.median(self.rates(name, epoch)):.0f}" for epoch in range(2)]
            for epoch in range(2):
                pairs = zip(self.rates(OURS, epoch), self.rates(name, epoch), strict=True)
                cells.append(f"{statistics.median(ours / its for ours, its in pairs):.2f}")
            cells.append(f"{statistics.median(one['start_s'] for one in rounds[1:]):.2f}")
            cells.append(f"{rounds[0]['added_mib']:.0f}")
            before, after = (rounds[0][key] / 2**20 for key in ("bytes", "bytes_used"))
            cells.append(f"{before:.0f}" + (f", then {after:.0f}" if after > 1.01 * before else ""))
            ordered = name in {BULK, ZARR}
            batches = [rows for one in rounds for rows in one["rows"]]
            cells += ["-" if ordered else f"{quality(batches, of):.3f}" for of in (scan, label)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        for name in ran:
            how = PEERS[name].how if name in PEERS else HOW[name]
            missing = self._missing(name)
            lines.append(f"- {name} {self.measured[name][0]['version']}: {how}{missing}")
        lines += [f"- {name} could not run: {why}" for name, why in self.refused.items()]
        return lines

    def _missing(self, name: str) -> str:
        """Tells when two epochs were not every row twice."""
        rows = np.concatenate([np.asarray(batch) for batch in self.measured[name][0]["rows"]])
        counts = np.bincount(rows, minlength=self.num_rows)
        left_out, repeated = (int(np.maximum(n, 0).sum()) for n in (2 - counts, counts - 2))
        if not left_out and not repeated:
            return ""
        return f"; of {2 * self.num_rows} reads it left out {left_out} and repeated {repeated}"


def quality(batches: list[list[int]], of: np.ndarray, permutations: int = 20) -> float:
    """Mean distinct values of `of` in a largest batch, over that under random permutations."""
    rng = np.random.default_rng(SEED)
    size = max(map(len, batches))
    whole = len(of) // size * size
    drawn = [rng.permutation(of)[:whole].reshape(-1, size) for _ in range(permutations)]
    full = of[[rows for rows in batches if len(rows) == size]]
    return _num_distinct(full) / _num_distinct(np.concatenate(drawn))


def _num_distinct(values: np.ndarray) -> float:
    ordered = np.sort(values, axis=1)
    return float((1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)).mean())


def main() -> None:
    """Measure and print; with --own one contestant in this process, for the driver."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--peers", help="the Python of the peers' environment; without, none")
    parser.add_argument("--limit", type=int, help="rows, rounded down to whole shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the peers' files")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these besides semgen and bulk")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--own", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own:
        print(json.dumps(run_own(given.own, given.store, given.limit, given.check)))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # children inherit it
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        bench = Bench(given, Path(work))
        bench.prepare()
        for number in range(given.rounds + 1):
            bench.round(number)
        lines = bench.lines()
    print("\n".join(lines))
    if given.write:
        command = f"    python -m benchmarks.stream {shlex.join(sys.argv[1:])}"
        with RESULTS.open("a") as file:
            file.write("\n".join(["", "## Streams", "", command, "", *lines, ""]))


if __name__ == "__main__":
    main()
