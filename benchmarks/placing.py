"""Placing the members of classes in a large archive: core hours, and memory of a worker.

    OMP_NUM_THREADS=1 python -m benchmarks.placing [--scans 1000] [--classes 200] [--workers 2]

The scans are synthetic patients, cut differently, as thumbnails in a store: `--phantoms` of them,
each several times with another part of its length and other noise. Discovery runs on them as in
`prepare`, with embeddings that are the mean slices of the scans. Printed are the CPU time of the
workers and of this process, the scans tried and the members, the largest memory of a worker, and
what it costs to compute the features of a scan and to read them from a file instead.
"""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.scale import peak_mib
from pipeline.archive.volume import Volume
from pipeline.cluster import connect
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail
from pipeline.frame import frame_box
from pipeline.phantom.patients import draw_phantom
from pipeline.place import Scans
from pipeline.stages.discover import Discovery, discover
from pipeline.stages.placing import Placing, describe
from store.format import THUMBNAIL_SHAPE
from store.progress import SILENT
from store.sharded import ShardedReader
from store.writer import StoreWriter, write_shard

_SHARD_ROWS = 64
_MAX_CUT = 0.35
"""Share of its length that a scan may lack at each end."""


def draw_scans(store: Path, num: int, num_phantoms: int, config: PrepareConfig) -> Scans:
    """Write thumbnails into a store, and return the scans."""
    rng = np.random.default_rng(0)
    writer = StoreWriter.create(store, config={}, software={})
    grid = writer.create_sharded(
        "scans/thumbnail", shape=(num, *THUMBNAIL_SHAPE), dtype="uint8", rows_per_shard=_SHARD_ROWS
    )
    images = np.empty((num, *THUMBNAIL_SHAPE), np.uint8)
    size, spacing_mm = np.empty((num, 3), np.int32), np.empty((num, 3))
    frame_mm, embedding = np.empty((num, 2, 3)), np.empty((num, 16 * 32), np.float32)
    for phantom_number in range(num_phantoms):
        phantom = draw_phantom(1, phantom_number, matrix=96, varied=True)
        whole = np.maximum(phantom.render(), -1024)
        for row in range(phantom_number, num, num_phantoms):
            low, high = (rng.uniform(0, _MAX_CUT, 2) * len(whole)).astype(int)
            part = whole[low : len(whole) - high]
            hu = np.rint(part + rng.normal(0, 10, part.shape)).astype(np.int16)
            volume = Volume(hu=hu, spacing_mm=phantom.spacing_mm)
            frame_mm[row] = frame_box(volume, "body")
            images[row] = make_thumbnail(volume, frame_mm[row], THUMBNAIL_SHAPE, config)
            size[row], spacing_mm[row] = hu.shape, phantom.spacing_mm
            blocks = images[row].reshape(16, 4, 128, 32, 4).mean(axis=(1, 2, 4))
            embedding[row] = blocks.ravel()
    for shard in range(grid.num_shards):
        write_shard(store, "scans/thumbnail", shard, images[list(grid.rows_of(shard))])
    thumbnails = ShardedReader(store, "scans/thumbnail")
    return Scans(
        split=(rng.random(num) < config.validation_fraction).astype(np.uint8),
        spacing_mm=spacing_mm,
        size=size,
        frame_mm=frame_mm,
        embedding=embedding,
        thumbnail=lambda row: np.asarray(thumbnails.read([row])[0]),
    )


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=int, default=1000)
    parser.add_argument("--phantoms", type=int, default=100)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    config = PrepareConfig(classes=given.classes)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        scans = draw_scans(store, given.scans, given.phantoms, config)
        with connect(given.workers, None) as client, peak_mib() as parent:
            processes = [psutil.Process(pid) for pid in client.run(_pid).values()]
            placing = Placing(
                client, store, scans, config, Path(folder) / "placing", SILENT, _ignore
            )
            began, own = time.perf_counter(), cpu_seconds(psutil.Process())
            before = sum(map(cpu_seconds, processes))
            found = discover(scans, config, find=placing.match)
            wall = time.perf_counter() - began
            workers = sum(map(cpu_seconds, processes)) - before
            own = cpu_seconds(psutil.Process()) - own
            memory = max(client.run(_peak_mib).values())
        _print_results(found, placing.matched, workers, own, wall)
        print(f"peak memory: worker {memory:.0f} MiB, this process {parent[0]:.0f} MiB")
        _print_features(placing, range(min(20, given.scans)))


def _print_results(
    found: Discovery, matched: int, workers_s: float, own_s: float, wall_s: float
) -> None:
    members = sum(len(one.train) + len(one.validation) for one in found.classes)
    hours = (workers_s + own_s) / 3600
    print(f"{len(found.classes)} classes, {members} members of {matched} scans matched")
    print(f"CPU: workers {workers_s / 3600:.2f} h, this process {own_s / 3600:.2f} h;", end=" ")
    print(f"{wall_s:.0f} s in all")
    print(f"{1000 * workers_s / matched:.1f} ms a match;", end=" ")
    print(f"46,000 members: {46_000 * hours / members:.2f} core hours")


def _print_features(placing: Placing, rows: range) -> None:
    """Cost of a scan's features: computed, and read from a file."""
    began = time.process_time()
    features = [describe.__wrapped__(placing.source(row)) for row in rows]
    computed = time.process_time() - began
    files = [pickle.dumps(one) for one in features]
    began = time.process_time()
    for file in files:
        pickle.load(io.BytesIO(file))
    read = time.process_time() - began
    size = np.mean([len(file) for file in files]) / 2**20
    print(
        f"features of a scan: {1000 * computed / len(rows):.0f} ms computed, {size:.1f} MiB,"
        f" {1000 * read / len(rows):.1f} ms unpacked"
    )


def _pid() -> int:
    return psutil.Process().pid


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()  # ru_maxrss starts with that of the parent
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _ignore(_: int) -> None:
    pass


if __name__ == "__main__":
    main()
