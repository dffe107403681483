"""Stage `cut` against its floor, at several numbers of crops a scan.

    OMP_NUM_THREADS=1 python -m benchmarks.cut STORE --work DIR [--crops 20 200 500] [--rounds 3]
        [--workers 2] [--copies 1]

STORE gives scans (its archive must be where it was), settings and places. The plan is drawn: N
crops of every scan that has some in STORE, each a crop of it shifted by up to a few millimetres.
Each scan stands for `--copies` scans. Floor, in the same round with as many plain processes:
reading the files of the scans, then encoding, checksumming and writing the same crops, which are
there already. Its wall time is that of the process that took longest. CPU time, of all processes of
the job (with Dask's scheduler), depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.floors import Seconds, floor_of_cut
from benchmarks.prepare import Watch, list_series
from pipeline.archive.series import Series
from pipeline.cluster import connect
from pipeline.config import PrepareConfig
from pipeline.stages.cut import cut_crops
from store import PatchStore
from store.format import ROW_TABLES, SPLITS
from store.settings import build
from store.writer import StoreWriter

_SHIFT_MM = 4.0


@dataclass(frozen=True, slots=True)
class Listed:
    """What the stage asks a catalogue for."""

    series: list[Series]

    def scan_series(self, scan: int) -> Series:
        return self.series[scan]


def plan_crops(source: PatchStore, target: Path, per_scan: int, copies: int) -> np.ndarray:
    """A store without crops, `per_scan` to cut of each scan; rows of its scans in `source`."""
    config = source.config
    writer = StoreWriter.create(target, config=config, software={})
    rows = source.train
    scans = np.repeat(np.unique(rows.scan), copies)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.choice(np.flatnonzero(rows.scan == s), per_scan) for s in scans])
    edge_mm = source.scans.spacing_mm / 2
    high_mm = source.scans.size * source.scans.spacing_mm - edge_mm
    origin_mm = rows.origin_mm[drawn] + rng.uniform(-_SHIFT_MM, _SHIFT_MM, (len(drawn), 3))
    of = rows.scan[drawn]
    step_mm = rows.extent_mm[drawn] / rows.patch.shape[1:]
    lowest = -step_mm / 2  # samples are in the middle of steps, and between centres of voxels
    highest = high_mm[of] - edge_mm[of] + step_mm / 2 - rows.extent_mm[drawn]
    tables = {
        "label": rows.label[drawn],
        "scan": np.repeat(np.arange(len(scans)), per_scan),
        "scale": rows.scale[drawn],
        "origin_mm": np.clip(origin_mm, lowest, highest),
        "extent_mm": rows.extent_mm[drawn],
    }
    writer.write_table("scans/id", source.scans.id[scans])
    item, each = rows.patch.shape[1:], config["rows_per_shard"]
    for split in SPLITS:
        used = slice(None) if split == "train" else slice(0)
        for name in ROW_TABLES:
            writer.write_table(f"{split}/{name}", tables[name][used])
        shape = (len(drawn[used]), *item)
        writer.create_sharded(f"{split}/patch", shape=shape, dtype="int16", rows_per_shard=each)
    thumbnails = (0, *source.thumbnails.shape[1:])
    writer.create_sharded("scans/thumbnail", shape=thumbnails, dtype="uint8", rows_per_shard=1)
    return scans


def measure(
    source: PatchStore, work: Path, per_scan: int, copies: int, workers: int
) -> tuple[Seconds, Seconds, Seconds]:
    """One round: floor of reading, floor of writing, and the stage."""
    target, again = work / "cut.store", work / "floor.store"
    for folder in (target, again):
        shutil.rmtree(folder, ignore_errors=True)
    scans = plan_crops(source, target, per_scan, copies)
    every = list_series(source.path)
    series = [every[scan] for scan in scans]
    watch = Watch()
    with connect(workers, None) as client:
        planned = PatchStore(target, allow_building=True)
        config = build(PrepareConfig, source.config)
        cut_crops(client, planned, Listed(series), config, watch)
    read, written = floor_of_cut(target, series, again, workers)
    return read, written, Seconds(watch.seconds["cut"], watch.cpu["cut"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--crops", type=int, nargs="+", default=[20, 200, 500], help="of a scan")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="scans for each scan of STORE")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source = PatchStore(given.store)
    num_scans = len(np.unique(source.train.scan)) * given.copies
    print(f"{num_scans} scans, {given.workers} workers, medians of {given.rounds} rounds\n")
    print("| crops a scan | read, s | write | cut | cut / floor | of CPU time | CPU, ms a crop |")
    print("|---|---|---|---|---|---|---|")
    for per_scan in given.crops:
        rounds = [
            measure(source, given.work, per_scan, given.copies, given.workers)
            for _ in range(given.rounds)
        ]
        cells = [f"{statistics.median(one[part].wall for one in rounds):.2f}" for part in range(3)]
        for kind in ("wall", "cpu"):
            ratios = [
                getattr(cut, kind) / (getattr(read, kind) + getattr(written, kind))
                for read, written, cut in rounds
            ]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            cells.append(f"{statistics.median(ratios):.2f} ({spread})")
        ms = [
            1e3 * statistics.median(seconds.cpu for seconds in parts) / per_scan / num_scans
            for parts in zip(*rounds, strict=True)
        ]
        cells.append(f"{ms[0]:.2f} + {ms[1]:.2f}; {ms[2]:.2f}")
        print(f"| {per_scan} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
