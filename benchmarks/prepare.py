"""`semgen prepare` against only reading the files, and against the published procedure.

    python -m benchmarks.prepare --archive ARCHIVE --work DIR [--rounds 3] [--workers 2]
        [--config FILE.toml] [--real-only]
    python -m benchmarks.prepare --archive ARCHIVE --work DIR --published

ARCHIVE holds a few real scans; DIR keeps what is made of them: six copies of each, that differ by
some voxels, and phantoms of 512 x 512 x 300, plain and gzip. For each archive and round: the
floors, then a whole job; medians are taken. Floor of the survey: as many processes read the same
files and do nothing else. Floor of cut: they also encode, checksum and write the same crops, which
are there already; `benchmarks.cut` does this at several numbers of crops a scan. Of each stage:
wall time, the share of the cores' time that its processes computed, the share that the machine
waited for disks, and the rest, idle. Memory is the peak of the resident set, and "added" what a
worker has above one that has only imported what its tasks need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage

from benchmarks.archives import large_phantoms, pack, replicate
from benchmarks.floors import floor_of_cut, floor_of_survey
from pipeline.archive.lookup import catalogue_folder, read_series
from pipeline.archive.series import Series
from pipeline.cluster import WORKER_MODULES, connect
from pipeline.config import PrepareConfig, load_config
from pipeline.job import prepare
from store import PatchStore

_COPIES, _LARGE_SCANS = 6, 4
_PUBLISHED = {"scans": 623, "classes": 200, "members": 230}
_PUBLISHED_CLASSES, _PUBLISHED_MEMBERS = 10, 30


@dataclass
class Watch:
    """Times of the stages of a job in this process, and the memory of its processes."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    parent_mib: float = 0.0
    worker_mib: dict[int, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """What the job calls (see store.progress.Progress)."""
        name = name.rpartition(": ")[2]  # without its number
        wall, busy, waiting = time.perf_counter(), _cpu_seconds(), psutil.cpu_times().iowait
        yield lambda _: None
        wall = time.perf_counter() - wall
        self.seconds[name] = self.seconds.get(name, 0.0) + wall
        cores = wall * (psutil.cpu_count() or 1)
        waited = psutil.cpu_times().iowait - waiting
        self.cpu[name] = _cpu_seconds() - busy
        self.shares[name] = self.cpu[name] / cores, waited / cores
        self._note_memory()

    def _note_memory(self) -> None:
        self.parent_mib = _peak_mib(os.getpid())
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                if "spawn_main" in " ".join(child.cmdline()):
                    self.worker_mib[child.pid] = _peak_mib(child.pid)


def _peak_mib(pid: int) -> float:
    """The most that a process ever held, of which the kernel keeps count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cpu_seconds() -> float:
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def list_series(store: Path) -> list[Series]:
    """The series of every scan of a store."""
    return list(read_series(store, range(len(PatchStore(store).scans.id))))


def idle_mib() -> float:
    """Size of a worker that has imported what its tasks need, and done nothing."""

    def measure() -> float:
        for module in WORKER_MODULES:
            importlib.import_module(module)

        return psutil.Process().memory_info().rss / 2**20

    with connect(1, None) as client:
        return client.submit(measure).result()


def run_job(archive: Path, store: Path, config: PrepareConfig, workers: int, **more: Any) -> Watch:
    """One whole job, from nothing."""
    for folder in (store, catalogue_folder(store)):
        shutil.rmtree(folder, ignore_errors=True)
    store.with_name(f"{store.name}.quality.json").unlink(missing_ok=True)
    watch = Watch()
    prepare([archive], store, config, workers=workers, progress=watch, **more)
    return watch


def compare(
    name: str, archive: Path, work: Path, rounds: int, workers: int, config: PrepareConfig
) -> None:
    """Jobs and floors of one archive in turn; print the table."""
    store, weights = work / "store", work / "autoencoder.safetensors"
    watches = [run_job(archive, store, config, workers)]
    floors: dict[str, list[float]] = {"survey": [], "cut": []}
    series = list_series(store)
    shutil.copy(store / "scans/embedding/autoencoder.safetensors", weights)
    for _ in range(rounds):
        floors["survey"].append(floor_of_survey(series, workers))
        shutil.rmtree(work / "floor.store", ignore_errors=True)
        parts = floor_of_cut(store, series, work / "floor.store", workers)
        floors["cut"].append(sum(part.wall for part in parts))
        watches.append(run_job(archive, store, config, workers, autoencoder=weights))
    opened = PatchStore(store)
    num_crops = len(opened.train) + len(opened.validation)
    floor = {stage: statistics.median(seconds) for stage, seconds in floors.items()}
    stored = sum(file.stat().st_size for file in store.glob("*/patch/**/*") if file.is_file())
    print(
        f"\n### {name}: {len(series)} scans, {opened.num_classes} classes, {num_crops} crops of"
        f" {opened.crop_shape}, {stored / num_crops / 2**20:.2f} MiB each on disk"
    )
    for stage, seconds in floors.items():
        spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"\nfloor of {stage}: {floor[stage]:.2f} s {spread}, {workers} processes")
    print()
    print("| stage | s | x floor | computing | waiting for disks | idle |")
    print("|---|---|---|---|---|---|")
    for stage in watches[0].seconds:
        of_stage = watches[:1] if stage == "embed" else watches[1:]
        seconds = statistics.median(watch.seconds[stage] for watch in of_stage)
        busy = statistics.median(watch.shares[stage][0] for watch in of_stage)
        waiting = statistics.median(watch.shares[stage][1] for watch in of_stage)
        ratio = f"{seconds / floor[stage]:.2f}" if stage in floor else ""
        idle = max(0.0, 1 - busy - waiting)
        print(f"| {stage} | {seconds:.2f} | {ratio} | {busy:.0%} | {waiting:.0%} | {idle:.0%} |")
    cut = statistics.median(watch.seconds["cut"] for watch in watches[1:])
    print(
        f"\ncut beyond the floor: {(cut - floor['cut']) * workers / num_crops * 1e3:.2f} ms a crop"
    )
    largest = float(opened.scans.size.prod(axis=1).max()) * 2 / 2**20
    shard_mib = opened.config["rows_per_shard"] * opened.train.patch.dtype.itemsize / 2**20
    shard_mib *= float(np.prod(opened.train.patch.shape[1:]))
    base = idle_mib()
    added = [mib - base for watch in watches for mib in watch.worker_mib.values() if mib > base]
    print(
        f"worker: {max(added):.0f} MiB added at most; 2.5 x the largest scan ({largest:.0f} MiB)"
        f" + a shard is {2.5 * largest + shard_mib:.0f} MiB;"
        f" parent {max(watch.parent_mib for watch in watches):.0f} MiB"
    )


def run_published(files: list[str], classes: int, members: int) -> tuple[float, float]:
    """The published procedure on some scans: seconds, and peak MiB added.

    Each class loads every member's whole volume, takes the base crop and two more of other sizes,
    and keeps them in three float64 arrays, which are not saved here. One process, as published.
    """
    rng = np.random.default_rng(0)
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    crops = [np.zeros((classes * members, 32, 64, 64)) for _ in range(3)]
    for row in range(classes * members):
        file = files[row % members % len(files)]
        values = sitk.GetArrayFromImage(sitk.ReadImage(file))
        z, y, x = (int(rng.integers(0, max(1, n - 96))) for n in values.shape)
        for scale, side in enumerate((64, *rng.integers(50, 80, size=2).tolist())):
            crop = values[z : z + 32, y : y + side, x : x + side].astype(np.float64)
            zoom = np.divide((32, 64, 64), crop.shape)
            crops[scale][row] = ndimage.zoom(crop, zoom, order=1)
    peak = psutil.Process().memory_info().rss
    return time.perf_counter() - begun, (peak - before) / 2**20


def compare_published(archive: Path, work: Path, workers: int) -> None:
    """The published procedure and ours, same scans, C and K; print the table."""
    config = PrepareConfig(
        classes=_PUBLISHED_CLASSES,
        neighbours=_PUBLISHED_MEMBERS,
        validation_fraction=0.0,
        validation_neighbours=1,
    )
    store = work / "store"
    ours = run_job(archive, store, config, workers)
    files = [s.files[0] for s in list_series(store) if len(s.files) == 1][:_PUBLISHED_MEMBERS]
    with get_context("spawn").Pool(1) as pool:
        theirs, theirs_mib = pool.apply(
            run_published, (files, _PUBLISHED_CLASSES, _PUBLISHED_MEMBERS)
        )
    opened = PatchStore(store)
    crops, scans = len(opened.train), len(opened.scans.id)
    mine = sum(seconds for stage, seconds in ours.seconds.items() if stage != "embed")
    mib = ours.parent_mib + sum(sorted(ours.worker_mib.values())[-workers:])
    print(f"\n### The published procedure, {opened.num_classes} classes of {_PUBLISHED_MEMBERS}\n")
    print("| (without training an autoencoder) | s | memory MiB |\n|---|---|---|")
    print(f"| every class loads every member | {theirs:.0f} | {theirs_mib:.0f} |")
    print(f"| semgen, {workers} workers, {scans} scans, {crops} crops | {mine:.0f} | {mib:.0f} |")
    full = _PUBLISHED
    loads = full["classes"] * full["members"]
    one = theirs / (_PUBLISHED_CLASSES * _PUBLISHED_MEMBERS)
    per_scan = (ours.seconds["survey"] + ours.seconds["cut"]) / scans
    print(
        f"\ncomputed from these for {full['scans']} such scans, C = {full['classes']},"
        f" K = {full['members']}: {loads} loads x {one:.2f} s = {loads * one / 3600:.1f} h and"
        f" {loads * 3 * 2**17 * 8 / 2**30:.0f} GiB in one process; semgen's survey and cut"
        f" {per_scan:.2f} s a scan with {crops / scans:.0f} crops"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--config", type=Path, help="settings; by default those of prepare")
    parser.add_argument("--real-only", action="store_true", help="no phantoms")
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    many = replicate(arguments.archive, work / "copies", _COPIES)
    if arguments.published:
        compare_published(many, work, arguments.workers)
        return
    archives = {f"real scans, {_COPIES} of each": many}
    if not arguments.real_only:
        plain = large_phantoms(work / "large", _LARGE_SCANS)
        archives["phantoms of 512 x 512 x 300, plain"] = plain
        archives["phantoms of 512 x 512 x 300, gzip"] = pack(plain, work / "large-gz")
    config = load_config(arguments.config)
    for name, archive in archives.items():
        compare(name, archive, work, arguments.rounds, arguments.workers, config)


if __name__ == "__main__":
    main()
