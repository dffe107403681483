"""Read and write the image files of a task; SimpleITK keeps their frame in physical space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from store.images import HEADER_SUFFIXES, VOLUME_SUFFIXES, Rejected, write
from store.images.orientation import direction_of, find_turn
from store.images.read import check_geometry, find_slices, load_file, load_slices, open_file
from store.images.slices import is_rescaled_alike
from store.scans import AIR_HU, PADDING_HU, scan_id, scan_name
from trainer.errors import TrainError

OUTPUT_SUFFIXES = tuple(suffix for suffix in VOLUME_SUFFIXES if suffix not in HEADER_SUFFIXES)
"""Without the formats of two files, which cannot be replaced in one step."""
_TOLERANCE = 1e-3


def find_stem(file: Path, suffixes: Sequence[str] = VOLUME_SUFFIXES) -> str | None:
    """A file's name without its suffix, in upper or lower case; None if it has another suffix."""
    name = file.name.lower()
    return next((file.name[: -len(s)] for s in suffixes if name.endswith(s.lower())), None)


def list_files(path: Path) -> list[Path]:
    """The files that hold an image: those of a folder, or a file and that of its voxels."""
    if path.is_dir():
        return sorted(path.iterdir())
    if path.suffix.lower() not in HEADER_SUFFIXES:
        return [path]
    voxels = (path.with_suffix(suffix) for suffix in (".raw", ".zraw", ".raw.gz"))
    return [path, *(file for file in voxels if file.exists())]


def read_image(path: Path, channel: int | None = None) -> sitk.Image:
    """A 3-D image from a file or a folder of one DICOM series, as it was stored.

    channel
        Required for an image with several channels, whether stored as a fourth axis or as vectors.

    Raises TrainError where it cannot be read.
    """
    try:
        if path.is_dir():
            slices, gap_mm = find_slices(path)
            pixel_type = sitk.sitkUnknown if is_rescaled_alike(slices) else sitk.sitkFloat32
            image = load_slices([one.path for one in slices], gap_mm, pixel_type)
        else:
            reader = open_file(path)
            check_geometry(reader)
            image = load_file(reader)
    except Rejected as reason:
        raise _unreadable(path, reason) from reason
    if image.GetDimension() == 4:
        size = [*image.GetSize()[:3], 0]
        number = _check_channel(path, channel, image.GetSize()[3])
        image = sitk.Extract(image, size, [0, 0, 0, number])
    count = image.GetNumberOfComponentsPerPixel()
    if count > 1:
        image = sitk.VectorIndexSelectionCast(image, _check_channel(path, channel, count))
    _check_axes(path, image)
    return image


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image compressed, replacing the file in one step; creates its folder.

    Raises TrainError for a suffix that cannot be written (see `check_output`), SemgenError where
    the disk is full or writing is not permitted.
    """
    check_output(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write.write_image(image, file)


def check_output(file: Path) -> None:
    """Raise TrainError unless an image can be written to a file of this name."""
    if file.suffix.lower() in HEADER_SUFFIXES:
        raise TrainError(
            f"{file}: {file.suffix} cannot be written (its voxels go to a second file); use .mha"
        )
    if not file.name.endswith(OUTPUT_SUFFIXES):  # SimpleITK writes most of them in lower case only
        raise TrainError(
            f"{file}: masks are written as {', '.join(OUTPUT_SUFFIXES)}; use one of these suffixes"
        )


def read_spacing(path: Path) -> tuple[float, float, float]:
    """Voxel spacing (z, y, x) in mm after turning to LPS; from headers and one slice.

    Raises TrainError where it cannot be read.
    """
    try:
        if path.is_dir():
            slices, gap_mm = find_slices(path)
            image: Any = load_slices([slices[0].path], gap_mm)
        else:
            image = reader = open_file(path)
            check_geometry(reader)
    except Rejected as reason:
        raise _unreadable(path, reason) from reason
    _check_axes(path, image)
    return find_turn(direction_of(image)).sort(image.GetSpacing()[:3])


def read_mask(path: Path, image: sitk.Image, num_classes: int) -> sitk.Image:
    """A mask of whole numbers below `num_classes` on an image's grid, as uint8.

    Raises TrainError where it has another grid or other values.
    """
    mask = read_image(path)
    same = mask.GetSize() == image.GetSize() and all(
        np.allclose(one, other, atol=_TOLERANCE)
        for one, other in (
            (mask.GetSpacing(), image.GetSpacing()),
            (mask.GetOrigin(), image.GetOrigin()),
            (mask.GetDirection(), image.GetDirection()),
        )
    )
    if not same:
        raise TrainError(
            f"{path}: does not have the grid of its image (size, spacing, origin, direction);"
            " resample the mask to it"
        )
    values = sitk.GetArrayViewFromImage(mask)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high >= num_classes or not np.array_equal(values, np.rint(values)):
        raise TrainError(
            f"{path}: has values from {low:g} to {high:g}; expected whole numbers below"
            f" {num_classes}, one for each class"
        )
    numbers: sitk.Image = sitk.Cast(mask, sitk.sitkUInt8)
    return numbers


def to_lps(image: sitk.Image) -> sitk.Image:
    """The image with its axes flipped and swapped to be as near to L, P, S as possible."""
    turned: sitk.Image = sitk.DICOMOrient(image, "LPS")
    return turned


def spacing_zyx(image: sitk.Image) -> tuple[float, float, float]:
    """Voxel spacing (z, y, x) in mm of an LPS image."""
    x, y, z = image.GetSpacing()
    return (z, y, x)


def compute_scan_id(image: sitk.Image) -> str:
    """The scan id (16 hex digits) that `semgen prepare` gives to this image.

    It is computed from voxels and geometry alone.
    """
    turned = to_lps(image)
    values = np.rint(sitk.GetArrayFromImage(turned)).clip(-32768, 32767).astype(np.int16)
    values[values <= PADDING_HU] = AIR_HU
    return scan_name(scan_id(values, spacing_zyx(turned)))


def _check_channel(path: Path, channel: int | None, count: int) -> int:
    if count == 1:
        return 0
    if channel is None or channel >= count:
        given = "none is given" if channel is None else f"channel {channel} is given"
        raise TrainError(
            f"{path}: has channels 0 to {count - 1}, and {given}; give --channel, or a column"
            " channel in the manifest"
        )
    return channel


def _check_axes(path: Path, image: Any) -> None:
    """Raise TrainError unless an image has three axes, or channels as a fourth."""
    if image.GetDimension() not in (3, 4):
        raise TrainError(f"{path}: must have three axes, has {image.GetDimension()}")


def _unreadable(path: Path, reason: Rejected) -> TrainError:
    return TrainError(
        f"{path}: cannot be read as an image: {reason}; repair the file or remove the case"
    )
