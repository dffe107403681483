"""A validated, oriented scan in HU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

from pipeline.archive.series import Series
from pipeline.config import PrepareConfig
from store.images import Rejected
from store.images.nifti import read_plain_nifti
from store.images.orientation import direction_of, find_turn
from store.images.read import check_geometry, is_nifti, load_file, load_slices, open_file
from store.images.slices import read_header
from store.scans import AIR_HU, PADDING_HU, scan_id

_MIN_AIR, _MIN_SOFT = 5e-3, 0.3
"""Minimum share of voxels clearly lighter than the body, and of the other voxels, minimum share as
dense as fat, water and organs. Real CT has at least 0.21 and 0.74, cropped scans included."""
_LIGHT_HU, _SOFT_HU = -200, 300
_SAMPLED_VOXELS = 2**20
_SLICES_AT_ONCE = 32
_8_BIT = (sitk.sitkInt8, sitk.sitkUInt8)


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
    """Values along the image's own axes, and SimpleITK's geometry."""

    blocks: Iterable[NDArray[Any]]
    """The values, (n, Y, X) for some slices at a time."""
    size_xyz: tuple[int, ...]
    spacing_xyz: tuple[float, ...]
    direction: NDArray[np.float64]
    own: NDArray[np.int16] | None = None
    """The only block, where it is HU already and may be changed."""


def read_volume(series: Series, config: PrepareConfig) -> Volume:
    """Read one series, check it, and turn it to LPS.

    Padding at or below -2000 becomes air. Raises Rejected with the rule's name and what was found;
    rules that need no voxels are checked before any is read.
    """
    read = _read_dicom if series.kind == "dicom" else _read_file
    image = read(series, config)
    _check_oblique(image.direction, config)
    turn = find_turn(image.direction)
    return Volume(hu=turn.view(_read_hu(image)), spacing_mm=turn.sort(image.spacing_xyz))


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
        direction = np.stack([row, column, np.cross(row, column)], axis=1)
    else:
        reader, size_xyz = _open_file(series, config)
        spacing_xyz = reader.GetSpacing()[:3]
        direction = direction_of(reader)
    _check_oblique(direction, config)
    turn = find_turn(direction)
    return turn.sort(size_xyz), turn.sort(spacing_xyz)


def _read_hu(image: _Image) -> NDArray[np.int16]:
    """(Z, Y, X) HU along the image's own axes."""
    hu = np.empty(image.size_xyz[::-1], np.int16) if image.own is None else image.own
    first = lowest = 0
    for block in image.blocks:
        for given, slice_yx in zip(block, hu[first:], strict=False):
            if np.issubdtype(given.dtype, np.floating):
                if not np.isfinite(given).all():
                    raise Rejected("not in HU", "values that are not finite")
                given = np.rint(given)  # noqa: PLW2901
            low, high = given.min(), given.max()
            lowest = min(lowest, low)
            slice_yx[...] = np.clip(given, -32768, 32767) if low < -32768 or high > 32767 else given
        first += len(block)
    _check_hu(hu)
    if lowest <= PADDING_HU:
        for slice_yx in hu:
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
    reader, size = _open_file(series, config)
    geometry = (size, reader.GetSpacing()[:3], direction_of(reader))
    if is_nifti(reader):
        values = read_plain_nifti(Path(series.files[0]), size)
        if values is not None:
            return _Image([values], *geometry, own=values if values.dtype == np.int16 else None)
    return _Image(_view(load_file(reader), size), *geometry)


def _open_file(
    series: Series, config: PrepareConfig
) -> tuple[sitk.ImageFileReader, tuple[int, ...]]:
    """A reader of the series' file and the size (x, y, z); Rejected by the rules of headers."""
    reader = open_file(Path(series.files[0]))
    size_xyz = _check_header(reader.GetSize(), reader.GetNumberOfComponents(), config)
    check_geometry(reader)
    is_8_bit = reader.GetPixelID() in _8_BIT
    if is_nifti(reader):  # where scaled values have more bits than stored ones
        is_8_bit = int(reader.GetMetaData("bitpix")) <= 8
    if is_8_bit:
        raise Rejected("not in HU", "8-bit values")
    return reader, size_xyz


def _view(image: sitk.Image, size_xyz: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """The values of an image, in its memory: valid until the next one is asked for."""
    yield sitk.GetArrayViewFromImage(image).reshape(size_xyz[::-1])


def _read_dicom(series: Series, config: PrepareConfig) -> _Image:
    """A DICOM series; some slices at a time, because SimpleITK often reads them as 32 bits."""
    files, gap_mm = series.files, series.slice_gap_mm
    assert gap_mm is not None  # measured from the headers
    ends = load_slices([files[0], files[-1]], gap_mm)
    size = (*ends.GetSize()[:2], len(files))
    size = _check_header(size, ends.GetNumberOfComponentsPerPixel(), config)
    blocks = (
        block
        for first in range(0, len(files), _SLICES_AT_ONCE)
        for part in [files[first : first + _SLICES_AT_ONCE]]
        for block in _view(load_slices(part, gap_mm), (*size[:2], len(part)))
    )
    return _Image(blocks, size, ends.GetSpacing(), direction_of(ends))


def _check_header(
    size_xyz: tuple[int, ...], num_components: int, config: PrepareConfig
) -> tuple[int, ...]:
    """The three axes of a size without further axes of length 1; or Rejected."""
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
    return size_xyz


def _check_oblique(direction: NDArray[np.float64], config: PrepareConfig) -> None:
    """Reject an image with too large an angle between an axis and the nearest patient axis."""
    cosines = np.abs(direction).max(axis=0)
    angle = float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    if not angle <= config.max_oblique_deg:  # also where not a number
        raise Rejected("oblique", f"axes {angle:.0f} degrees from the patient's axes")
