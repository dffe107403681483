"""A validated, oriented scan in HU.

In pipeline, the only module that turns SimpleITK's x-y-z into z-y-x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

from pipeline.archive.series import Series
from pipeline.config import PrepareConfig
from store.geometry import AIR_HU, PADDING_HU, scan_id
from store.images import Rejected
from store.images.nifti import read_plain_nifti
from store.images.read import load_file, load_slices, open_file
from store.images.slices import check_spacing, read_header

_MIN_AIR, _MIN_SOFT = 5e-3, 0.3
"""Minimum share of voxels clearly lighter than the body, and of the other voxels, minimum share as
dense as fat, water and organs. Real CT has at least 0.21 and 0.74, cropped scans included."""
_LIGHT_HU, _SOFT_HU = -200, 300
_SAMPLED_VOXELS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """One scan turned to LPS.

    hu
        (Z, Y, X) int16 Hounsfield units; z runs to the head, y to the back, x to the left. Often
        a view of the values as read: axes swapped and flipped without a copy.
    spacing_mm
        (z, y, x); a position is measured in mm from the centre of voxel (0, 0, 0).
    """

    hu: NDArray[np.int16]
    spacing_mm: tuple[float, float, float]

    def __repr__(self) -> str:
        spacing = " x ".join(f"{s:.3g}" for s in self.spacing_mm)
        return f"<Volume {self.hu.shape}, {spacing} mm, {self.hu.nbytes / 2**20:.0f} MiB>"

    @property
    def edges_mm(self) -> NDArray[np.float64]:
        """(2, 3) low and high corner of the scan, at voxel edges."""
        spacing = np.asarray(self.spacing_mm)
        return np.stack([-0.5 * spacing, (np.asarray(self.hu.shape) - 0.5) * spacing])

    def thin(self, step_mm: Sequence[float] | NDArray[np.float64]) -> Volume:
        """Every n-th voxel along each axis, about `step_mm` (z, y, x) apart: a view."""
        z, y, x = (max(1, round(t / s)) for t, s in zip(step_mm, self.spacing_mm, strict=True))
        spacing = self.spacing_mm
        return Volume(
            hu=self.hu[::z, ::y, ::x],
            spacing_mm=(z * spacing[0], y * spacing[1], x * spacing[2]),
        )

    def scan_id(self) -> int:
        """64-bit scan id from voxels and geometry alone, never from a header or a path."""
        return scan_id(self.hu, self.spacing_mm)


class _Image(NamedTuple):
    """Values (Z, Y, X) along the image's own axes, and SimpleITK's geometry."""

    values: NDArray[Any]
    spacing_xyz: tuple[float, ...]
    direction: tuple[float, ...]


def read_volume(series: Series, config: PrepareConfig) -> Volume:
    """Read one series, check it, and turn it to LPS.

    Padding at or below -2000 becomes air. Raises Rejected with the rule's name and what was found;
    rules that need no voxels are checked before any is read.
    """
    read = _read_dicom if series.kind == "dicom" else _read_file
    image = read(series, config)
    _check_oblique(image.direction, config)
    if image.values.dtype.itemsize == 1:
        raise Rejected("not in HU", "8-bit values")
    return _turn_to_lps(image._replace(values=_as_hu(image.values)))


def read_geometry(
    series: Series, config: PrepareConfig
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size and spacing in mm of one series, each (z, y, x), from its headers alone.

    Raises Rejected where the headers show that `read_volume` would. The headers of a DICOM series
    were checked when it was listed.
    """
    if series.kind == "dicom":
        assert series.slice_gap_mm is not None
        first = read_header(series.files[0])
        size_xyz: tuple[int, ...] = (first.columns, first.rows, len(series.files))
        spacing_xyz: tuple[float, ...] = (*first.pixel_mm[::-1], series.slice_gap_mm)
        row, column = first.axes[:3], first.axes[3:]
        axes = np.stack([row, column, np.cross(row, column)], axis=1)
        direction: tuple[float, ...] = tuple(axes.ravel().tolist())
    else:
        reader = open_file(Path(series.files[0]))
        _check_header(reader.GetSize(), reader.GetNumberOfComponents(), config)
        size_xyz = reader.GetSize()[:3]
        spacing_xyz = tuple(map(abs, reader.GetSpacing()[:3]))  # reading the voxels corrects signs
        check_spacing(spacing_xyz)
        direction = _direction(reader)
        if reader.GetPixelID() in (sitk.sitkInt8, sitk.sitkUInt8):
            raise Rejected("not in HU", "8-bit values")
    _check_oblique(direction, config)
    order = _axes_zyx(_orientation(direction))
    return tuple(size_xyz[a] for a in order), tuple(spacing_xyz[a] for a in order)


def _orientation(direction: tuple[float, ...]) -> str:
    """Where the axes x, y, z of an image point to, such as LPS."""
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction)
    return str(letters)


