"""Images of a task: read, turned to LPS, brought to one grid, and answers brought back.

SimpleITK keeps the physical frame, so whatever way an image was stored, oblique or flipped, an
answer is resampled in space onto the very grid that the image came with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from store.geometry import AIR_HU, PADDING_HU, scan_id, scan_name
from store.images import Rejected
from store.images.read import find_slices, load_corner, load_file, load_slices, open_file
from trainer.errors import TrainError

ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
_PERCENTILES = (0.5, 99.5)
_ALIKE = 1e-3


def find_stem(file: Path, endings: Sequence[str] = ENDINGS) -> str | None:
    """A file's name without its ending; None when it has another."""
    return next((file.name[: -len(e)] for e in endings if file.name.endswith(e)), None)


def read_image(path: Path, channel: int | None = None) -> sitk.Image:
    """A 3-D image from a file or a folder of one DICOM series, as it was stored.

    channel
        Of an image that has several, whichever way its file says so; which must be said then.

    Raises TrainError when it cannot be read as such.
    """
    try:
        if path.is_dir():
            slices, gap_mm = find_slices(path)
            image = load_slices([one.path for one in slices], gap_mm)
        else:
            image = load_file(open_file(path))
    except Rejected as no:
        raise _refused(path, no) from no
    if image.GetDimension() == 4:
        size = [*image.GetSize()[:3], 0]
        number = _pick_channel(path, channel, image.GetSize()[3])
        image = sitk.Extract(image, size, [0, 0, 0, number])
    count = image.GetNumberOfComponentsPerPixel()
    if count > 1:
        image = sitk.VectorIndexSelectionCast(image, _pick_channel(path, channel, count))
    if image.GetDimension() != 3:
        raise TrainError(f"{path}: must have three axes, has {image.GetDimension()}")
    return image


def _pick_channel(path: Path, channel: int | None, count: int) -> int:
    if count == 1:
        return 0
    if channel is None or channel >= count:
        given = "none is picked" if channel is None else f"number {channel} is picked"
        raise TrainError(
            f"{path}: has channels 0 to {count - 1}, and {given}; give --channel, or a column"
            " channel in the manifest"
        )
    return channel


def _refused(path: Path, no: Rejected) -> TrainError:
    return TrainError(f"{path}: cannot be read as an image: {no}; mend it or drop the case")


def write_image(image: sitk.Image, file: Path) -> None:
    """Write under a temporary name of the same ending, then rename; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = file.with_name(f".partial-{file.name}")
    try:
        sitk.WriteImage(image, str(begun), useCompression=True)
        begun.replace(file)
    except RuntimeError as error:
        begun.unlink(missing_ok=True)
        raise TrainError(
            f"{file}: cannot be written; free disk space or check write permission"
        ) from error


def read_spacing(path: Path) -> tuple[float, float, float]:
    """Millimetres between voxels along z, y and x, once turned; reads no voxel but one."""
    try:
        if path.is_dir():
            slices, gap_mm = find_slices(path)
            image = load_slices([slices[0].path, slices[1].path], gap_mm)
        else:
            image = load_corner(open_file(path))
    except Rejected as no:
        raise _refused(path, no) from no
    like = sitk.Image([1, 1, 1], sitk.sitkUInt8)
    like.SetSpacing(image.GetSpacing()[:3])
    sides = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (sides, sides))[:3, :3]
    like.SetDirection(direction.ravel().tolist())
    return spacing_zyx(turn(like))


def read_mask(path: Path, image: sitk.Image, num_classes: int) -> sitk.Image:
    """A mask of whole numbers on an image's grid; TrainError when it is something else."""
    mask = read_image(path)
    same = mask.GetSize() == image.GetSize() and all(
        np.allclose(one, other, atol=_ALIKE)
        for one, other in (
            (mask.GetSpacing(), image.GetSpacing()),
            (mask.GetOrigin(), image.GetOrigin()),
            (mask.GetDirection(), image.GetDirection()),
        )
    )
    if not same:
        raise TrainError(f"{path}: does not lie on the grid of its image; resample it there")
    values = sitk.GetArrayViewFromImage(mask)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high >= num_classes or not np.array_equal(values, np.rint(values)):
        raise TrainError(
            f"{path}: holds values from {low:g} to {high:g}; expected whole numbers below"
            f" {num_classes}, one a class"
        )
    whole: sitk.Image = sitk.Cast(mask, sitk.sitkUInt8)
    return whole


def turn(image: sitk.Image) -> sitk.Image:
    """The image with its axes as near to L, P, S as they come."""
    turned: sitk.Image = sitk.DICOMOrient(image, "LPS")
    return turned


def spacing_zyx(image: sitk.Image) -> tuple[float, float, float]:
    """Millimetres between voxels along z, y and x of an image that was turned."""
    x, y, z = image.GetSpacing()
    return (z, y, x)


