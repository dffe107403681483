"""Public data sets as they are downloaded, made into tasks: a manifest, and what it needs.

The four of the paper, and MedMNIST's 3-D ones. Splits are the published ones (docs/finetuning.md).
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from store.csvfile import write_csv
from trainer.errors import TrainError
from trainer.finetuning.images import read_image, write_image
from trainer.seeds import derive_seeds

MANIFEST = "task.csv"
_NODULE_SHAPE = (32, 64, 64)
_CONSENSUS = 0.5
"""Share of the readers who marked a nodule that must agree on a voxel."""

Row = dict[str, Any]
Progress = Callable[[int], None]


def convert(
    kind: str, source: Path, out: Path, *, negatives: int = 20, progress: Progress = lambda _: None
) -> Path:
    """Make the task `kind` from a download; returns its manifest.

    kind
        "ncc", "ncs", "lcs", "bms" or "medmnist" (see the functions below).
    negatives
        Of "ncc": candidates kept for each nodule, drawn at random; 0 keeps all.

    Raises TrainError that says what a wrong or half download lacks.
    """
    if not source.exists():
        raise TrainError(f"{source}: no such folder or file; download it first")
    if (out / MANIFEST).exists():
        raise TrainError(f"{out / MANIFEST}: is there already; delete {out} to make it anew")
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Iterable[Row]]] = {
        "ncc": lambda: luna16(source, negatives),
        "ncs": lambda: lidc(source, out),
        "lcs": lambda: lits(source, out),
        "bms": lambda: brats(source, out),
        "medmnist": lambda: medmnist(source, out),
    }
    rows = []
    for row in makers[kind]():
        rows.append(row)
        progress(1)
    if not rows:
        raise TrainError(f"{source}: nothing in it makes a case of {kind}")
    partial = out / (MANIFEST + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, rows[0], (row.values() for row in rows))
    partial.replace(out / MANIFEST)
    return out / MANIFEST


# NCC: is a candidate a nodule? -------------------------------------------------------------------


def luna16(source: Path, negatives: int) -> list[Row]:
    """LUNA16: `subset0` to `subset9` with `.mhd`, and `candidates_V2.csv`; world coordinates.

    Train on subsets 0-4, validate on 5-6, test on 7-9.
    """
    table = next(iter(sorted(source.rglob("candidates_V2.csv"))), None)
    if table is None:
        raise TrainError(f"{source}: has no candidates_V2.csv; download it from LUNA16 (and unzip)")
    scans: dict[str, tuple[Path, str]] = {}
    for number, split in enumerate(["train"] * 5 + ["validation"] * 2 + ["test"] * 3):
        found = sorted(source.rglob(f"subset{number}/*.mhd"))
        if not found:
            raise TrainError(f"{source}: subset{number} is missing or empty; LUNA16 has ten")
        scans |= {file.stem: (file, split) for file in found}
    for file, _ in scans.values():
        if not file.with_suffix(".raw").exists() and not file.with_suffix(".zraw").exists():
            raise TrainError(f"{file}: its .raw is missing; download that subset again")
    rows: dict[int, list[Row]] = {0: [], 1: []}
    unknown = set()
    with table.open(newline="") as stream:
        for number, line in enumerate(csv.DictReader(stream)):
            if line["seriesuid"] not in scans:
                unknown.add(line["seriesuid"])
                continue
            file, split = scans[line["seriesuid"]]
            rows[int(line["class"])].append(
                {"name": f"candidate-{number:06d}", "image": file.resolve(), "label": line["class"],
                 "patient": file.stem, "split": split, "x_mm": line["coordX"],
                 "y_mm": line["coordY"], "z_mm": line["coordZ"]}
            )  # fmt: skip
    if unknown:
        raise TrainError(
            f"{source}: {len(unknown)} scans of {table.name} are missing, such as"
            f" {sorted(unknown)[0]}; download the subset that lacks them again"
        )
    return sorted(rows[1] + _thin(rows[0], rows[1], negatives), key=lambda row: str(row["image"]))


def _thin(others: list[Row], nodules: list[Row], per_nodule: int) -> list[Row]:
    """So many of the others for each nodule of their split, drawn at random."""
    if not per_nodule:
        return others
    kept = []
    for split in ("train", "validation", "test"):
        mine = [row for row in others if row["split"] == split]
        wanted = per_nodule * sum(row["split"] == split for row in nodules)
        order = np.random.default_rng(derive_seeds(0, split)).permutation(len(mine))
        kept += [mine[i] for i in order[:wanted].tolist()]
    return kept


# NCS: which voxels are the nodule? ----------------------------------------------------------------

_Voxels = NDArray[np.int64]
"""Flat indices into an image, in order, each once."""


class _Region(NamedTuple):
    """An outline in one slice."""

    z_mm: float
    inside: bool
    """Whether it goes around a part of the nodule, or around a hole in it."""
    edge: list[tuple[int, int]]
    """x, y in pixels."""


class _Mark(NamedTuple):
    """A nodule of 3 mm or more as one reader outlined it."""

    reader: int
    regions: list[_Region]


def lidc(source: Path, out: Path) -> Iterator[Row]:
    """LIDC-IDRI: a folder a patient with DICOM series and their readers' marks in XML.

    Each nodule of 3 mm or more is a case: a crop of 64 x 64 x 32 voxels (x, y, z) around it and the
    voxels that half of the readers who marked it agree on. Marks that overlap, also in a chain, are
    one nodule; several of one reader count as one. Patients are not dealt out here.
    """
    patients = sorted(path for path in source.glob("LIDC-IDRI-*") if path.is_dir())
    if not patients:
        raise TrainError(f"{source}: has no folders LIDC-IDRI-0001, ...; give the one that has")
    for patient in patients:
        for marks in sorted(patient.rglob("*.xml")):
            found = list(_read_marks(marks))
            if not found:
                continue
            if not any(marks.parent.glob("*.dcm")):
                raise TrainError(
                    f"{marks}: no DICOM files beside it; download {patient.name} again"
                )
            image = read_image(marks.parent)
            for number, nodule in enumerate(_group(found, image)):
                name = f"{patient.name}-{marks.stem}-{number}"
                yield _write_nodule(name, patient.name, image, nodule, out)


def _read_marks(file: Path) -> Iterator[_Mark]:
    """Every nodule of every reader but those below 3 mm, which one point marks."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise TrainError(f"{file}: cannot be read as XML; download it again") from error
    space = re.match(r"\{.*\}", root.tag)
    prefix = space.group() if space else ""
    for reader, session in enumerate(root.iter(f"{prefix}readingSession")):
        for nodule in session.iter(f"{prefix}unblindedReadNodule"):
            try:
                regions = [_read_region(roi, prefix) for roi in nodule.iter(f"{prefix}roi")]
            except ValueError as error:
                raise TrainError(
                    f"{file}: an outline without numbers as its position; download it again"
                ) from error
            regions = [region for region in regions if len(region.edge) > 1]
            if any(region.inside for region in regions):
                yield _Mark(reader, regions)


