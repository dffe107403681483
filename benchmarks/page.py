"""The page of a large store: its size, and how soon and how smoothly a browser shows it.

    python -m benchmarks.page STORE OUT [--classes 200] [--members 220]

Makes OUT/large.store (base crops of the classes of STORE, moved by a few voxels, until it has so
many classes and members) and its page, and opens the page in Chromium. First paint and the frames
while scrolling are measured in the browser; a frame takes 16.7 ms at 60 Hz.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from selenium import webdriver

from store import PatchStore
from store.format import AUTOENCODER_FILE, SPLITS
from store.report import write_report
from store.writer import StoreWriter, write_shard

_ROWS_PER_SHARD = 256
_SCROLL = """
const done = arguments[0], times = [];
let last = performance.now(), y = 0;
function frame(now) {
  times.push(now - last); last = now; y += 60; scrollTo(0, y);
  if (times.length < 180) requestAnimationFrame(frame); else done(times.slice(1));
}
requestAnimationFrame(frame);
"""
_PAINT = """
const [paint] = performance.getEntriesByName("first-contentful-paint");
return [paint.startTime, performance.getEntriesByType("navigation")[0].loadEventEnd];
"""


def make_large_store(source: PatchStore, path: Path, *, classes: int, members: int) -> None:
    """A store of base crops: those of `source`, each moved by up to 4 voxels.

    One member of ten is a validation scan. Every scan is in half of the classes.
    """
    generator = np.random.default_rng(0)
    num_scans = 2 * members
    like = np.arange(num_scans) % len(source.scans.id)  # the scan of `source` that each is like
    writer = StoreWriter.create(path, config=source.config, software={})
    split = (np.arange(num_scans) % 10 == 9).astype(np.uint8)
    writer.write_table("scans/id", np.arange(num_scans, dtype=np.uint64))
    writer.write_table("scans/patient", np.arange(num_scans, dtype=np.int32))
    writer.write_table("scans/split", split)
    for name in ("spacing_mm", "size", "frame_mm", "embedding", "mean_hu", "std_hu"):
        writer.write_table(f"scans/{name}", np.asarray(getattr(source.scans, name))[like])
    writer.finish_stage("survey", {**source.stages["survey"], "accepted": num_scans})

    origin = np.arange(classes) % source.num_classes  # the class of `source` that each is like
    for name in ("centre", "body_share"):
        values = np.asarray(getattr(source.classes, name))
        writer.write_table(f"classes/{name}", values[origin])
    base = source.rows("train", scale=0)
    crops = dict(zip(base.tolist(), source.train.read(base), strict=True))
    of_class = [source.rows("train", label=int(label), scale=0) for label in origin]
    digests: dict[str, list[str]] = {}
    for value, name in enumerate(SPLITS):
        scans = np.flatnonzero(split == value)
        chosen = np.stack(
            [np.sort(generator.choice(scans, len(scans) // 2, replace=False)) for _ in of_class]
        )
        if name == "train":
            writer.write_table("classes/reference", chosen[:, 0].astype(np.int32))
        picked = np.stack([generator.choice(rows, chosen.shape[1]) for rows in of_class])
        _write_classes(writer, name, chosen, source.train.origin_mm[picked], generator)
        label, scan = np.indices(chosen.shape)[0].ravel(), chosen.ravel()
        order = np.lexsort((label, scan))
        rows = picked.ravel()[order]
        for column, values in (
            ("label", label[order].astype(np.int32)), ("scan", scan[order].astype(np.int32)),
            ("scale", np.zeros(len(rows), np.uint8)),
            ("origin_mm", source.train.origin_mm[rows]),
            ("extent_mm", source.train.extent_mm[rows]),
        ):  # fmt: skip
            writer.write_table(f"{name}/{column}", values)
        grid = writer.create_sharded(
            f"{name}/patch", shape=(len(rows), *source.crop_shape), dtype="int16",
            rows_per_shard=_ROWS_PER_SHARD,
        )  # fmt: skip
        digests[f"{name}/patch"] = [
            write_shard(path, f"{name}/patch", shard, np.stack([
                np.roll(crops[int(rows[row])], generator.integers(-4, 5, 3).tolist(), (0, 1, 2))
                for row in grid.rows_of(shard)
            ]))
            for shard in range(grid.num_shards)
        ]  # fmt: skip
    writer.finish_stage("discover", source.stages["discover"])
    thumbnails = np.stack([source.thumbnails.read([row])[0] for row in like])
    writer.create_sharded(
        "scans/thumbnail", shape=thumbnails.shape, dtype="uint8", rows_per_shard=num_scans
    )
    digests["scans/thumbnail"] = [write_shard(path, "scans/thumbnail", 0, thumbnails)]
    shutil.copy(source.path / AUTOENCODER_FILE, path / AUTOENCODER_FILE)
    writer.seal(digests)


def _write_classes(
    writer: StoreWriter, split: str, chosen: NDArray[np.intp], place_mm: NDArray[np.float64],
    generator: np.random.Generator,
) -> None:  # fmt: skip
    """The columns of members, with random distances and scores; the reference has none."""
    prefix = "" if split == "train" else "validation_"
    distance = np.sort(generator.uniform(0.2, 2, chosen.shape), axis=1)
    score = generator.uniform(0.4, 0.9, chosen.shape)
    if split == "train":
        distance[:, 0], score[:, 0] = 0, np.nan
    for name, values in (
        ("distance", distance), ("score", score),
        ("cycle_mm", generator.uniform(0, 5, chosen.shape)),
    ):  # fmt: skip
        writer.write_table(f"classes/{prefix}{name}", values.astype(np.float32))
    writer.write_table(f"classes/{prefix}neighbour", chosen.astype(np.int32))
    writer.write_table(f"classes/{prefix}place_mm", place_mm)


def measure(page: Path) -> dict[str, float]:
    """Milliseconds in a browser that was just started."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as chrome:
        chrome.set_window_size(1440, 900)
        chrome.get("about:blank")
        chrome.get(page.as_uri())
        time.sleep(2)
        paint, load = chrome.execute_script(_PAINT)
        frames = np.array(chrome.execute_async_script(_SCROLL))
        return {
            "first paint, ms": round(paint),
            "whole file read, ms": round(load),
            "scrolling, median frame, ms": round(float(np.median(frames)), 1),
            "scrolling, 95 % of frames, ms": round(float(np.quantile(frames, 0.95)), 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--members", type=int, default=220)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, page = arguments.out / "large.store", arguments.out / "large.html"
    if not path.exists():
        make_large_store(
            PatchStore(arguments.store), path, classes=arguments.classes, members=arguments.members
        )
    began = time.perf_counter()
    size = write_report(PatchStore(path), page)
    found = {"page, MB": round(size / 1e6, 1), "written in, s": round(time.perf_counter() - began)}
    print(json.dumps({**found, **measure(page)}, indent=1))


if __name__ == "__main__":
    main()