def resample(
    image: sitk.Image,
    *,
    spacing_mm: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    nearest: bool = False,
) -> sitk.Image:
    """An image on a grid of that (z, y, x) spacing, or shape, over the same extent.

    Linear, smoothed first along axes that get coarser; or the nearest voxel's value. Beyond the
    outermost voxels' centres the edge is repeated.
    """
    old = np.array(image.GetSpacing())
    extent = old * image.GetSize()
    if shape is not None:
        size = np.array(shape[::-1])
    else:
        assert spacing_mm is not None
        size = np.maximum(1, np.rint(extent / np.array(spacing_mm[::-1]))).astype(int)
    new = extent / size
    if not nearest:
        image = sitk.Cast(image, sitk.sitkFloat32)
        for axis, (coarse, fine) in enumerate(zip(new, old, strict=True)):
            if coarse > fine * (1 + _ALIKE) and image.GetSize()[axis] >= 4:
                sigma = 0.5 * float(np.sqrt(coarse**2 - fine**2))
                image = sitk.RecursiveGaussian(image, sigma, direction=axis)
    corner = image.TransformContinuousIndexToPhysicalPoint(
        (0.5 * new / old - 0.5).tolist()  # the first centre, from the shared corner
    )
    return sitk.Resample(
        image,
        size.tolist(),
        sitk.Transform(),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        corner,
        new.tolist(),
        image.GetDirection(),
        0.0,
        image.GetPixelID(),
        True,  # the edge is repeated
    )


def crop_around(
    image: sitk.Image,
    centre_mm: Sequence[float],
    *,
    spacing_mm: Sequence[float] | None,
    shape: Sequence[int],
    is_ct: bool,
) -> sitk.Image:
    """A (Z, Y, X) crop of an image that was turned, its middle at a point (x, y, z) in space.

    Smoothed and resampled where `spacing_mm` (z, y, x) is given. Beyond the image is air, or zero.
    """
    if spacing_mm is not None:
        image = resample(image, spacing_mm=spacing_mm)
    spacing, size = np.array(image.GetSpacing()), np.array(shape[::-1])
    axes = np.reshape(image.GetDirection(), (3, 3))
    corner = np.array(centre_mm) - axes @ (0.5 * (size - 1) * spacing)
    return sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32),
        size.tolist(),
        sitk.Transform(),
        sitk.sitkLinear,
        corner.tolist(),
        spacing.tolist(),
        image.GetDirection(),
        AIR_HU if is_ct else 0,
    )


def scale_bytes(image: sitk.Image) -> sitk.Image:
    """8-bit values over 255, unless none exceeds 1 (a mask, a binary shape); others as they are."""
    if image.GetPixelID() != sitk.sitkUInt8 or sitk.GetArrayViewFromImage(image).max() <= 1:
        return image
    scaled: sitk.Image = sitk.Cast(image, sitk.sitkFloat32) / 255
    return scaled


def check_unit(path: Path, image: sitk.Image) -> None:
    """Raise TrainError where an image has other values than the intensity "unit" takes."""
    values = sitk.GetArrayViewFromImage(image)
    low, high = float(values.min()), float(values.max())
    if image.GetPixelID() != sitk.sitkUInt8 and (low < -_ALIKE or high > 1 + _ALIKE):
        raise TrainError(
            f'{path}: has values from {low:g} to {high:g}; intensity "unit" takes 0 to 1, or 8-bit'
            " values; give another --intensity"
        )


def to_unit(
    image: sitk.Image, *, intensity: str, window_hu: tuple[float, float]
) -> NDArray[np.float16]:
    """(Z, Y, X) in [0, 1] by the rule of that name (see `FinetuneConfig.intensity`)."""
    if intensity == "unit":
        image = scale_bytes(image)
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    low, high = {"ct": window_hu, "unit": (0.0, 1.0)}.get(intensity) or np.percentile(
        values, _PERCENTILES
    )
    scaled = (values - low) / max(float(high - low), 1e-6)
    return np.clip(scaled, 0, 1).astype(np.float16)


def pseudonym(image: sitk.Image) -> str:
    """What preparing calls this scan, if it takes it: from voxels and geometry alone."""
    turned = turn(image)
    values = np.rint(sitk.GetArrayFromImage(turned)).clip(-32768, 32767).astype(np.int16)
    values[values <= PADDING_HU] = AIR_HU
    return scan_name(scan_id(values, spacing_zyx(turned)))


def bring_back(values: NDArray[np.float32], grid: sitk.Image, image: sitk.Image) -> sitk.Image:
    """(Z, Y, X) values on one grid, as an image on another's: linear, in physical space."""
    answer = sitk.GetImageFromArray(values)
    answer.CopyInformation(grid)
    return sitk.Resample(
        answer, image, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True
    )