def _read_region(roi: ElementTree.Element, prefix: str) -> _Region:
    edge = [
        (int(p.findtext(f"{prefix}xCoord", "")), int(p.findtext(f"{prefix}yCoord", "")))
        for p in roi.iter(f"{prefix}edgeMap")
    ]
    inside = roi.findtext(f"{prefix}inclusion", "TRUE").strip().upper() != "FALSE"
    return _Region(float(roi.findtext(f"{prefix}imageZposition", "")), inside, edge)


def _group(marks: Iterable[_Mark], image: sitk.Image) -> list[list[_Voxels]]:
    """The voxels that were marked, by nodule and reader: marks that overlap are one nodule."""
    groups: list[list[tuple[int, _Voxels]]] = []
    for mark in marks:
        voxels = _fill(mark, image)
        if not len(voxels):
            continue
        same = [g for g in groups if any(len(np.intersect1d(voxels, other)) for _, other in g)]
        groups = [group for group in groups if not any(group is other for other in same)]
        groups.append([pair for group in same for pair in group] + [(mark.reader, voxels)])
    return [_join_readers(group) for group in groups]


def _join_readers(marks: Iterable[tuple[int, _Voxels]]) -> list[_Voxels]:
    """One set of voxels a reader."""
    by_reader: dict[int, list[_Voxels]] = defaultdict(list)
    for reader, voxels in marks:
        by_reader[reader].append(voxels)
    return [np.unique(np.concatenate(parts)) for parts in by_reader.values()]


def _fill(mark: _Mark, image: sitk.Image) -> _Voxels:
    """Voxels inside a reader's outlines but not inside those of holes.

    An outline lies outside the nodule, so it belongs to a hole that it goes around.
    """
    x, y, _ = image.GetOrigin()
    width, height, depth = image.GetSize()
    slices: dict[int, NDArray[np.bool_]] = {}
    for region in sorted(mark.regions, key=lambda region: not region.inside):  # holes last
        _, _, number = image.TransformPhysicalPointToIndex((x, y, region.z_mm))
        if 0 <= number < depth:
            canvas = Image.new("1", (width, height))
            ImageDraw.Draw(canvas).polygon(region.edge, fill=1, outline=int(not region.inside))
            marked = slices.setdefault(number, np.zeros((height, width), bool))
            if region.inside:
                marked |= np.array(canvas)
            else:
                marked &= ~np.array(canvas)
    found = [np.flatnonzero(m) + number * width * height for number, m in slices.items()]
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


