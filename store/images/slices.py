"""Slices of DICOM series: read their headers, and check that they make one even grid.

Reading libraries accept any header: they return a wrong spacing for missing slices, 1 mm where the
pixel size is missing, and uninitialised memory where pixel data is too short. So the headers are
read here, and checked against each other, before any voxel is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import pydicom
from numpy.typing import NDArray

from store.images import UNREADABLE, Rejected
from store.images.quiet_pydicom import quiet_pydicom
from store.images.spacing import check_spacing

DICOM_SUFFIXES: Final = (".dcm", ".dicom", ".ima")
_TAGS: Final = [
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
]
_UNCOMPRESSED: Final = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Transfer syntaxes whose pixel data has a known length; "" (none named) means implicit
little-endian."""
_LONG_VALUE: Final = 1024
"""More bytes than the first element of a DICOM file has."""
_PIXEL_DATA: Final = (0x7FE0, 0x0010)
_DUPLICATE_MM: Final = 1e-3
_TILT_MM: Final = 1.0
_SHIFT_MM: Final = 0.5
_PIXEL_TOLERANCE: Final = 1e-3
_ORIENTATION_TOLERANCE: Final = 1e-3
_AXES_TOLERANCE: Final = 0.01
_FAR_MM: Final = 1e5


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Content of one DICOM header."""

    path: str
    instance: str
    series: str
    study: str
    patient: str
    kind: str
    """SOP class."""
    modality: str
    scout: bool
    samples: int
    bits: int
    """Number of bits of a value."""
    rescale: tuple[float, ...]
    """RescaleSlope and RescaleIntercept; fewer where the header lacks them."""
    frames: int
    rows: int
    columns: int
    position_mm: tuple[float, ...]
    """ImagePositionPatient: x, y, z."""
    axes: tuple[float, ...]
    """ImageOrientationPatient: row and column direction."""
    pixel_mm: tuple[float, ...]
    """PixelSpacing: between rows, between columns."""
    missing_bytes: int
    """Number of bytes missing from the pixel data; 0 also where it is compressed."""


def looks_like_dicom(path: str) -> bool:
    """Whether a file is DICOM by its name or first bytes; OSError when it cannot be read.

    Old files have no preamble: they begin with an element of group 2 or 8.
    """
    if path.lower().endswith(DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        begin = file.read(132)
    if begin[128:] == b"DICM":
        return True
    group, kind, length = begin[:2], begin[4:6], int.from_bytes(begin[4:8], "little")
    if kind.isalpha() and kind.isupper():
        return group in (b"\2\0", b"\x08\0", b"\0\x08")
    next_group = begin[8 + length : 10 + length]  # the kind is not written
    return group == b"\x08\0" and (0 < length < _LONG_VALUE or next_group == group)


def read_header(path: str) -> Slice:
    """Read one file's header; Rejected ("unreadable", "not an image") where it has none."""
    try:
        with quiet_pydicom(), open(path, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=True)
            if "SOPClassUID" not in header and "Modality" not in header:
                raise Rejected(UNREADABLE, "no DICOM header")
            if "Rows" not in header or "Columns" not in header:
                raise Rejected("not an image", f"modality {header.get('Modality')}")
            return Slice(
                path=path,
                instance=str(header.get("SOPInstanceUID") or path),
                series=str(header.get("SeriesInstanceUID") or ""),
                study=str(header.get("StudyInstanceUID") or ""),
                patient=str(header.get("PatientID") or "").strip(),
                kind=str(header.get("SOPClassUID") or ""),
                modality=str(header.get("Modality") or ""),
                scout="LOCALIZER" in (header.get("ImageType") or ()),
                samples=int(header.get("SamplesPerPixel") or 1),
                bits=int(header.get("BitsStored") or header.get("BitsAllocated") or 0),
                rescale=(
                    *_numbers(header, "RescaleSlope"),
                    *_numbers(header, "RescaleIntercept"),
                ),
                frames=int(header.get("NumberOfFrames") or 1),
                rows=int(header.Rows or 0),
                columns=int(header.Columns or 0),
                position_mm=_numbers(header, "ImagePositionPatient"),
                axes=_numbers(header, "ImageOrientationPatient"),
                pixel_mm=_numbers(header, "PixelSpacing"),
                missing_bytes=_count_missing(file, header),
            )
    except Rejected:
        raise
    except Exception as error:  # pydicom may raise anything for a malformed element
        raise Rejected(UNREADABLE, type(error).__name__) from error


def _numbers(header: pydicom.Dataset, name: str) -> tuple[float, ...]:
    values = header.get(name)
    if values is None or isinstance(values, str):
        return ()
    return tuple(float(v) for v in np.atleast_1d(values))