def _axes_zyx(letters: str) -> list[int]:
    """The image's axes (x is 0) that are the patient's z, y and x."""
    return [next(a for a in range(3) if letters[a] in pair) for pair in ("SI", "PA", "LR")]


def _turn_to_lps(image: _Image) -> Volume:
    """What `SimpleITK.DICOMOrient(image, "LPS")` does, without a copy."""
    letters = _orientation(image.direction)
    hu, spacing_mm = image.values, []
    axes = _axes_zyx(letters)
    hu = hu.transpose([2 - axis for axis in axes])
    for axis, name in enumerate("SPL"):
        if letters[axes[axis]] != name:
            hu = np.flip(hu, axis)
        spacing_mm.append(image.spacing_xyz[axes[axis]])
    return Volume(hu=hu, spacing_mm=(spacing_mm[0], spacing_mm[1], spacing_mm[2]))


def _as_hu(values: NDArray[Any]) -> NDArray[np.int16]:
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise Rejected("not in HU", "values that are not finite")
        values = np.rint(values)
    low, high = values.min(), values.max()
    if low < -32768 or high > 32767:
        values = np.clip(values, -32768, 32767)
    hu = values.astype(np.int16, copy=False)
    _check_hu(hu)
    if low <= PADDING_HU:
        for slice_yx in hu:  # one slice fits the processor's cache
            slice_yx[slice_yx <= PADDING_HU] = AIR_HU
    return hu


def _check_hu(hu: NDArray[np.int16]) -> None:
    """Reject values that are not HU, by their histogram: air is light, bodies are like water.

    Padding is ignored, and so are a few outliers.
    """
    step = max(1, math.ceil((hu.size / _SAMPLED_VOXELS) ** (1 / 3)))
    sample = hu[::step, ::step, ::step]
    sample = sample[sample > PADDING_HU]
    light = sample < _LIGHT_HU
    if light.all():
        raise Rejected("empty", "nothing but air")
    if light.mean() < _MIN_AIR:
        raise Rejected("not in HU", f"{light.mean():.2%} of the voxels below {_LIGHT_HU}")
    soft = (sample[~light] <= _SOFT_HU).mean()
    if soft < _MIN_SOFT:
        raise Rejected("not in HU", f"{soft:.0%} of the body from {_LIGHT_HU} to {_SOFT_HU}")


def _read_file(series: Series, config: PrepareConfig) -> _Image:
    path = Path(series.files[0])
    reader = open_file(path)
    _check_header(reader.GetSize(), reader.GetNumberOfComponents(), config)
    spacing = reader.GetSpacing()[:3]
    if reader.HasMetaDataKey("vox_offset") and min(spacing) > 0:  # NIfTI of plain geometry
        values = read_plain_nifti(path, reader.GetSize()[:3])
        if values is not None:
            check_spacing(spacing)
            return _Image(values, spacing, _direction(reader))
    image = load_file(reader)
    values = sitk.GetArrayFromImage(image)
    return _Image(values.reshape(values.shape[-3:]), image.GetSpacing()[:3], _direction(image))


def _direction(image: Any) -> tuple[float, ...]:
    """(9,) cosines of an image's or a reader's first three axes: further axes have length 1."""
    cosines = np.asarray(image.GetDirection())
    n = math.isqrt(len(cosines))
    return tuple(cosines.reshape(n, n)[:3, :3].ravel().tolist())


def _read_dicom(series: Series, config: PrepareConfig) -> _Image:
    assert series.slice_gap_mm is not None  # measured from the headers
    image = load_slices(series.files, series.slice_gap_mm)
    _check_header(image.GetSize(), image.GetNumberOfComponentsPerPixel(), config)
    return _Image(sitk.GetArrayFromImage(image), image.GetSpacing(), image.GetDirection())


def _check_header(size_xyz: tuple[int, ...], num_components: int, config: PrepareConfig) -> None:
    while len(size_xyz) > 3 and size_xyz[-1] == 1:
        size_xyz = size_xyz[:-1]
    if len(size_xyz) != 3:
        raise Rejected(f"{len(size_xyz)}-D", f"size {size_xyz}; a scan has three axes")
    if num_components != 1:
        raise Rejected("RGB or vector", f"{num_components} values a voxel")
    voxels = math.prod(size_xyz)
    if voxels > config.max_voxels:
        raise Rejected("too large", f"{voxels} voxels claimed, max_voxels is {config.max_voxels}")
    if min(size_xyz) < config.min_slices:
        raise Rejected("too few slices", f"size {size_xyz}, min_slices is {config.min_slices}")


def _check_oblique(direction: tuple[float, ...], config: PrepareConfig) -> None:
    """Reject an image with too large an angle between an axis and the nearest patient axis."""
    cosines = np.abs(np.asarray(direction).reshape(3, 3))
    angle = float(np.degrees(np.arccos(np.clip(cosines.max(axis=0), -1, 1))).max())
    if angle > config.max_oblique_deg:
        raise Rejected("oblique", f"axes {angle:.0f} degrees from the patient's axes")
