"""Cases brought to one grid and kept on disk, so that every epoch and trial reads patches only."""

from __future__ import annotations

import dataclasses
import fcntl
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

from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.images import (
    check_unit,
    crop_around,
    pseudonym,
    read_image,
    read_mask,
    read_spacing,
    resample,
    scale_bytes,
    to_unit,
    turn,
)
from trainer.finetuning.task import Case, Task
from trainer.seeds import derive_seeds

_MOST_FOREGROUND = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How images are brought to the net."""

    spacing_mm: tuple[float, float, float] | None
    """(z, y, x); None: every image is brought to `shape`, whatever its spacing."""
    shape: tuple[int, int, int]
    intensity: str
    """"ct", "per-image" or "unit" (see `FinetuneConfig.intensity`)."""
    window_hu: tuple[float, float]
    """Of CT."""

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Grid:
        """As a checkpoint holds it; those of older versions say `is_ct`."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        if "is_ct" in known:
            known["intensity"] = "ct" if known.pop("is_ct") else "per-image"
        return cls(**known)

    def read(self, path: Path, channel: int | None = None) -> sitk.Image:
        """An image whose values this grid can take; TrainError names the file otherwise."""
        image = read_image(path, channel)
        if self.intensity == "unit":
            check_unit(path, image)
        return image

    def bring(
        self,
        image: sitk.Image,
        *,
        nearest: bool = False,
        centre_mm: tuple[float, float, float] | None = None,
    ) -> sitk.Image:
        """An image turned to LPS on this grid; values stay what they are, but for bytes.

        nearest
            Take the nearest voxel's value: the image is a mask.

        centre_mm
            Take `shape` voxels around this point (x, y, z), at the image's own spacing where the
            grid has none; beyond the image is air.
        """
        turned = turn(image)
        if self.intensity == "unit" and not nearest:
            turned = scale_bytes(turned)
        if centre_mm is not None:
            return crop_around(
                turned,
                centre_mm,
                spacing_mm=self.spacing_mm,
                shape=self.shape,
                is_ct=self.intensity == "ct",
            )
        if self.spacing_mm is None:
            return resample(turned, shape=self.shape, nearest=nearest)
        return resample(turned, spacing_mm=self.spacing_mm, nearest=nearest)

    def to_unit(self, image: sitk.Image) -> NDArray[np.float16]:
        """(Z, Y, X) values in [0, 1] of an image on this grid."""
        return to_unit(image, intensity=self.intensity, window_hu=self.window_hu)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A case on the grid."""

    case: Case
    folder: Path
    digest: str
    """SHA-256 (hex) of what the net sees of it."""
    scan: str
    """Pseudonym of its image, by which leaks are found."""

    @property
    def image(self) -> NDArray[np.float16]:
        """(Z, Y, X) in [0, 1], read as it is used."""
        values: NDArray[np.float16] = np.load(self.folder / "image.npy", mmap_mode="r")
        return values

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(Z, Y, X) class of each voxel, read as it is used."""
        values: NDArray[np.uint8] = np.load(self.folder / "mask.npy", mmap_mode="r")
        return values

    @property
    def foreground(self) -> NDArray[np.int32]:
        """(n, 3) z, y, x of some voxels of every class but the first."""
        values: NDArray[np.int32] = np.load(self.folder / "foreground.npy", mmap_mode="r")
        return values


def choose_grid(task: Task, config: FinetuneConfig, window_hu: tuple[float, float]) -> Grid:
    """The grid that the settings name, or that the images' own spacings suggest.

    window_hu
        Of CT, where the settings name none.
    """
    spacing = config.spacing_mm
    if spacing is None and task.segments:
        z, y, x = np.median([read_spacing(case.image) for case in task.cases], axis=0).round(3)
        spacing = (float(z), float(y), float(x))
    return Grid(
        spacing_mm=spacing,
        shape=config.shape,
        intensity=task.intensity if config.intensity == "auto" else config.intensity,
        window_hu=config.window_hu or window_hu,
    )


