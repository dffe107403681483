"""A store of a million scans: time and memory of everything that does not read voxels.

    python -m benchmarks.million [--scans 1000000] [--index Flat IVF1024,Flat] [--work DIR]

Makes up series, and times the catalogue's rules and tables; draws embeddings around centres, with
made-up geometry, and times discovery with the exact index, where matching answers at once
(benchmarks/placing.py has its cost); writes and seals the store, whose shards are links to one; and
runs the commands that look at it, each in a process of its own. Then each index alone: building it,
and the neighbours of the first classes; how many it finds of those wanted, and of the true ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.scale import FOLDER_SCANS, folder_size, peak_mib
from pipeline.archive.catalogue import Catalogue, Surveyed
from pipeline.archive.lookup import catalogue_folder
from pipeline.archive.selection import (
    choose_next_best,
    choose_one_per_study,
    number_scans,
    patients_of_scans,
    reject_duplicates,
    series_in_parts,
)
from pipeline.archive.series import Series, hash_words
from pipeline.config import PrepareConfig
from pipeline.neighbours import Neighbours
from pipeline.place import Geometry, Scans
from pipeline.plan import ClassPlan, class_tables, row_tables
from pipeline.splits import split_patients
from pipeline.stages.discover import Find, discover
from pipeline.stages.placing import Found
from store.format import AUTOENCODER_FILE, SPLITS, SURVEY_VERSION, THUMBNAIL_SHAPE
from store.layout import shard_key
from store.settings import to_json
from store.writer import StoreWriter, write_shard

CENTRES, DIMENSIONS, NOISE = 1000, 16, np.float32(0.01)
QUERIES = 20
ROWS_PER_SHARD = 64
CONFIG = PrepareConfig()


def draw_embeddings(num: int, width: int) -> NDArray[np.float32]:
    """(num, width): points around centres in few dimensions, and a little noise."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((CENTRES, DIMENSIONS), np.float32)
    sheet = rng.standard_normal((DIMENSIONS, width), np.float32) / np.float32(width**0.5)
    embedding = np.empty((num, width), np.float32)
    for first in range(0, num, 65536):
        part = embedding[first : first + 65536]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= NOISE
        place = centres[rng.integers(CENTRES, size=len(part))]
        part += (place + rng.standard_normal(place.shape, np.float32)) @ sheet
    return embedding