def _count_missing(file: BinaryIO, header: Any) -> int:
    """Bytes missing from uncompressed pixel data, which begins at the file's position."""
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ""
    if syntax not in _UNCOMPRESSED:
        return 0
    pixels = (header.get("SamplesPerPixel") or 1) * (header.get("NumberOfFrames") or 1)
    wanted = int(header.Rows * header.Columns * pixels * (header.get("BitsAllocated") or 0) / 8)
    implicit, little = header.original_encoding
    order, begin = "<" if little else ">", file.read(12)
    if len(begin) < 12 or struct.unpack_from(f"{order}2H", begin) != _PIXEL_DATA:
        return max(1, wanted)
    (length,) = struct.unpack_from(f"{order}I", begin, 4 if implicit else 8)
    there = os.fstat(file.fileno()).st_size - file.tell() + (4 if implicit else 0)
    return max(0, wanted - int(min(length, there)))


def is_rescaled_alike(slices: Sequence[Slice]) -> bool:
    """Whether all slices have the same RescaleSlope, and an intercept; or all have none."""
    return len({(len(one.rescale), one.rescale[:1]) for one in slices}) == 1


def order_slices(slices: Sequence[Slice], tolerance: float) -> tuple[list[int], float]:
    """Order a series' slices along their normal, and check that they make one even grid.

    tolerance
        Maximum deviation of a slice from the even grid, as a share of the gap.

    Returns the order and the mean gap in mm. Raises Rejected by the first rule that fails.
    """
    if len({(one.rows, one.columns) for one in slices}) > 1:
        raise Rejected("mixed slice sizes")
    if len(slices) < 2:
        raise Rejected("too few slices", f"{len(slices)}")
    if any(len(one.position_mm) != 3 or len(one.axes) != 6 for one in slices):
        raise Rejected("no slice positions")
    position = np.array([one.position_mm for one in slices])
    axes = np.array([one.axes for one in slices])
    if not (np.abs(position).max() < _FAR_MM and np.abs(axes).max() < 2):  # or not finite
        raise Rejected("no slice positions", "not numbers, or far too large")
    row, column = axes[0, :3], axes[0, 3:]
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > _AXES_TOLERANCE:
        raise Rejected("no slice positions", "its axes are not perpendicular unit vectors")
    if np.abs(axes - axes[0]).max() > _ORIENTATION_TOLERANCE:
        raise Rejected("mixed orientations")
    _check_pixels([one.pixel_mm for one in slices])
    order, gap_mm = check_positions(position, axes[0], tolerance)
    check_spacing((gap_mm, *slices[0].pixel_mm))
    short = [one.missing_bytes for one in slices if one.missing_bytes]
    if short:
        raise Rejected("short pixel data", f"{len(short)} slices, up to {max(short)} bytes missing")
    return order, gap_mm


def _check_pixels(pixel_mm: Sequence[tuple[float, ...]]) -> None:
    if any(len(one) != 2 for one in pixel_mm):
        raise Rejected("no pixel spacing")
    pixels = np.array(pixel_mm)
    if not (np.isfinite(pixels).all() and pixels.min() > 0):
        raise Rejected("impossible spacing", f"pixels of {pixels.min()} mm")
    if (np.abs(pixels - pixels[0]) > _PIXEL_TOLERANCE * pixels[0]).any():
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        raise Rejected("mixed pixel spacing", f"{low} to {high} mm")


def check_positions(
    position_mm: NDArray[np.float64], axes: NDArray[np.float64], tolerance: float
) -> tuple[list[int], float]:
    """Order slices along their normal, and check that they make an even, straight grid.

    position_mm
        (n, 3) ImagePositionPatient, DICOM's x, y, z.
    axes
        (6,) ImageOrientationPatient: row and column direction.
    tolerance
        Maximum deviation of a slice from the even grid, as a share of the gap.

    Returns the order and the mean gap in mm. Raises Rejected.
    """
    normal = np.cross(axes[:3], axes[3:])
    along = position_mm @ normal
    order = np.argsort(along, kind="stable")
    along = along[order]
    gaps = np.diff(along)
    if gaps.min() < _DUPLICATE_MM:
        raise Rejected("slices at one position")
    gap = float(along[-1] - along[0]) / (len(along) - 1)
    off_grid = np.abs(along - (along[0] + gap * np.arange(len(along)))).max() / gap
    if off_grid > tolerance:
        usual = float(np.median(gaps))
        multiples = gaps / usual
        if np.abs(multiples - np.rint(multiples)).max() <= tolerance:
            raise Rejected("missing slices", f"gaps up to {gaps.max():.3f} mm, usual {usual:.3f}")
        raise Rejected("uneven slice spacing", f"gaps {gaps.min():.3f} to {gaps.max():.3f} mm")
    in_plane = position_mm[order] - np.outer(along, normal)
    in_plane -= in_plane[0]
    tilt = float(np.linalg.norm(in_plane[-1]))
    if tilt > _TILT_MM:
        raise Rejected("gantry tilt", f"slices shift by {tilt:.1f} mm over the scan")
    shift = float(np.linalg.norm(in_plane, axis=1).max())
    if shift > max(_SHIFT_MM, tilt):
        raise Rejected("shifted slices", f"by up to {shift:.1f} mm in their plane")
    return [int(i) for i in order], gap