def prepare_cases(
    task: Task,
    grid: Grid,
    folder: Path,
    *,
    threads: int = 2,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Prepared]:
    """Bring every case to the grid, into a folder of its own; what is there already is kept.

    A folder is named by the hash of all that makes its content, so tasks may share `folder`, and
    nothing that a training reads is ever changed or deleted. Several processes may ask for the
    same: one prepares, the others wait.

    Raises TrainError naming the file of a case that cannot be used.
    """
    settings = json.dumps(dataclasses.asdict(grid))
    place = folder / hashlib.sha256(settings.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)

    def prepare(group: list[Case]) -> list[Prepared]:
        """Cases of one image, which is read at most once."""

        @lru_cache(maxsize=1)
        def read(channel: int | None) -> tuple[sitk.Image, str]:
            image = grid.read(group[0].image, channel)
            return image, pseudonym(image)

        done = []
        for case in group:
            read_case = partial(read, case.channel)
            done.append(_prepare_case(case, task, grid, place, read_case))
            progress(1)
        return done

    groups = [list(group) for _, group in itertools.groupby(task.cases, key=lambda c: c.image)]
    with (place / ".lock").open("w") as lock, ThreadPoolExecutor(threads) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # threads do, as SimpleITK lets go of Python's lock
        return list(itertools.chain.from_iterable(pool.map(prepare, groups)))


def fingerprint(task: Task, cases: Sequence[Prepared]) -> str:
    """SHA-256 (hex) of what there is to learn and how it is dealt out."""
    known = [[p.case.name, p.case.patient, p.case.split, p.case.label, p.digest] for p in cases]
    content = json.dumps([task.classes, task.segments, sorted(known)])
    return hashlib.sha256(content.encode()).hexdigest()


def _prepare_case(
    case: Case,
    task: Task,
    grid: Grid,
    place: Path,
    read: Callable[[], tuple[sitk.Image, str]],
) -> Prepared:
    """One case; the caller holds the lock of `place`."""
    makes_it = {
        "name": case.name,
        "sources": [_stamp(path) for path in (case.image, case.mask) if path],
        "channel": case.channel,
        "centre_mm": case.centre_mm,
        "classes": len(task.classes),
        "ignored": task.ignored,
    }
    folder = place / hashlib.sha256(json.dumps(makes_it).encode()).hexdigest()[:16]
    note = folder / "case.json"
    if note.is_file():
        found = json.loads(note.read_text())
        return Prepared(case=case, folder=folder, digest=found["digest"], scan=found["scan"])
    begun = place / f".{folder.name}.partial"
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir()
    image, scan = read()
    brought = grid.bring(image, centre_mm=case.centre_mm)
    arrays: dict[str, NDArray[Any]] = {"image": grid.to_unit(brought)}
    if case.mask is not None:
        mask = read_mask(case.mask, image, task.num_labels)
        arrays["mask"] = sitk.GetArrayFromImage(grid.bring(mask, nearest=True))
        arrays["foreground"] = _some_foreground(arrays["mask"], case.name, len(task.classes))
    digest = hashlib.sha256()
    for name, values in arrays.items():
        np.save(begun / f"{name}.npy", values)
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).data)
    known = {"digest": digest.hexdigest(), "scan": scan}
    (begun / note.name).write_text(json.dumps({"name": case.name, **known}))
    begun.rename(folder)
    return Prepared(case=case, folder=folder, **known)


def _stamp(path: Path) -> list[int | str]:
    """Where a file or folder is, and size and time of all its files: whether it changed."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if path.suffix == ".mhd":  # its voxels lie in another file
        files += [
            data for ending in (".raw", ".zraw") if (data := path.with_suffix(ending)).exists()
        ]
    stats = [file.stat() for file in files]
    size, time_ns = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
    return [str(path.resolve()), len(files), size, time_ns]


def _some_foreground(mask: NDArray[np.uint8], name: str, num_classes: int) -> NDArray[np.int32]:
    """Up to so many voxels of each class but the first, z, y, x."""
    rng = np.random.default_rng(derive_seeds(0, name))
    found: list[NDArray[Any]] = [np.empty((0, 3))]
    for number in range(1, num_classes):
        places = np.argwhere(mask == number)
        if len(places) > _MOST_FOREGROUND:
            places = places[np.sort(rng.choice(len(places), _MOST_FOREGROUND, replace=False))]
        found.append(places)
    return np.concatenate(found).astype(np.int32)