def draw_scans(num: int) -> Scans:
    """Scans as discovery sees them."""
    rng = np.random.default_rng(1)
    spacing = rng.uniform([1.0, 0.6, 0.6], [3.0, 0.9, 0.9], (num, 3))
    size = np.rint(rng.uniform([250, 300, 300], [450, 450, 450], (num, 3)) / spacing)
    thumbnail = np.full(THUMBNAIL_SHAPE, 130, np.uint8)
    return Scans(
        split=(rng.random(num) < CONFIG.validation_fraction).astype(np.uint8),
        spacing_mm=spacing,
        size=size.astype(np.int32),
        frame_mm=np.stack([-0.5 * spacing, (size - 0.5) * spacing], axis=1),
        embedding=draw_embeddings(num, CONFIG.autoencoder.latent + 2),
        thumbnail=lambda _: thumbnail,
    )


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Print how long something took, and the peak of this process meanwhile."""
    began, before = time.perf_counter(), time.process_time()
    with peak_mib() as peak:
        yield
    cpu = time.process_time() - before
    print(f"{what:44s} {time.perf_counter() - began:8.1f} {cpu:8.1f} {peak[0]:9,.0f}", flush=True)


def make_up_series(num: int) -> Iterator[Series]:
    for number in range(num):
        yield Series(
            key=hash_words("key", str(number)),
            kind="file",
            files=(f"/archive/{number // FOLDER_SCANS:05d}/{number:07d}.nii.gz",),
            patient=hash_words("patient", str(number // 2)),
            study=hash_words("study", str(number)),
            stamp=hash_words("stamp", str(number)),
        )


def fill_catalogue(catalogue: Catalogue, num: int) -> None:
    """What the survey does besides reading: list, record, select, number, draw the splits."""
    with told("catalogue: list series"):
        catalogue.add(make_up_series(num))
        catalogue.commit()
    with told("catalogue: rules on headers"):
        assert not series_in_parts(catalogue)
        choose_one_per_study(catalogue)
    with told("catalogue: record the survey, series by series"):
        for number, series in enumerate(catalogue.pending()):
            catalogue.record(
                Surveyed(
                    key=series.key,
                    scan_id=number,
                    spacing_mm=(2.5, 0.8, 0.8),
                    size=(140, 512, 512),
                    frame_mm=((-1.25, 0.0, 0.0), (348.75, 300.0, 400.0)),
                    statistics_hu=(-400.0, 500.0),
                )
            )
        catalogue.commit()
    with told("catalogue: rules on voxels, number the scans"):
        assert not choose_next_best(catalogue)
        reject_duplicates(catalogue)
        assert number_scans(catalogue) == num
    with told("catalogue: tables"):
        catalogue.scan_tables()
    with told("catalogue: patients and splits"):
        split_patients(**patients_of_scans(catalogue), config=CONFIG)


def match_at_once(geometry: Geometry) -> Find:
    """In place of matching: the place that the frame gives, and numbers that mostly pass."""
    rng = np.random.default_rng(2)
    return lambda drafts, wanted: [
        Found(
            geometry.centre_mm(draft.centre, scans),
            rng.uniform(0.3, 1.0, len(scans)),
            rng.uniform(0.0, 10.5, len(scans)),
        )
        for draft, scans in zip(drafts, wanted, strict=True)
    ]


def write_store(path: Path, scans: Scans, classes: list[ClassPlan]) -> None:
    """A complete store; every full shard of an array is a link to its first one."""
    num, rng = len(scans), np.random.default_rng(3)
    writer = StoreWriter.create(path, config=to_json(CONFIG), software={})
    tables = {
        "scans/id": np.arange(num),
        "scans/patient": np.arange(num) // 2,
        **{f"scans/{name}": getattr(scans, name) for name in
           ("split", "spacing_mm", "size", "frame_mm", "embedding")},
        "scans/mean_hu": np.full(num, -400.0),
        "scans/std_hu": np.full(num, 500.0),
    }  # fmt: skip
    with told("store: tables of scans"):
        for name, values in tables.items():
            writer.write_table(name, values)
        writer.finish_stage("survey", {"accepted": num, "rejected": {}, "version": SURVEY_VERSION})
    with told("store: tables of classes and rows"):
        for name, values in class_tables(classes, CONFIG).items():
            writer.write_table(f"classes/{name}", values)
        num_rows = {}
        for split in SPLITS:
            rows = row_tables(classes, scans, CONFIG, split)
            num_rows[split] = len(rows["label"])
            for name, values in rows.items():
                writer.write_table(f"{split}/{name}", values)
        writer.finish_stage("discover", {"classes": len(classes), "rejected": {}, "redrawn": {}})
    with told("store: shards, as links"):
        thumbnail = rng.integers(0, 255, THUMBNAIL_SHAPE).astype(np.uint8)
        digests = {"scans/thumbnail": link_shards(writer, "scans/thumbnail", num, thumbnail)}
        for split in SPLITS:
            crop = rng.integers(-1000, 1000, CONFIG.shape).astype(np.int16)
            name = f"{split}/patch"
            digests[name] = link_shards(writer, name, num_rows[split], crop)
    (path / AUTOENCODER_FILE).write_bytes(b"")
    with told("store: seal"):
        writer.seal(digests)


def link_shards(writer: StoreWriter, name: str, num_rows: int, row: NDArray[Any]) -> list[str]:
    """An array whose rows are all the same; returns the digests of its shards."""
    grid = writer.create_sharded(
        name, shape=(num_rows, *row.shape), dtype=str(row.dtype), rows_per_shard=ROWS_PER_SHARD
    )
    digests: dict[int, str] = {}  # by number of rows
    for shard in range(grid.num_shards):
        length = len(grid.rows_of(shard))
        if length not in digests:
            values = np.broadcast_to(row, (length, *row.shape))
            digests[length] = write_shard(writer.path, name, shard, values.copy())
        else:
            file = writer.path / name / shard_key(shard, 1 + row.ndim)
            file.parent.mkdir(parents=True)
            file.hardlink_to(writer.path / name / shard_key(0, 1 + row.ndim))
    return [digests[len(grid.rows_of(shard))] for shard in range(grid.num_shards)]


def look_at(store: Path) -> None:
    """Run the commands that look at a store, each in a process of its own."""
    page = store.with_name("page.html")
    for words in (
        f"inspect {store}",
        f"inspect {store} --class 0",
        f"classes {store}",
        f"classes {store} --quality",
        f"report {store} {page}",
    ):
        began = time.perf_counter()
        command = [sys.executable, "-m", "cli", *words.split()]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL) as job,
            peak_mib(psutil.Process(job.pid)) as peak,
        ):
            job.wait()
        assert job.returncode == 0, words
        what = words.replace(str(store), "STORE").replace(str(page), "OUT")
        print(f"semgen {what:37s} {time.perf_counter() - began:8.1f} {'':8s} {peak[0]:9,.0f}")
    print(f"page: {page.stat().st_size / 2**20:.1f} MiB")


def million(num: int, indexes: list[str], work: Path) -> None:
    print(f"{num:,} scans {'':30s} seconds      CPU  peak MiB")
    with tempfile.TemporaryDirectory(dir=work, prefix="million-") as folder:
        store = Path(folder) / "store"
        with contextlib.closing(Catalogue(catalogue_folder(store))) as catalogue:
            fill_catalogue(catalogue, num)
        files, size = folder_size(catalogue_folder(store))
        print(f"catalogue: {size / 2**20:,.0f} MiB in {files} files")
        with told("draw embeddings"):
            scans = draw_scans(num)
        geometry = Geometry(scans, CONFIG)
        with told("discover"):
            found = discover(scans, CONFIG, find=match_at_once(geometry))
        classes = found.classes
        assert len(classes) == CONFIG.classes
        members = sum(len(one.train) + len(one.validation) for one in classes)
        print(f"{len(classes)} classes, {members} members, {found.to_facts()}")
        write_store(store, scans, classes)
        look_at(store)
    time_indexes(scans, geometry.is_large_enough(), classes[:QUERIES], indexes)
    print(json.dumps({"scans": num, "classes": len(classes), "members": members}))


def time_indexes(
    scans: Scans, eligible: NDArray[np.bool_], classes: list[ClassPlan], indexes: list[str]
) -> None:
    """Build each index, and find the neighbours of some classes' references."""
    train = np.flatnonzero(scans.split == 0)
    exact = Neighbours(scans.embedding, train, "Flat")
    true = [exact.nearest(one.reference, CONFIG.neighbours, eligible)[0] for one in classes]
    del exact
    print("\nindex            build s  nearest s  found  of the true  peak MiB")
    for index in indexes:
        with peak_mib() as peak:
            began = time.perf_counter()
            built = Neighbours(scans.embedding, train, index)
            build_s = time.perf_counter() - began
            nearest_s, found, right = 0.0, [], []
            for one, nearest in zip(classes, true, strict=True):
                began = time.perf_counter()
                members, _ = built.nearest(one.reference, CONFIG.neighbours, eligible)
                nearest_s += time.perf_counter() - began
                found.append(len(members) / CONFIG.neighbours)
                right.append(np.isin(nearest, members).mean())
            del built
        print(
            f"{index:16s} {build_s:7.1f} {nearest_s / len(found):10.3f} {np.mean(found):6.0%}"
            f" {np.mean(right):12.1%} {peak[0]:9,.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=int, default=1_000_000)
    parser.add_argument("--index", nargs="+", default=["Flat", "IVF1024,Flat"])
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the store"
    )
    given = parser.parse_args()
    million(given.scans, given.index, given.work)


if __name__ == "__main__":
    main()