def _agree(readers: Sequence[_Voxels]) -> _Voxels:
    """Voxels that half of the readers marked.

    There always are some of up to four readers whose marks overlap (LIDC has four). Of more, what
    most of them agree on.
    """
    voxels, votes = np.unique(np.concatenate(readers), return_counts=True)
    agreed: _Voxels = voxels[votes >= min(_CONSENSUS * len(readers), votes.max())]
    return agreed


def _write_nodule(
    name: str, patient: str, image: sitk.Image, readers: Sequence[_Voxels], out: Path
) -> Row:
    agreed = np.zeros(image.GetSize()[::-1], np.uint8)
    agreed.flat[_agree(readers)] = 1
    middle = np.rint(np.argwhere(agreed).mean(axis=0)).astype(int)
    room = np.array(agreed.shape) - _NODULE_SHAPE
    low = np.clip(middle - np.array(_NODULE_SHAPE) // 2, 0, np.maximum(room, 0))
    size = np.minimum(_NODULE_SHAPE, agreed.shape)
    mask = sitk.GetImageFromArray(agreed)
    mask.CopyInformation(image)
    row: Row = {"patient": patient}
    for kind, whole in (("image", image), ("mask", mask)):
        file = out / f"{kind}s" / f"{name}.nii.gz"
        write_image(sitk.RegionOfInterest(whole, size[::-1].tolist(), low[::-1].tolist()), file)
        row[kind] = file.relative_to(out)
    return row


# LCS: which voxels are the liver? -----------------------------------------------------------------


def lits(source: Path, out: Path) -> Iterator[Row]:
    """LiTS: `volume-N.nii` and `segmentation-N.nii`, flat or in batches; tumour counts as liver.

    Train on 0-99, validate on 100-114, test on 115 and above.
    """
    volumes = {_number(file): file for file in _images(source, "volume-*")}
    masks = {_number(file): file for file in _images(source, "segmentation-*")}
    if not volumes or not masks:
        raise TrainError(f"{source}: has no volume-0.nii and segmentation-0.nii, ...; give LiTS")
    lacking = sorted(volumes.keys() ^ masks.keys())
    if lacking:
        raise TrainError(
            f"{source}: volume or segmentation {lacking[0]} is missing; download both batches"
        )
    for number in sorted(volumes):
        split = "train" if number < 100 else "validation" if number < 115 else "test"
        mask = _binary(masks[number], out / "masks" / f"{number:03d}.nii.gz")
        yield {
            "image": volumes[number].resolve(),
            "mask": mask.relative_to(out),
            "patient": number,
            "split": split,
        }


# BMS: which voxels are the tumour? ----------------------------------------------------------------


def brats(source: Path, out: Path) -> Iterator[Row]:
    """BraTS: a folder a case with its FLAIR image and segmentation; any label is the tumour.

    Three folds by case, in alphabetical order; train on two, test on the third.
    """
    masks = [*_images(source, "*_seg"), *_images(source, "*-seg")]
    if not masks:
        raise TrainError(f"{source}: has no CASE/CASE_seg.nii.gz; give BraTS' training data")
    for number, mask in enumerate(sorted(masks)):
        flairs = _images(mask.parent, "*flair") + _images(mask.parent, "*-t2f")
        if len(flairs) != 1:
            raise TrainError(f"{mask.parent}: expected one FLAIR image, found {len(flairs)}")
        yield {
            "image": flairs[0].resolve(),
            "mask": _binary(mask, out / "masks" / f"{mask.parent.name}.nii.gz").relative_to(out),
            "patient": mask.parent.name,
            "split": "test" if number % 3 == 2 else "",
            "intensity": "per-image",
        }


# MedMNIST -----------------------------------------------------------------------------------------


def medmnist(source: Path, out: Path) -> Iterator[Row]:
    """MedMNIST v2 in 3-D: one `.npz` file with the official split."""
    try:
        with np.load(source) as archive:
            arrays = dict(archive)
        splits = {
            split: (arrays[f"{short}_images"], arrays[f"{short}_labels"])
            for split, short in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"{source}: no file of MedMNIST; give its .npz") from error
    for split, (images, labels) in splits.items():
        if images.ndim != 4:
            raise TrainError(
                f"{source}: holds images of {images.ndim - 1} axes; 3-D ones are needed"
            )
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


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted([*folder.rglob(pattern + ".nii"), *folder.rglob(pattern + ".nii.gz")])


def _number(file: Path) -> int:
    return int(file.name.partition("-")[2].partition(".")[0])


def _binary(source: Path, target: Path) -> Path:
    """A mask of one where the source has any label."""
    write_image(sitk.Greater(read_image(source), 0), target)
    return target
