"""The voxel spacing that the header of an image file states.

SimpleITK does not show it: it reads 1 mm where none is stated, where it is zero, or not a number,
and drops the sign of a negative one.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from store.images import UNREADABLE, Rejected

SPACING_MM: Final = (0.01, 50.0)
"""Smallest and largest possible voxel spacing of a CT scan, along any axis."""
_TEXT_BYTES = 2**16
_NIFTI: Final = {348: (76, "8f"), 540: (104, "8d")}
"""Length of the header, NIfTI-1 and NIfTI-2: position and type of `pixdim`."""


def check_spacing(spacing_mm: Sequence[float]) -> None:
    """Raise Rejected for a voxel spacing that a CT scan cannot have."""
    low, high = SPACING_MM
    if not all(low <= s <= high for s in spacing_mm):  # also where not finite
        words = " x ".join(f"{s:.4g}" for s in spacing_mm)
        raise Rejected("impossible spacing", f"{words} mm; {low} to {high} mm is possible")


def check_stated_spacing(path: Path, image_io: str, num_axes: int) -> None:
    """Raise Rejected where a NIfTI, MetaImage or NRRD header states no possible spacing.

    image_io
        SimpleITK's name of the format; other formats are not checked.
    num_axes
        Number of axes of the image, of which the first three are checked.
    """
    num_axes = min(num_axes, 3)
    find = _FORMATS.get(image_io)
    if find is None:
        return
    try:
        with path.open("rb") as file:
            stated = find(file)[:num_axes]
    except (EOFError, OSError, zlib.error, struct.error) as error:
        raise Rejected(UNREADABLE, "its header is cut off or broken") from error
    if len(stated) < num_axes:
        raise Rejected("no pixel spacing", f"the header states it for {len(stated)} axes")
    if not all(0 < s < math.inf for s in stated):
        words = " x ".join(f"{s:.4g}" for s in stated)
        raise Rejected("impossible spacing", f"{words} in the header")


def _in_nifti(file: BinaryIO) -> list[float]:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with gzip.open(file) if packed else file as content:
        header = content.read(max(_NIFTI))
    for order in "<>":
        (length,) = struct.unpack_from(f"{order}i", header)
        if length in _NIFTI:
            offset, kind = _NIFTI[length]
            return list(struct.unpack_from(order + kind, header, offset)[1:4])
    raise Rejected(UNREADABLE, "no NIfTI header")


def _in_meta_image(file: BinaryIO) -> list[float]:
    header = _read_text(file).partition("ElementDataFile")[0]
    fields = dict(re.findall(r"^[ \t]*(\w+)[ \t]*[=:](.*)$", header, re.MULTILINE))
    return _numbers(fields.get("ElementSpacing") or fields.get("ElementSize") or "")


def _in_nrrd(file: BinaryIO) -> list[float]:
    header = re.split(r"\r?\n\r?\n", _read_text(file), maxsplit=1)[0]
    pairs = re.findall(r"^([\w ]+):(.*)$", header, re.MULTILINE)
    fields = {name.lower(): value for name, value in pairs}
    directions = fields.get("space directions") or fields.get("spacedirections", "")
    vectors = re.findall(r"\((.*?)\)", directions)
    if vectors:  # "none" for an axis of values; of `spacings`, NaN
        return [math.hypot(*_numbers(vector)) for vector in vectors]
    return [s for s in _numbers(fields.get("spacings", "")) if not math.isnan(s)]


def _read_text(file: BinaryIO) -> str:
    return file.read(_TEXT_BYTES).decode("latin-1")


def _numbers(text: str) -> list[float]:
    """Numbers that spaces or commas separate; NaN for what is none."""
    numbers = []
    for word in re.split(r"[\s,]+", text.strip()):
        try:
            numbers.append(float(word))
        except ValueError:
            numbers.append(math.nan)
    return numbers if text.strip() else []


_FORMATS: Final = {
    "NiftiImageIO": _in_nifti,
    "MetaImageIO": _in_meta_image,
    "NrrdImageIO": _in_nrrd,
}
"""What finds the spacing of each axis in a header, x first; fewer than axes where it is missing."""
