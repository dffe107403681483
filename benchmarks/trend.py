"""A small fixed set of timings, to run before and after a change.

    OMP_NUM_THREADS=1 python -m benchmarks.trend             # figures, ratios to the recorded ones
    OMP_NUM_THREADS=1 python -m benchmarks.trend --record    # and records them in trend.json

About a minute, one thread, CPU time, the least of several rounds, on phantoms. Each figure is also
divided by that of a fixed piece of work (hashing, a matrix product, a sort), so that ratios hold on
another machine or a busy one, within a tenth or so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.volume import read_volume
from pipeline.autoencoder import new_autoencoder
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop, make_thumbnail
from pipeline.frame import frame_box
from pipeline.phantom.files import write_nifti
from pipeline.phantom.patients import draw_phantom
from pipeline.place import Scans
from pipeline.stages.discover import discover
from pipeline.stages.embed import encode_scans
from store.format import THUMBNAIL_SHAPE
from store.sharded import ShardedReader
from store.writer import StoreWriter, write_shard
from trainer.transforms.draws import Draws
from trainer.transforms.genesis import perturb_genesis

RECORD = Path(__file__).with_name("trend.json")
_ROUNDS, _SHARD_ROWS, _SCANS = 5, 64, 5000


def cpu_ms(work: Callable[[], object], parts: int = 1) -> float:
    """Milliseconds of CPU for one of the parts of the work, the least of several rounds."""
    taken = []
    for _ in range(_ROUNDS):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken) / parts * 1e3


def fixed_work() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((1200, 1200), np.float32)
    hashlib.sha256((values @ values).data).digest()
    np.sort(rng.integers(0, 2**31, 2_000_000))


def measure(folder: Path) -> dict[str, float]:
    """Every figure in milliseconds."""
    config = PrepareConfig()
    write_nifti(draw_phantom(0, 0, protocol="chest"), folder / "scan.nii.gz")
    (series,) = (one for place in find_folders([folder]) for one in read_folder(place, config))
    volume = read_volume(series, config)
    box = frame_box(volume, "body")
    origin_mm = (box.mean(axis=0) - 20).tolist()
    extent_mm = [40.0, 48.0, 48.0]
    crop = cut_crop(
        volume,
        origin_mm=origin_mm,
        extent_mm=extent_mm,
        shape=config.shape,
        window_hu=config.window_hu,
    )
    crops = np.repeat(crop[None], _SHARD_ROWS, axis=0)
    crops += np.random.default_rng(0).integers(-9, 9, crops.shape, np.int16)
    path = folder / "store"
    writer = StoreWriter.create(path, config={}, software={})
    writer.create_sharded(
        "train/patch", shape=crops.shape, dtype="int16", rows_per_shard=_SHARD_ROWS
    )
    write_shard(path, "train/patch", 0, crops)
    reader = ShardedReader(path, "train/patch")
    order = np.random.default_rng(0).permutation(_SHARD_ROWS)
    cubes = torch.rand(8, 1, *config.shape)
    scans = _scans()
    plan = PrepareConfig(classes=50, place="frame")
    model = new_autoencoder(config.autoencoder, 0)
    thumbnails = np.zeros((32, *THUMBNAIL_SHAPE), np.uint8)
    return {
        "fixed work": cpu_ms(fixed_work),
        "read a scan: SimpleITK": cpu_ms(lambda: sitk.ReadImage(series.files[0])),
        "read a scan": cpu_ms(lambda: read_volume(series, config)),
        "body box of a scan": cpu_ms(lambda: frame_box(volume, "body")),
        "thumbnail of a scan": cpu_ms(lambda: make_thumbnail(volume, box, THUMBNAIL_SHAPE, config)),
        "pseudonym of a scan": cpu_ms(volume.scan_id),
        "embed a scan": cpu_ms(lambda: encode_scans(model, lambda rows: thumbnails[rows], 32), 32),
        "discover a class of 5,000 scans": cpu_ms(lambda: discover(scans, plan), 50),
        "cut a crop": cpu_ms(
            lambda: [
                cut_crop(
                    volume,
                    origin_mm=origin_mm,
                    extent_mm=extent_mm,
                    shape=config.shape,
                    window_hu=config.window_hu,
                )
                for _ in range(50)
            ],
            50,
        ),
        "write a crop": cpu_ms(lambda: write_shard(path, "train/patch", 0, crops), _SHARD_ROWS),
        "read a crop": cpu_ms(lambda: reader.read(order), _SHARD_ROWS),
        "perturb a crop": cpu_ms(
            lambda: perturb_genesis(
                cubes, Draws.keyed(0, "benchmark", 0, rows=range(8)), num_blocks=10_000
            ),
            8,
        ),
    }


def _scans() -> Scans:
    rng = np.random.default_rng(0)
    thumbnail = rng.integers(0, 255, THUMBNAIL_SHAPE).astype(np.uint8)
    size = np.tile(np.array([120, 512, 512], np.int32), (_SCANS, 1))
    spacing_mm = np.tile([2.5, 0.75, 0.75], (_SCANS, 1))
    return Scans(
        split=(np.arange(_SCANS) % 10 == 0).astype(np.uint8),
        spacing_mm=spacing_mm,
        size=size,
        frame_mm=np.stack([-0.5 * spacing_mm, (size - 0.5) * spacing_mm], axis=1),
        embedding=rng.standard_normal((_SCANS, 512)).astype(np.float32),
        thumbnail=lambda _: thumbnail,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1, as workers do: NumPy's threads shape these figures")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    known: dict[str, float] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print(f"{'':36}{'ms':>9}{'recorded':>10}{'ratio':>8}{'of fixed work':>15}")
    for name, ms in measured.items():
        line = f"{name:36}{ms:9.3f}"
        if name in known:
            fixed = (ms / measured["fixed work"]) / (known[name] / known["fixed work"])
            line += f"{known[name]:10.3f}{ms / known[name]:8.2f}{fixed:15.2f}"
        print(line)
    if record:
        rounded = {name: round(ms, 4) for name, ms in measured.items()}
        RECORD.write_text(json.dumps(rounded, indent=2) + "\n")
        print(f"recorded in {RECORD.name}")


if __name__ == "__main__":
    main()
