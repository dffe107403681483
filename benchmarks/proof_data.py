"""Phantoms for `benchmarks.proof`: the archive to pretrain on, and two tasks to fine-tune on.

Organs: segment seven organs of abdomens. Disease: does a crop of a chest show a mass of the lung or
an effusion? Each crop with disease has one without, at the same place of the atlas in a healthy
phantom, so that neither place nor organ tells them apart. No phantom is in two of: archive,
training, test.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

from pipeline.phantom.files import write_nifti
from pipeline.phantom.patients import Phantom, draw_phantom
from pipeline.phantom.solids import LABELS

ORGANS: Final = (
    "background", "liver", "spleen", "right_kidney", "left_kidney", "stomach", "aorta", "spine",
)  # fmt: skip
_DISEASES: Final = ("mass", "effusion")
_ARCHIVE, _ORGANS, _SICK, _HEALTHY = range(1900, 1904)
"""Seeds of the phantoms."""
_SLICES_MM = 384.0
"""Slices of the labeled phantoms, times the matrix: they are about as thick as pixels are wide."""
_SHIFT_MM = 20.0
"""A crop's centre is at most this far from a voxel of the disease, along each axis."""


def make_archive(folder: Path, numbers: range, matrix: int) -> None:
    """Write varied phantoms of these numbers; existing ones are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        file = folder / f"{number:04d}.nii.gz"
        if not file.exists():
            partial = folder / f".{number:04d}.nii.gz"
            write_nifti(draw_phantom(_ARCHIVE, number, matrix=matrix, varied=True), partial)
            partial.rename(file)


def make_organs(folder: Path, train: int, test: int, matrix: int) -> None:
    """Write the task "organs" in nnU-Net's layout, unless it exists."""
    _make_once(folder, lambda part: _fill_organs(part, train, test, matrix))


def make_disease(folder: Path, train: int, test: int, matrix: int) -> None:
    """Write the task "disease", unless it exists: task.csv with `train` + `test` pairs of crops."""
    _make_once(folder, lambda part: _fill_disease(part, train, test, matrix))


def _make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    part.rename(folder)


def _fill_organs(folder: Path, train: int, test: int, matrix: int) -> None:
    table = np.zeros(len(LABELS), np.uint8)
    for number, organ in enumerate(ORGANS[1:], 1):
        table[LABELS[organ]] = number
    table[LABELS["mass"]] = ORGANS.index("liver")  # an abdomen shows hardly any other mass
    for which in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / which).mkdir()
    for number in range(train + test):
        phantom = _with_thick_slices(
            draw_phantom(_ORGANS, number, matrix=matrix, protocol="abdomen", varied=True)
        )
        which, name = "Tr" if number < train else "Ts", f"{number:04d}.nii.gz"
        _write(phantom.render(), phantom, folder / f"images{which}" / name)
        _write(table[phantom.render_masks()], phantom, folder / f"labels{which}" / name)
    labels = {organ: number for number, organ in enumerate(ORGANS)}
    about = {"labels": labels, "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(about))


def _fill_disease(folder: Path, train: int, test: int, matrix: int) -> None:
    with (folder / "task.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label", "patient", "split", "x_mm", "y_mm", "z_mm"])
        pairs = itertools.islice(_draw_pairs(matrix), train + test)
        for number, pair in enumerate(pairs):
            split = "train" if number < train else "test"
            for (phantom, place_mm), label in zip(pair, ("disease", "healthy"), strict=True):
                name = f"{number:04d}-{label}.nii"
                _write(phantom.render(), phantom, folder / name)
                world_mm = (place_mm + phantom.origin_mm)[::-1].round(2).tolist()
                pair_name = f"{number:04d}"  # both are drawn for training, or none
                writer.writerow([name, label, pair_name, split, *world_mm])


def _draw_pairs(matrix: int) -> Iterator[tuple[tuple[Phantom, Any], tuple[Phantom, Any]]]:
    """A phantom with disease and a healthy one, each with the same place (z, y, x) in mm."""
    healthy = (
        phantom
        for number in itertools.count()
        if (phantom := draw_phantom(_HEALTHY, number, matrix=matrix, varied=True)).disease is None
    )
    for number in itertools.count():
        sick = draw_phantom(_SICK, number, matrix=matrix, varied=True)
        if sick.disease is None or sick.disease.organ == "liver":
            continue  # a mass in the liver has hardly any contrast
        sick = _with_thick_slices(sick)
        shown = np.argwhere(np.isin(sick.render_masks(), [LABELS[name] for name in _DISEASES]))
        if not len(shown):
            continue
        rng = np.random.default_rng([_SICK, number])
        place_mm = rng.choice(shown) * np.array(sick.spacing_mm)
        place_mm = np.clip(place_mm + rng.uniform(-_SHIFT_MM, _SHIFT_MM, 3), 0, _extent_mm(sick))
        atlas = sick.to_atlas(place_mm[None])
        for phantom in healthy:  # the next one that shows this place
            other = _with_thick_slices(phantom)
            other_mm = other.from_atlas(atlas)[0]
            if ((other_mm >= 0) & (other_mm <= _extent_mm(other))).all():
                yield (sick, place_mm), (other, other_mm)
                break


def _extent_mm(phantom: Phantom) -> NDArray[np.float64]:
    """Position of the last voxel."""
    return np.asarray((np.array(phantom.size) - 1) * phantom.spacing_mm)


def _with_thick_slices(phantom: Phantom) -> Phantom:
    slice_mm = _SLICES_MM / phantom.size[2]
    num = int(_extent_mm(phantom)[0] // slice_mm) + 1
    return replace(
        phantom,
        size=(num, *phantom.size[1:]),
        spacing_mm=(slice_mm, *phantom.spacing_mm[1:]),
    )


def _write(voxels: NDArray[Any], phantom: Phantom, file: Path) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(phantom.spacing_mm[::-1])
    image.SetOrigin(phantom.origin_mm[::-1])
    sitk.WriteImage(image, str(file))
