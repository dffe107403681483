"""What a scan costs as the archive grows, and with many workers.

    python -m benchmarks.scale [--scans 100 1000 10000 100000] [--workers 2] [--work DIR]
    python -m benchmarks.scale --scans 5000 --workers 2 8 24

The first generates archives of tiny scans (16 x 16 x 16 voxels, so that reading them is little)
and prepares each in a process of its own. A stage's time runs to the beginning of the next one,
so that nothing between two stages is lost; `after` is what of it came when the stage had ended.
Per scan are printed wall and CPU milliseconds: of the job's own thread (`main`), of its others
(Dask's scheduler; in embed, torch's) and of the workers; `idle` is the share of their time in
which the workers do not compute. Then, from archive to archive, the milliseconds per further scan
and the exponent e of seconds ~ scans^e; the CPU's are those to go by on a shared machine. The
crops are as many for every archive, and the autoencoder trains for a few steps: their share per
scan falls. Before the seal, the thumbnails of an archive lie in the catalogue, too.

With several numbers of workers, the archive is prepared with each of them: what the job's process,
which is also Dask's scheduler, spends on a scan limits how many workers it can feed. On fewer cores
than workers that is CPU time; the wall time says nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from pipeline.archive.lookup import catalogue_folder
from pipeline.config import AutoencoderConfig, PrepareConfig

SIDE = 16
SPACING_MM = 4.0
FOLDER_SCANS = 100
SCAN_BYTES = 2**19
"""Of disk, at most: its thumbnail in the catalogue and, packed, in the store."""
SAMPLE_SECONDS = 0.1
LAST = slice(-2, None)
ANATOMY_HU = np.random.default_rng(0).integers(-200, 200, SIDE).astype(np.int16)
NOISE_HU = 150
"""What slices have in common in all scans, and how much they differ."""
CONFIG = PrepareConfig(
    classes=10,
    neighbours=20,
    validation_neighbours=5,
    near_duplicates="off",  # all tiny scans are alike: each would be compared with six others
    max_overlap=1.0,
    shape=(8, 8, 8),
    spacing_mm=(SPACING_MM, SPACING_MM, SPACING_MM),
    scales=1,
    min_slices=SIDE,
    autoencoder=AutoencoderConfig(max_steps=20, threads=1),  # two wait on a busy machine
)


# archives ---------------------------------------------------------------------------------------


def template() -> tuple[bytes, NDArray[np.int16]]:
    """A NIfTI header, and a body in air, (z, y, x) HU."""
    z, y, x = np.mgrid[:SIDE, :SIDE, :SIDE] - (SIDE - 1) / 2
    inside = (y / 6) ** 2 + (x / 7) ** 2 < 1
    hu = np.where(inside, 40 + 10 * z, -1000).astype(np.int16)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((SPACING_MM,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.nii"
        sitk.WriteImage(image, file)
        return file.read_bytes()[: -hu.nbytes], hu


def write_folder(folder: Path, scans: range) -> None:
    """Scans of even slices, which differ in part; their thumbnails are small when packed."""
    folder.mkdir(parents=True)
    header, hu = template()
    hu[hu > -1000] += ANATOMY_HU[np.nonzero(hu > -1000)[0]]
    for scan in scans:
        rng = np.random.default_rng(scan)
        noise = rng.integers(-NOISE_HU, NOISE_HU, (SIDE, 1, 1))
        values = np.where(hu > -1000, hu + noise, hu).astype(np.int16)
        (folder / f"{scan:07d}.nii").write_bytes(header + values.tobytes())


def write_archive(archive: Path, num_scans: int) -> None:
    with ProcessPoolExecutor(2) as pool:
        for done in [
            pool.submit(
                write_folder,
                archive / f"{first // FOLDER_SCANS:05d}",
                range(first, min(first + FOLDER_SCANS, num_scans)),
            )
            for first in range(0, num_scans, FOLDER_SCANS)
        ]:
            done.result()


# one job ----------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Stage:
    """What one stage took; CPU in seconds, memory at its peak in MiB."""

    name: str
    wall: float
    after: float = 0.0
    main: float
    others: float
    workers: float
    parent_mib: float = 0.0
    worker_mib: float = 0.0

    @property
    def cpu(self) -> float:
        return self.main + self.others + self.workers


@dataclass(kw_only=True, slots=True)
class Run:
    """One archive prepared: its stages, and (files, bytes) of the folders before the seal."""

    scans: int
    found: str
    stages: list[Stage]
    folders: dict[str, tuple[int, int]]


@dataclass(slots=True)
class Ledger:
    """The job's progress: what each stage takes, until the next one begins."""

    store: Path
    stages: list[Stage] = field(default_factory=list)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)
    watching: float = 0.0
    """CPU seconds of `watch`, which are not the job's."""

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        name = name.partition(": ")[2]  # without its number
        if name == "seal":  # before it tidies up
            self.begin("(counting)")
            self.folders = {
                "store": folder_size(self.store),
                "catalogue": folder_size(catalogue_folder(self.store)),
            }
        self.begin(name)
        try:
            yield lambda _: None
        finally:
            self.stages[-1].after = -time.perf_counter()
            if name == "seal":
                self.begin("end")

    def begin(self, name: str) -> None:
        """End the stage before, and begin one."""
        now, main = time.perf_counter(), time.thread_time()
        others, workers = time.process_time() - main - self.watching, workers_cpu()
        if self.stages:
            last = self.stages[-1]
            last.wall += now
            last.after += now if last.after else 0.0
            last.main += main
            last.others += others
            last.workers = max(0.0, last.workers + workers)  # they have gone at the end
        self.stages.append(
            Stage(name=name, wall=-now, main=-main, others=-others, workers=-workers)
        )

    def watch(self) -> None:
        """Sample memory until it is over."""
        this = psutil.Process()
        while not self.over.wait(SAMPLE_SECONDS):
            stage = self.stages[-1]
            stage.parent_mib = max(stage.parent_mib, mib(this))
            stage.worker_mib = max(stage.worker_mib, *map(mib, this.children(recursive=True)), 0.0)
            self.watching = time.thread_time()


