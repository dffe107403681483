"""A tiny patch store, written without the pipeline: classes differ by their texture."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.format import AUTOENCODER_FILE, SURVEY_VERSION, THUMBNAIL_SHAPE
from store.writer import StoreWriter, write_shard

SHAPE = (16, 32, 32)


Shape = tuple[int, int, int]


def make_crops(
    labels: NDArray[np.int32], *, shape: Shape = SHAPE, seed: int = 0
) -> NDArray[np.int16]:
    """One crop of HU for each label: waves of the class's direction and length."""
    generator = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    crops = np.empty((len(labels), *shape), np.int16)
    for crop, label in zip(crops, labels.tolist(), strict=True):
        angle, length = label * 1.1, 6 + 2 * (label % 3)
        phase = generator.uniform(0, 0.8)
        along = np.cos(angle) * y + np.sin(angle) * x + 0.3 * (label % 2) * z
        wave = np.sin(2 * np.pi * along / length + phase)
        crop[...] = 600 * wave - 150 + generator.normal(0, 20, shape)
    return crops


def make_store(path: Path, **settings: Any) -> Path:
    """A complete store with the settings of `_write_store`, which is run once for equal ones."""
    return Path(shutil.copytree(_template(tuple(sorted(settings.items()))), path))


@functools.cache
def _template(settings: tuple[tuple[str, Any], ...]) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return _write_store(folder / "store", **dict(settings))


def _write_store(
    path: Path,
    *,
    num_classes: int = 6,
    num_train: int = 12,
    num_validation: int = 4,
    shape: Shape = SHAPE,
    seed: int = 0,
    window_hu: tuple[int, int] = (-1000, 1000),
    statistics: bool = True,
    rows_per_shard: int = 16,
    references: tuple[int, ...] = (),
) -> Path:
    """A complete store with `num_train` and `num_validation` crops of each class.

    statistics
        False: a store of an earlier version, without mean and deviation of its scans.
    references
        Scan of each class's reference. Default: the first one.
    """
    writer = StoreWriter.create(
        path, config={"window_hu": list(window_hu), "scales": 3}, software={}
    )
    num_scans = 4
    writer.write_table("scans/id", np.arange(num_scans, dtype=np.uint64))
    writer.write_table("scans/patient", np.arange(num_scans, dtype=np.int32))
    writer.write_table("scans/split", np.array([0, 0, 1, 1], np.uint8))
    writer.write_table("scans/spacing_mm", np.ones((num_scans, 3)))
    writer.write_table("scans/size", np.full((num_scans, 3), 64, np.int32))
    writer.write_table("scans/frame_mm", np.zeros((num_scans, 2, 3)))
    writer.write_table("scans/embedding", np.zeros((num_scans, 8), np.float32))
    version = 2
    if statistics:
        version = SURVEY_VERSION
        writer.write_table("scans/mean_hu", -300.0 - 100 * np.arange(num_scans))
        writer.write_table("scans/std_hu", 400.0 + 50 * np.arange(num_scans))
    writer.finish_stage("survey", {"accepted": num_scans, "rejected": {}, "version": version})
    writer.finish_stage("embed", {})
    writer.finish_stage("discover", {"classes": num_classes, "rejected": {}, "redrawn": {}})
    writer.write_table("classes/reference", np.array(references or num_classes * [0], np.int32))
    writer.write_table("classes/centre", np.zeros((num_classes, 3)))
    for prefix, scans in (("", [0, 1]), ("validation_", [2, 3])):
        neighbours = np.tile(np.array(scans, np.int32), (num_classes, 1))
        writer.write_table(f"classes/{prefix}neighbour", neighbours)
        for name in ("distance", "score", "cycle_mm"):
            writer.write_table(f"classes/{prefix}{name}", np.zeros((num_classes, 2), np.float32))
        writer.write_table(f"classes/{prefix}place_mm", np.zeros((num_classes, 2, 3)))
    writer.write_table("classes/body_share", np.ones(num_classes, np.float32))

    digests = {}
    for split, num, offset in (("train", num_train, 0), ("validation", num_validation, 1)):
        labels = np.repeat(np.arange(num_classes, dtype=np.int32), num)
        rows = len(labels)
        writer.write_table(f"{split}/label", labels)
        writer.write_table(f"{split}/scan", (np.arange(rows) % 2 + 2 * offset).astype(np.int32))
        scales = np.arange(rows) % 3 if split == "train" else np.zeros(rows)
        writer.write_table(f"{split}/scale", scales.astype(np.uint8))
        writer.write_table(f"{split}/origin_mm", np.zeros((rows, 3)))
        writer.write_table(f"{split}/extent_mm", np.ones((rows, 3)))
        crops = make_crops(labels, shape=shape, seed=seed + offset)
        grid = writer.create_sharded(
            f"{split}/patch", shape=(rows, *shape), dtype="int16", rows_per_shard=rows_per_shard
        )
        digests[f"{split}/patch"] = [
            write_shard(path, f"{split}/patch", shard, crops[list(grid.rows_of(shard))])
            for shard in range(grid.num_shards)
        ]
    thumbnails = np.zeros((num_scans, *THUMBNAIL_SHAPE), np.uint8)
    writer.create_sharded(
        "scans/thumbnail", shape=thumbnails.shape, dtype="uint8", rows_per_shard=num_scans
    )
    digests["scans/thumbnail"] = [write_shard(path, "scans/thumbnail", 0, thumbnails)]
    (path / AUTOENCODER_FILE).write_bytes(b"")
    writer.seal(digests)
    return path
