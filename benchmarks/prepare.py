"""Time per stage, memory and the floor of `semgen prepare`.

    python benchmarks/prepare.py ARCHIVE [--workers N] [prepare's options]

Runs the command on a store in a temporary folder while sampling the memory of its processes,
then reads the same files with the same number of processes and nothing else: the floor. Memory
is resident set size; "added" is what a worker has above one that has imported all it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import psutil
import SimpleITK as sitk  # noqa: N813

from pipeline.archive import Series
from pipeline.catalogue import Catalogue, catalogue_folder
from pipeline.cluster import connect
from store import PatchStore


def read_only(series: Series) -> int:
    """Read a series the plain way; its voxels."""
    image = sitk.ReadImage(series.files if len(series.files) > 1 else series.files[0])
    return image.GetNumberOfPixels()


def watch(process: subprocess.Popen[str]) -> tuple[float, dict[int, list[float]]]:
    """Peak MiB of the command, and samples in MiB of each worker."""
    parent, samples, peak = psutil.Process(process.pid), {}, 0.0
    while process.poll() is None:
        try:
            peak = max(peak, parent.memory_info().rss / 2**20)
            for child in parent.children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    samples.setdefault(child.pid, []).append(child.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    return peak, samples


def idle_mib() -> float:
    """Size of a worker that has imported what its tasks need, and done nothing."""

    def measure() -> float:
        import pipeline.tasks  # noqa: F401, PLC0415

        return psutil.Process().memory_info().rss / 2**20

    with connect(1, None) as client:
        return client.submit(measure).result()


def main() -> None:
    archive, *options = sys.argv[1:]
    workers = int(options[options.index("--workers") + 1]) if "--workers" in options else 2
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        command = ["semgen", "prepare", archive, str(store), "--json", *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *command[1:]], stdout=subprocess.PIPE, text=True
        )
        peak, samples = watch(process)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
        opened = PatchStore(store)
        catalogue = Catalogue(catalogue_folder(store))
        series = [catalogue.scan_series(row) for row in range(len(opened.scans.id))]
        catalogue.close()
        largest = float(opened.scans.size.prod(axis=1).max()) * 2 / 2**20
        shard_mib = opened.config["rows_per_shard"] * 2 / 2**20
        for n in opened.train.patch.shape[1:]:
            shard_mib *= n
        with get_context("spawn").Pool(workers) as pool:
            pool.map(abs, range(workers * 4))  # started and warm
            begun = time.perf_counter()
            pool.map(read_only, series, chunksize=1)
            floor = time.perf_counter() - begun
    print(" ".join(command))
    print(f"{summary['accepted']} scans, {summary['classes']} classes, {summary['crops']} crops")
    print(f"floor (only reading, {workers} processes): {floor:.2f} s")
    for stage, seconds in summary["seconds"].items():
        ratio = f"  {seconds / floor:.2f} x floor" if stage in {"survey", "cut"} else ""
        print(f"{stage:10s} {seconds:7.2f} s{ratio}")
    budget = 2.5 * largest + shard_mib
    print(
        f"parent peak {peak:.0f} MiB; largest scan {largest:.0f} MiB as int16,"
        f" shard {shard_mib:.0f} MiB"
    )
    base = idle_mib()
    for pid_samples in samples.values():
        if len(pid_samples) > 20:  # others are helpers of multiprocessing
            print(
                f"worker peak {max(pid_samples):.0f} MiB, {max(pid_samples) - base:.0f} added"
                f" (2.5 scans + shard = {budget:.0f})"
            )


if __name__ == "__main__":
    main()