def mib(process: psutil.Process) -> float:
    """Resident MiB; nothing for a process that has gone."""
    try:
        return process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


@contextlib.contextmanager
def peak_mib(process: psutil.Process | None = None) -> Iterator[list[float]]:
    """The one number of the list is this process's peak meanwhile, or another one's."""
    peak, over, process = [0.0], threading.Event(), process or psutil.Process()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], mib(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def workers_cpu() -> float:
    """CPU seconds of this process's children so far."""
    seconds = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def folder_size(folder: Path) -> tuple[int, int]:
    """(files, bytes) below a folder."""
    files = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return len(files), sum(os.stat(file).st_size for file in files)


def prepare(archive: Path, store: Path, num_scans: int, workers: int) -> Run:
    """Prepare one archive in this process."""
    from pipeline.job import prepare as prepare_store  # noqa: PLC0415

    ledger = Ledger(store)
    ledger.begin("start")
    watcher = threading.Thread(target=ledger.watch)
    watcher.start()
    try:
        summary = prepare_store([archive], store, CONFIG, workers=workers, progress=ledger)
    finally:
        ledger.over.set()
        watcher.join()
    ledger.begin("over")
    assert summary.accepted == num_scans, summary
    stages = [stage for stage in ledger.stages[:-1] if stage.name != "(counting)"]
    found = f"{summary.classes} classes, {summary.members} members"
    return Run(scans=num_scans, found=found, stages=stages, folders=ledger.folders)


def tell_run(run: Run, workers: int) -> None:
    print(f"\n{run.scans:,} scans, {workers} workers: {run.found}; per scan, ms:")
    print(
        f"{'stage':16s}   seconds   after     wall    main  others  workers"
        "  idle  parent  worker MiB"
    )
    per = 1000 / run.scans
    for s in run.stages:
        print(
            f"{s.name:16s} {s.wall:9.2f} {s.after:7.2f} {s.wall * per:8.2f} {s.main * per:7.2f}"
            f" {s.others * per:7.2f} {s.workers * per:8.2f} {1 - s.workers / s.wall / workers:5.0%}"
            f" {s.parent_mib:7.0f} {s.worker_mib:11.0f}"
        )
    for name, (files, size) in run.folders.items():
        print(f"{name}: {files:,} files, {size / 2**20:,.0f} MiB, {size / run.scans:,.0f} B a scan")


def tell_growth(runs: list[Run], what: str) -> None:
    """Each stage's cost per further scan from archive to archive, and the exponent."""
    sizes = [run.scans for run in runs]
    print(f"\n{what}, ms per further scan")
    print(
        f"{'stage':16s}" + "".join(f"{f'to {n:,}':>12s}" for n in sizes[1:]) + "  exponent  of last"
    )
    for name in [*(stage.name for stage in runs[0].stages), "all"]:
        took = [
            sum(getattr(s, what) for s in run.stages if name in {s.name, "all"}) for run in runs
        ]
        further = 1000 * np.diff(took) / np.diff(sizes)
        logs = np.log(sizes), np.log(np.maximum(took, 1e-3))
        overall, last = (np.polyfit(*(v[part] for v in logs), 1)[0] for part in (slice(None), LAST))
        print(
            f"{name:16s}" + "".join(f"{f:12.2f}" for f in further) + f" {overall:9.2f} {last:8.2f}"
        )


def tell_workers(runs: list[Run], numbers: Sequence[int]) -> None:
    """CPU time of the job's process by number of workers, and what it can feed."""
    print("\nCPU of the job's process, ms per scan; scans/s at that rate")
    print(f"{'stage':16s}" + "".join(f"{f'{n} workers':>22s}" for n in numbers))
    for name in dict.fromkeys(stage.name for stage in runs[0].stages):
        own = [
            1000 / run.scans * sum(s.main + s.others for s in run.stages if s.name == name)
            for run in runs
        ]
        print(f"{name:16s}" + "".join(f"{ms:12.2f}{1000 / max(ms, 1e-3):10.0f}" for ms in own))


def scale(sizes: list[int], workers: list[int], work: Path) -> None:
    if shutil.disk_usage(work).free < max(sizes) * SCAN_BYTES:
        needed = f"{max(sizes) * SCAN_BYTES / 2**30:,.0f} GiB"
        raise SystemExit(f"{max(sizes):,} scans need {needed} of disk in {work}")
    runs = []
    for num_scans in sorted(sizes):
        with tempfile.TemporaryDirectory(dir=work, prefix="scale-") as folder:
            archive, store = Path(folder) / "archive", Path(folder) / "store"
            began = time.perf_counter()
            write_archive(archive, num_scans)
            print(
                f"\n{num_scans:,} scans written in {time.perf_counter() - began:.1f} s", flush=True
            )
            of_archive = []
            for number in workers:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    job = pool.submit(prepare, archive, store, num_scans, number)
                    of_archive.append(job.result())
                tell_run(of_archive[-1], number)
                shutil.rmtree(store)
                shutil.rmtree(catalogue_folder(store))
        if len(workers) > 1:
            tell_workers(of_archive, workers)
        runs.append(of_archive[0])
    if len(runs) > 1:
        tell_growth(runs, "wall")
        tell_growth(runs, "cpu")
    print(json.dumps({"scans": sum(sizes) * len(workers)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for archives and stores",
    )
    given = parser.parse_args()
    scale(given.scans, given.workers, given.work)


if __name__ == "__main__":
    main()
