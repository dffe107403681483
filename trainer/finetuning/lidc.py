"""Convert LIDC-IDRI: combine the outlines that up to four readers drew around each lung nodule."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trainer.errors import TrainError
from trainer.finetuning.images import read_image, write_image

_SHAPE = (32, 64, 64)
"""(Z, Y, X) of the crop around a nodule."""
_CONSENSUS = 0.5
"""Share of the readers of a nodule that must have marked a voxel."""

_Voxels = NDArray[np.int64]
"""Flat indices into an image, sorted, without repetition."""


class _Region(NamedTuple):
    """An outline in one slice."""

    z_mm: float
    inside: bool
    """True: around a part of the nodule. False: around a hole in it."""
    edge: list[tuple[int, int]]
    """x, y in pixels."""


class _Mark(NamedTuple):
    """A nodule of 3 mm or more, as one reader outlined it."""

    reader: int
    regions: list[_Region]


def convert_lidc(source: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Lines of a manifest from a folder for each patient, with DICOM series and readings in XML.

    Each nodule of 3 mm or more is a case: a crop of 64 x 64 x 32 voxels (x, y, z) around it, and
    the voxels that at least half of its readers marked. Marks that overlap, also in a chain, are
    one nodule; several marks of one reader count once. No split is given.

    Raises TrainError naming the file that is missing or broken.
    """
    patients = sorted(path for path in source.glob("LIDC-IDRI-*") if path.is_dir())
    if not patients:
        raise TrainError(f"{source}: has no folders LIDC-IDRI-0001, ...; give the folder above")
    for patient in patients:
        for readings in sorted(patient.rglob("*.xml")):
            marks = list(_read_marks(readings))
            if not marks:
                continue
            if not any(readings.parent.glob("*.dcm")):
                raise TrainError(
                    f"{readings}: no DICOM files beside it; download {patient.name} again"
                )
            image = read_image(readings.parent)
            for number, nodule in enumerate(_group_marks(marks, image)):
                name = f"{patient.name}-{readings.stem}-{number}"
                yield _write_nodule(name, patient.name, image, nodule, out)


def _read_marks(file: Path) -> Iterator[_Mark]:
    """All outlined nodules of all readers; smaller ones are marked with a single point only."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise TrainError(f"{file}: cannot be read as XML; download it again") from error
    namespace = re.match(r"\{.*\}", root.tag)
    prefix = namespace.group() if namespace else ""
    for reader, session in enumerate(root.iter(f"{prefix}readingSession")):
        for nodule in session.iter(f"{prefix}unblindedReadNodule"):
            try:
                regions = [_read_region(roi, prefix) for roi in nodule.iter(f"{prefix}roi")]
            except ValueError as error:
                raise TrainError(
                    f"{file}: an outline has a position that is not a number; download it again"
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


def _group_marks(marks: Iterable[_Mark], image: sitk.Image) -> list[list[_Voxels]]:
    """For each nodule, the voxels that each of its readers marked."""
    groups: list[list[tuple[int, _Voxels]]] = []
    for mark in marks:
        voxels = _fill(mark, image)
        if not len(voxels):
            continue
        same = [g for g in groups if any(len(np.intersect1d(voxels, other)) for _, other in g)]
        groups = [group for group in groups if not any(group is other for other in same)]
        groups.append([pair for group in same for pair in group] + [(mark.reader, voxels)])
    return [_join_by_reader(group) for group in groups]


def _join_by_reader(marks: Iterable[tuple[int, _Voxels]]) -> list[_Voxels]:
    """One set of voxels for each reader."""
    by_reader: dict[int, list[_Voxels]] = defaultdict(list)
    for reader, voxels in marks:
        by_reader[reader].append(voxels)
    return [np.unique(np.concatenate(parts)) for parts in by_reader.values()]


def _fill(mark: _Mark, image: sitk.Image) -> _Voxels:
    """Voxels inside a reader's outlines of nodule, without those inside outlines of holes.

    An outline's own pixels are just outside the nodule: not nodule, and part of a hole.
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


def _find_consensus(readers: Sequence[_Voxels]) -> _Voxels:
    """Voxels that at least half of the readers marked.

    With up to four readers whose marks overlap (LIDC has four) there always are some. With more,
    there may be none; then the voxels with the most votes.
    """
    voxels, votes = np.unique(np.concatenate(readers), return_counts=True)
    agreed: _Voxels = voxels[votes >= min(_CONSENSUS * len(readers), votes.max())]
    return agreed


def _write_nodule(
    name: str, patient: str, image: sitk.Image, readers: Sequence[_Voxels], out: Path
) -> dict[str, Any]:
    """Write the crop and mask of a nodule; returns its line of the manifest."""
    agreed = np.zeros(image.GetSize()[::-1], np.uint8)
    agreed.flat[_find_consensus(readers)] = 1
    centre = np.rint(np.argwhere(agreed).mean(axis=0)).astype(int)
    last = np.maximum(np.array(agreed.shape) - _SHAPE, 0)
    low = np.clip(centre - np.array(_SHAPE) // 2, 0, last)
    size = np.minimum(_SHAPE, agreed.shape)
    mask = sitk.GetImageFromArray(agreed)
    mask.CopyInformation(image)
    row: dict[str, Any] = {"patient": patient}
    for kind, full in (("image", image), ("mask", mask)):
        file = out / f"{kind}s" / f"{name}.nii.gz"
        write_image(sitk.RegionOfInterest(full, size[::-1].tolist(), low[::-1].tolist()), file)
        row[kind] = file.relative_to(out)
    return row
