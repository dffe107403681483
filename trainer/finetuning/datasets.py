"""Convert public data sets, as downloaded, to tasks: a CSV manifest and the files it needs.

These are the paper's four tasks and the 3-D data sets of MedMNIST. The splits are the published
ones (see docs/finetuning.md).
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from store.atomic import fill_folder
from store.csvfile import write_csv_file
from store.progress import SILENT, Progress
from trainer.errors import TrainError
from trainer.finetuning.images import read_image, write_image
from trainer.finetuning.lidc import convert_lidc
from trainer.finetuning.task import SPLITS, Split
from trainer.seeds import derive_seeds

MANIFEST = "task.csv"

Row = dict[str, Any]
"""A line of the manifest, by column."""


def convert(
    kind: str, source: Path, out: Path, *, negatives: int = 20, progress: Progress = SILENT
) -> Path:
    """Make a task from a download; returns its manifest, `out`/task.csv.

    kind
        "ncc" (LUNA16), "ncs" (LIDC-IDRI), "lcs" (LiTS), "bms" (BraTS) or "medmnist".
    negatives
        For "ncc": number of random candidates without a nodule kept for each with one; 0 keeps all.

    The files appear when all are written. Raises TrainError saying what is wrong with the download
    or missing in it, SemgenError when `out` is not empty.
    """
    if not source.exists():
        raise TrainError(f"{source}: no such folder or file; download it first")
    if (out / MANIFEST).exists():
        raise TrainError(f"{out / MANIFEST}: already exists; delete {out} to convert again")
    converters: dict[str, Callable[[Path], Iterable[Row]]] = {
        "ncc": lambda _: _convert_luna16(source, negatives),
        "ncs": lambda folder: convert_lidc(source, folder),
        "lcs": lambda folder: _convert_lits(source, folder),
        "bms": lambda folder: _convert_brats(source, folder),
        "medmnist": lambda folder: _convert_medmnist(source, folder),
    }
    rows = []
    with (
        fill_folder(out, last=MANIFEST) as folder,
        progress.stage("convert", None, "cases") as advance,
    ):
        for row in converters[kind](folder):
            rows.append(row)
            advance(1)
        if not rows:
            raise TrainError(
                f"{source}: has no cases for {kind}; check that the download is complete"
            )
        write_csv_file(folder / MANIFEST, rows[0], (row.values() for row in rows))
    return out / MANIFEST


# NCC: lung nodule or not -------------------------------------------------------------------------


def _convert_luna16(source: Path, negatives: int) -> list[Row]:
    """LUNA16: `subset0` to `subset9` with `.mhd` files, and `candidates_V2.csv`.

    Subsets 0-4 are for training, 5-6 for validation, 7-9 for testing.
    """
    table = next(iter(sorted(source.rglob("candidates_V2.csv"))), None)
    if table is None:
        raise TrainError(f"{source}: has no candidates_V2.csv; download it from LUNA16 (and unzip)")
    scans: dict[str, tuple[Path, Split]] = {}
    subsets: dict[Split, range] = {
        "train": range(5), "validation": range(5, 7), "test": range(7, 10)
    }  # fmt: skip
    for split, numbers in subsets.items():
        for number in numbers:
            found = sorted(source.rglob(f"subset{number}/*.mhd"))
            if not found:
                raise TrainError(f"{source}: subset{number} is missing or empty; LUNA16 has ten")
            scans |= {file.stem: (file, split) for file in found}
    for file, _ in scans.values():
        if not file.with_suffix(".raw").exists() and not file.with_suffix(".zraw").exists():
            raise TrainError(f"{file}: its .raw is missing; download that subset again")
    rows: dict[int, list[Row]] = {0: [], 1: []}
    unknown = set()
    for number, (series, label, centre) in enumerate(_read_candidates(table)):
        if series not in scans:
            unknown.add(series)
            continue
        file, split = scans[series]
        rows[label].append(
            {"name": f"candidate-{number:06d}", "image": file.resolve(), "label": label,
             "patient": file.stem, "split": split, **centre}
        )  # fmt: skip
    if unknown:
        raise TrainError(
            f"{source}: {len(unknown)} scans of {table.name} are missing, such as"
            f" {sorted(unknown)[0]}; download the incomplete subset again"
        )
    kept = rows[1] + _draw_negatives(rows[0], rows[1], negatives)
    return sorted(kept, key=lambda row: str(row["image"]))


def _read_candidates(table: Path) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Series, label and centre (as text) of each line of `candidates_V2.csv`."""
    with table.open(newline="", encoding="utf-8", errors="replace") as stream:
        lines = csv.DictReader(stream)
        for line in lines:
            try:
                series, label = line["seriesuid"], int(line["class"])
                centre = {f"{axis.lower()}_mm": line[f"coord{axis}"] for axis in "XYZ"}
                if label not in (0, 1) or not all(math.isfinite(float(v)) for v in centre.values()):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise TrainError(
                    f"{table}: line {lines.line_num} has no seriesuid, coordX, coordY, coordZ and"
                    " class 0 or 1; download the file again"
                ) from None
            yield series, label, centre


