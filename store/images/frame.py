"""Where a scan lies in the scanner's frame, from its headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

from store.images.orientation import direction_of, find_turn
from store.images.read import load_slices, open_file
from store.images.write import write_image


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanFrame:
    """Geometry of a scan that was turned to LPS by axis swaps and flips.

    The axes of an oblique scan are only near the patient's: `direction` says where they point to.
    """

    size: tuple[int, int, int]
    """Voxels, (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x)."""
    origin_xyz: NDArray[np.float64]
    """(3,) centre of voxel (0, 0, 0) in the scanner's frame: x, y, z in mm to the left, back and
    head."""
    direction: NDArray[np.float64]
    """(3, 3) unit vectors of the axes x, y, z, as columns."""

    def locate(self, position_mm: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """A position (z, y, x) in mm from the centre of voxel (0, 0, 0), in the scanner's frame."""
        return np.asarray(self.origin_xyz + self.direction @ np.asarray(position_mm)[::-1])


def frame_of_file(path: Path) -> ScanFrame:
    """The frame of an image file; no voxel is read. Raises Rejected."""
    reader = open_file(path)
    return _turn(reader, reader.GetSize()[:3], reader.GetSpacing()[:3])


def frame_of_slices(files: Sequence[str], gap_mm: float) -> ScanFrame:
    """The frame of a DICOM series' files, in the order that `order_slices` found.

    One slice is read. Raises Rejected.
    """
    first = load_slices(files[:1], gap_mm)
    return _turn(first, (*first.GetSize()[:2], len(files)), first.GetSpacing())


def write_crop(
    file: Path,
    crop: NDArray[np.int16],
    *,
    origin_mm: NDArray[np.float64],
    extent_mm: NDArray[np.float64],
    frame: ScanFrame | None,
) -> None:
    """Write a crop of a scan as an image file, where it lies in the scanner's frame.

    crop
        (Z, Y, X) HU.
    origin_mm, extent_mm
        First corner (voxel edges) and size in the scan, (z, y, x).
    frame
        None: positions are in mm from the centre of the scan's first voxel.
    """
    step_mm = extent_mm / crop.shape
    first_mm = origin_mm + step_mm / 2
    image = sitk.GetImageFromArray(crop)
    image.SetSpacing(step_mm[::-1].tolist())
    image.SetOrigin((first_mm[::-1] if frame is None else frame.locate(first_mm)).tolist())
    if frame is not None:
        image.SetDirection(frame.direction.ravel().tolist())
    write_image(image, file)


def _turn(image: Any, size_xyz: Sequence[int], spacing_xyz: Sequence[float]) -> ScanFrame:
    """Turn an image or a reader of one to LPS."""
    own, turn = direction_of(image), find_turn(direction_of(image))
    origin, axes = np.array(image.GetOrigin()[:3]), []
    for axis, flip in zip(turn.axes[::-1], turn.flips[::-1], strict=True):  # x, y, z
        along = own[:, axis]
        if flip:
            origin += along * spacing_xyz[axis] * (size_xyz[axis] - 1)
            along = -along
        axes.append(along)
    return ScanFrame(
        size=turn.sort(size_xyz),
        spacing_mm=turn.sort(spacing_xyz),
        origin_xyz=origin,
        direction=np.stack(axes, axis=1),
    )
