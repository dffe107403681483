"""Read voxels and geometry of image files with SimpleITK; reject what it would make up."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import SimpleITK as sitk  # noqa: N813 (as its own documentation does)

from store.errors import is_utf8
from store.images import UNREADABLE, Rejected, check_fetched
from store.images.quiet_itk import quiet_itk
from store.images.slices import Slice, looks_like_dicom, order_slices, read_header
from store.images.spacing import check_spacing, check_stated_spacing

_TOLERANCE = 0.1
"""Maximum deviation of a slice from an even grid, as a share of the slice spacing."""
_READERS = {
    ".nii": "NiftiImageIO",
    ".gz": "NiftiImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
}
"""SimpleITK's part for each suffix; left to itself, it does not know .MHA."""


def open_file(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header of a file. Raises Rejected.

    Its geometry holds only where `check_geometry` agrees.
    """
    _check_name(path)
    check_fetched(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_READERS.get(path.suffix.lower(), ""))
    with quiet_itk(), _explained():
        reader.ReadImageInformation()
    return reader


def is_nifti(reader: sitk.ImageFileReader) -> bool:
    """Whether an opened file is NIfTI; other formats may have copied its fields."""
    return bool(reader.GetImageIO() == "NiftiImageIO")


def check_geometry(reader: sitk.ImageFileReader) -> None:
    """Raise Rejected where the spacing of an opened file is not stated, or impossible."""
    path, num_axes = Path(reader.GetFileName()), reader.GetDimension()
    check_stated_spacing(path, reader.GetImageIO(), num_axes)
    check_spacing(reader.GetSpacing()[:3])


def load_file(reader: sitk.ImageFileReader) -> sitk.Image:
    """The image of an opened file, whatever its number of axes; or Rejected."""
    if is_nifti(reader):
        bits = math.prod([int(reader.GetMetaData("bitpix")), *reader.GetSize()])
        offset = int(float(reader.GetMetaData("vox_offset")))
        _check_length(Path(reader.GetFileName()), offset + bits // 8)
    with quiet_itk(), _explained():
        image: sitk.Image = reader.Execute()
        if is_nifti(reader) and float(reader.GetMetaData("scl_slope")) == 0:
            intercept = float(reader.GetMetaData("scl_inter"))  # it does not count then
            image = image - intercept if intercept else image
    return image


def load_slices(
    files: Sequence[str], gap_mm: float, pixel_type: int = sitk.sitkUnknown
) -> sitk.Image:
    """The image of a DICOM series' files, in the order that `order_slices` found.

    pixel_type
        Type of the voxels, where the first slice's would not hold the values of others.
    """
    for file in files:
        _check_name(file)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")  # it reads files without preamble, but only when told to
    reader.SetFileNames(files)
    reader.SetOutputPixelType(pixel_type)
    with quiet_itk(), _explained():
        image: sitk.Image = reader.Execute()
    x, y, _ = image.GetSpacing()
    image.SetSpacing((x, y, gap_mm))  # SimpleITK uses the first gap
    return image


def find_slices(folder: Path) -> tuple[list[Slice], float]:
    """The slices of a folder's one DICOM series, in order, and their gap in mm; or Rejected."""
    files = [str(file) for file in sorted(folder.iterdir()) if file.is_file()]
    slices = [read_header(file) for file in files if looks_like_dicom(file)]
    if not slices:
        raise Rejected("no DICOM files")
    if len({one.series for one in slices}) > 1:
        raise Rejected("several series", "in one folder; give each a folder of its own")
    if any(one.frames > 1 or one.samples > 1 for one in slices):
        raise Rejected("RGB or multi-frame")
    order, gap_mm = order_slices(slices, _TOLERANCE)
    return [slices[i] for i in order], gap_mm


def _check_name(path: str | Path) -> None:
    if not is_utf8(path):
        raise Rejected("name not UTF-8", "rename the file or its folder")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Rejected(UNREADABLE, _last_line(error)) from error


def _last_line(error: RuntimeError) -> str:
    """The last line of an ITK error, without file names."""
    text = re.sub(r' for "[^"]*"', "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].split(":")[-1].strip()[:80] if lines else "no reason given"


def _check_length(path: Path, num_bytes: int) -> None:
    """Reject a NIfTI file that is too short or whose gzip checksums fail; ITK checks neither."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        length = file.seek(0, os.SEEK_END)
    if compressed:
        try:
            with gzip.open(path) as content:
                length = sum(len(block) for block in iter(lambda: content.read(2**20), b""))
        except (EOFError, OSError, zlib.error):
            raise Rejected(UNREADABLE, "its gzip data is cut off or broken") from None
    if length < num_bytes:
        raise Rejected(UNREADABLE, f"{length} bytes where the header asks for {num_bytes}")