def _draw_negatives(negatives: list[Row], positives: list[Row], per_positive: int) -> list[Row]:
    """`per_positive` random negatives for each positive of the same split; 0 keeps all."""
    if not per_positive:
        return negatives
    kept = []
    for split in SPLITS:
        candidates = [row for row in negatives if row["split"] == split]
        wanted = per_positive * sum(row["split"] == split for row in positives)
        order = np.random.default_rng(derive_seeds(0, split)).permutation(len(candidates))
        kept += [candidates[i] for i in order[:wanted].tolist()]
    return kept


# LCS: liver --------------------------------------------------------------------------------------


def _convert_lits(source: Path, out: Path) -> Iterator[Row]:
    """LiTS: `volume-N.nii` and `segmentation-N.nii`, in one or several folders.

    Tumour counts as liver. Volumes 0-99 are for training, 100-114 for validation, the rest for
    testing.
    """
    volumes = {_number(file): file for file in _find_images(source, "volume-*")}
    masks = {_number(file): file for file in _find_images(source, "segmentation-*")}
    if not volumes or not masks:
        raise TrainError(
            f"{source}: has no volume-0.nii and segmentation-0.nii, ...; give the LiTS download"
        )
    incomplete = sorted(volumes.keys() ^ masks.keys())
    if incomplete:
        raise TrainError(
            f"{source}: volume or segmentation {incomplete[0]} is missing; download both batches"
        )
    for number in sorted(volumes):
        split: Split = "train" if number < 100 else "validation" if number < 115 else "test"
        mask = _write_binary(masks[number], out / "masks" / f"{number:03d}.nii.gz")
        yield {
            "image": volumes[number].resolve(),
            "mask": mask.relative_to(out),
            "patient": number,
            "split": split,
        }


# BMS: brain tumour -------------------------------------------------------------------------------


def _convert_brats(source: Path, out: Path) -> Iterator[Row]:
    """BraTS: a folder for each case with its FLAIR image and segmentation; all labels are tumour.

    Every third case, in alphabetical order, is for testing.
    """
    masks = [*_find_images(source, "*_seg"), *_find_images(source, "*-seg")]
    if not masks:
        raise TrainError(f"{source}: has no CASE/CASE_seg.nii.gz; give BraTS' training data")
    for number, mask in enumerate(sorted(masks)):
        flairs = _find_images(mask.parent, "*flair") + _find_images(mask.parent, "*-t2f")
        if len(flairs) != 1:
            raise TrainError(f"{mask.parent}: expected one FLAIR image, found {len(flairs)}")
        binary = _write_binary(mask, out / "masks" / f"{mask.parent.name}.nii.gz")
        yield {
            "image": flairs[0].resolve(),
            "mask": binary.relative_to(out),
            "patient": mask.parent.name,
            "split": "test" if number % 3 == 2 else "",
            "intensity": "per-image",
        }


# MedMNIST ----------------------------------------------------------------------------------------


def _convert_medmnist(source: Path, out: Path) -> Iterator[Row]:
    """A 3-D data set of MedMNIST v2: one `.npz` file with the official split."""
    names: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
    try:
        with source.open("rb") as stream, np.load(stream) as archive:
            arrays = dict(archive)
        splits = {
            split: (arrays[f"{name}_images"], arrays[f"{name}_labels"])
            for split, name in names.items()
        }
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise TrainError(f"{source}: not a file of MedMNIST; give its .npz file") from error
    for split, (images, labels) in splits.items():
        if images.ndim != 4:
            raise TrainError(f"{source}: has {images.ndim - 1}-D images; give a 3-D data set")
        for number, (image, label) in enumerate(zip(images, labels.reshape(-1), strict=True)):
            file = out / "images" / f"{split}-{number:05d}.nii.gz"
            write_image(sitk.GetImageFromArray(image), file)
            yield {
                "image": file.relative_to(out),
                "label": int(label),
                "split": split,
                "intensity": "unit",
            }


# Files -------------------------------------------------------------------------------------------


def _find_images(folder: Path, pattern: str) -> list[Path]:
    return sorted([*folder.rglob(pattern + ".nii"), *folder.rglob(pattern + ".nii.gz")])


def _number(file: Path) -> int:
    """N of `volume-N.nii`."""
    return int(file.name.partition("-")[2].partition(".")[0])


def _write_binary(source: Path, target: Path) -> Path:
    """Write a mask that is 1 where the source has any label."""
    write_image(sitk.Greater(read_image(source), 0), target)
    return target
