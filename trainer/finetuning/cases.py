"""Prepared cases: resampled once and kept on disk, so that training only reads patches."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from store.atomic import locked
from store.progress import SILENT, Progress
from trainer.finetuning.grid import Grid
from trainer.finetuning.images import compute_scan_id, list_files, read_mask
from trainer.finetuning.task import Case, Task
from trainer.seeds import derive_seeds

_VERSION = 2
"""Raised when the same case and grid give other values."""
_MAX_FOREGROUND = 20_000
"""Voxels of each class that are kept as possible centres of patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A case on the grid, as files in a folder."""

    case: Case
    folder: Path
    digest: str
    """SHA-256 (hex) of the arrays."""
    scan: str
    """Scan id of its image, to find out whether weights were pretrained on it."""

    @property
    def image(self) -> NDArray[np.float16]:
        """(Z, Y, X) as the net sees it, memory-mapped."""
        values: NDArray[np.float16] = np.load(self.folder / "image.npy", mmap_mode="r")
        return values

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(Z, Y, X) class of each voxel, memory-mapped."""
        values: NDArray[np.uint8] = np.load(self.folder / "mask.npy", mmap_mode="r")
        return values

    @property
    def foreground(self) -> NDArray[np.int32]:
        """(n, 3) indices z, y, x of some voxels of every class but the first."""
        values: NDArray[np.int32] = np.load(self.folder / "foreground.npy", mmap_mode="r")
        return values


def prepare_cases(
    task: Task, grid: Grid, folder: Path, *, threads: int = 2, progress: Progress = SILENT
) -> list[Prepared]:
    """Bring every case to the grid, each into its own folder; existing ones are kept.

    A folder is named by a hash of everything that determines its content, so tasks may share
    `folder`, and files that a training reads are never changed or deleted. If several processes
    prepare the same cases, one works and the others wait.

    Raises TrainError naming the file of a case that cannot be used.
    """
    settings = json.dumps({"version": _VERSION, **dataclasses.asdict(grid)})
    grid_folder = folder / hashlib.sha256(settings.encode()).hexdigest()[:16]
    grid_folder.mkdir(parents=True, exist_ok=True)

    def prepare(group: list[Case]) -> list[Prepared]:
        """Cases of one image, which is read at most once."""

        @lru_cache(maxsize=1)
        def read(channel: int | None) -> tuple[sitk.Image, str]:
            image = grid.read(group[0].image, channel)
            return image, compute_scan_id(image)

        return [
            _prepare_case(case, task, grid, grid_folder, partial(read, case.channel))
            for case in group
        ]

    groups = [list(group) for _, group in itertools.groupby(task.cases, key=lambda c: c.image)]
    prepared: list[Prepared] = []
    with (
        progress.stage("cases", len(task.cases), "cases") as advance,
        locked(grid_folder / ".lock"),
        ThreadPoolExecutor(threads) as pool,  # threads suffice: SimpleITK releases Python's lock
    ):
        for done in pool.map(prepare, groups):
            prepared += done
            advance(len(done))
    return prepared


def fingerprint(task: Task, cases: Sequence[Prepared]) -> str:
    """SHA-256 (hex) of classes, cases and their splits."""
    known = [[p.case.name, p.case.patient, p.case.split, p.case.label, p.digest] for p in cases]
    content = json.dumps([task.classes, task.segments, sorted(known)])
    return hashlib.sha256(content.encode()).hexdigest()


def _prepare_case(
    case: Case,
    task: Task,
    grid: Grid,
    grid_folder: Path,
    read: Callable[[], tuple[sitk.Image, str]],
) -> Prepared:
    """One case; the caller holds the lock of `grid_folder`."""
    determines = {
        "name": case.name,
        "sources": [_stamp(path) for path in (case.image, case.mask) if path],
        "channel": case.channel,
        "centre_mm": case.centre_mm,
        "classes": len(task.classes),
        "ignored": task.ignored,
    }
    folder = grid_folder / hashlib.sha256(json.dumps(determines).encode()).hexdigest()[:16]
    note = folder / "case.json"
    if note.is_file():
        found = json.loads(note.read_text())
        return Prepared(case=case, folder=folder, digest=found["digest"], scan=found["scan"])
    partial_folder = grid_folder / f".{folder.name}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    image, scan = read()
    on_grid = grid.resample_case(case, image)
    arrays: dict[str, NDArray[Any]] = {"image": grid.to_input(on_grid, image)}
    if case.mask is not None:
        mask = read_mask(case.mask, image, task.num_labels)
        arrays["mask"] = sitk.GetArrayFromImage(grid.resample(mask, nearest=True))
        arrays["foreground"] = _draw_foreground(arrays["mask"], case.name, len(task.classes))
    digest = hashlib.sha256()
    for name, values in arrays.items():
        np.save(partial_folder / f"{name}.npy", values)
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).data)
    known = {"digest": digest.hexdigest(), "scan": scan}
    (partial_folder / note.name).write_text(json.dumps({"name": case.name, **known}))
    partial_folder.rename(folder)
    return Prepared(case=case, folder=folder, **known)


def _stamp(path: Path) -> list[int | str]:
    """Path, number of files, total size and newest time of a file or folder, to detect changes."""
    files = list_files(path)
    stats = [file.stat() for file in files]
    size, time_ns = sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
    return [str(path.resolve()), len(files), size, time_ns]


def _draw_foreground(mask: NDArray[np.uint8], name: str, num_classes: int) -> NDArray[np.int32]:
    """(n, 3) indices z, y, x: at most `_MAX_FOREGROUND` voxels of each class but the first."""
    rng = np.random.default_rng(derive_seeds(0, name))
    found: list[NDArray[Any]] = [np.empty((0, 3))]
    for number in range(1, num_classes):
        voxels = np.argwhere(mask == number)
        if len(voxels) > _MAX_FOREGROUND:
            voxels = voxels[np.sort(rng.choice(len(voxels), _MAX_FOREGROUND, replace=False))]
        found.append(voxels)
    return np.concatenate(found).astype(np.int32)
