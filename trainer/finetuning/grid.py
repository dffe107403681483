"""The voxel grid and value range in which the net sees images, and the way back to an image's grid.

All resampling is done in physical space, so it does not matter how an image was stored, flipped or
oblique.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from store.scans import AIR_HU, PADDING_HU, mean_and_std
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.images import read_image, read_spacing, to_lps
from trainer.finetuning.task import Case, Task

_PERCENTILES = (0.5, 99.5)
_TOLERANCE = 1e-3
_IN_HU = ("ct", "ct-zscore")
_ZSCORES: Final = {"ct": "ct-zscore", "per-image": "zscore"}
"""Intensity of a task that starts from weights pretrained on z-scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How images are resampled and scaled for the net."""

    spacing_mm: tuple[float, float, float] | None
    """(z, y, x); None: every image is resized to `shape`, whatever its spacing."""
    shape: tuple[int, int, int]
    """(Z, Y, X) voxels of the net's input."""
    intensity: str
    """See `FinetuneConfig.intensity`; never "auto"."""
    window_hu: tuple[float, float]
    """HU range mapped to 0..1 for intensity "ct", and to which HU are clipped for "ct-zscore"."""

    @property
    def is_hu(self) -> bool:
        """Whether images are in HU, so that `window_hu` counts."""
        return self.intensity in _IN_HU

    @property
    def is_zscore(self) -> bool:
        """Whether the net sees z-scores."""
        return self.intensity in _ZSCORES.values()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Grid:
        """The grid of a checkpoint, which has lists for tuples."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        return cls(**known)

    def read(self, path: Path, channel: int | None = None) -> sitk.Image:
        """Read an image; TrainError where its values are not finite or do not fit the intensity."""
        image = read_image(path, channel)
        if not np.isfinite(sitk.GetArrayViewFromImage(image)).all():
            raise TrainError(
                f"{path}: has voxels that are NaN or infinite; replace them or remove the case"
            )
        if self.intensity == "unit":
            _check_unit(path, image)
        return image

    def resample(
        self,
        image: sitk.Image,
        *,
        nearest: bool = False,
        centre_mm: tuple[float, float, float] | None = None,
    ) -> sitk.Image:
        """An image turned to LPS and resampled to this grid; its values are not scaled.

        Except 8-bit values, which are divided by 255 for intensity "unit".

        nearest
            Take the nearest voxel's value: the image is a mask.
        centre_mm
            Cut a crop of `shape` voxels around this point (x, y, z), at the image's own spacing if
            the grid has none. Outside the image it is filled with air.
        """
        image = to_lps(image)
        if self.intensity == "unit" and not nearest:
            image = _scale_bytes(image)
        if centre_mm is not None:
            return _crop_around(
                image,
                centre_mm,
                spacing_mm=self.spacing_mm,
                shape=self.shape,
                fill=AIR_HU if self.is_hu else 0,
            )
        if self.spacing_mm is None:
            return resample(image, shape=self.shape, nearest=nearest)
        return resample(image, spacing_mm=self.spacing_mm, nearest=nearest)

    def resample_case(self, case: Case, image: sitk.Image) -> sitk.Image:
        """The image of a case, or its crop, on this grid.

        Raises TrainError where the centre of the crop is not inside the image.
        """
        if case.centre_mm is not None:
            index = np.array(image.TransformPhysicalPointToContinuousIndex(case.centre_mm))
            if (index < -0.51).any() or (index > np.array(image.GetSize()) - 0.49).any():
                raise TrainError(
                    f"{case.image}: x_mm, y_mm, z_mm of {case.name} are outside the image:"
                    f" {', '.join(f'{v:g}' for v in case.centre_mm)}; give LPS coordinates, as in"
                    " DICOM (for RAS, change the signs of x and y)"
                )
        return self.resample(image, centre_mm=case.centre_mm)

    def to_input(self, on_grid: sitk.Image, image: sitk.Image) -> NDArray[np.float16]:
        """(Z, Y, X) values as the net sees them (see `FinetuneConfig.intensity`).

        image
            The image as it was read: its percentiles, or mean and standard deviation, count. As in
            `prepare`, padding outside the field of view is air.
        """
        if not self.is_zscore:
            return self.to_unit(on_grid, image)
        original = sitk.GetArrayViewFromImage(image)
        values = sitk.GetArrayFromImage(on_grid).astype(np.float32)
        if self.is_hu:
            original = np.where(original <= PADDING_HU, AIR_HU, original)
            values = np.clip(values, *self.window_hu)
        mean, std = mean_and_std(original)
        return ((values - mean) / max(std, 1e-6)).astype(np.float16)

    def to_unit(self, image: sitk.Image, complete: sitk.Image | None = None) -> NDArray[np.float16]:
        """(Z, Y, X) values mapped to 0..1; for z-scores, to what they are easiest to look at.

        complete
            The image whose percentiles count, if `image` is a crop of it.
        """
        if self.intensity == "unit":
            image = _scale_bytes(image)
        values = sitk.GetArrayFromImage(image).astype(np.float32)
        ranges = {"unit": (0.0, 1.0)} | dict.fromkeys(_IN_HU, self.window_hu)
        low, high = ranges.get(self.intensity) or np.percentile(
            sitk.GetArrayViewFromImage(image if complete is None else complete), _PERCENTILES
        )
        scaled = (values - low) / max(float(high - low), 1e-6)
        return np.clip(scaled, 0, 1).astype(np.float16)


def choose_grid(
    task: Task,
    config: FinetuneConfig,
    window_hu: tuple[float, float],
    normalise: str = "window",
) -> Grid:
    """The grid from the settings; by default its spacing is the median of the images'.

    window_hu, normalise
        Of the pretraining; used where the settings say nothing.
    """
    spacing = config.spacing_mm
    if spacing is None and task.segments:
        z, y, x = np.median([read_spacing(case.image) for case in task.cases], axis=0).round(3)
        spacing = (float(z), float(y), float(x))
    return Grid(
        spacing_mm=spacing,
        shape=config.shape,
        intensity=choose_intensity(task, config, normalise),
        window_hu=config.window_hu or window_hu,
    )


def choose_intensity(task: Task, config: FinetuneConfig, normalise: str) -> str:
    """How the net sees values: from the settings, or for "auto" by the task and the pretraining."""
    if config.intensity != "auto":
        return config.intensity
    return _ZSCORES.get(task.intensity, task.intensity) if normalise == "zscore" else task.intensity


def resample(
    image: sitk.Image,
    *,
    spacing_mm: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    nearest: bool = False,
) -> sitk.Image:
    """Resample to a (z, y, x) spacing or to a shape, over the same extent.

    Linear interpolation, after smoothing along axes that get coarser; or the nearest voxel's value.
    Between the edge and the centres of the outermost voxels, the value at the edge is repeated.
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
            if coarse > fine * (1 + _TOLERANCE) and image.GetSize()[axis] >= 4:
                sigma = 0.5 * float(np.sqrt(coarse**2 - fine**2))
                image = sitk.RecursiveGaussian(image, sigma, direction=axis)
    corner = image.TransformContinuousIndexToPhysicalPoint(
        (0.5 * new / old - 0.5).tolist()  # the centre of the first voxel; both share their corner
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
        True,  # repeat the value at the edge
    )


def resample_back(values: NDArray[np.float32], grid: sitk.Image, image: sitk.Image) -> sitk.Image:
    """(Z, Y, X) values on the grid of one image, resampled linearly to the grid of another."""
    on_grid = sitk.GetImageFromArray(values)
    on_grid.CopyInformation(grid)
    return sitk.Resample(
        on_grid, image, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32, True
    )


def _crop_around(
    image: sitk.Image,
    centre_mm: Sequence[float],
    *,
    spacing_mm: Sequence[float] | None,
    shape: Sequence[int],
    fill: float,
) -> sitk.Image:
    """A (Z, Y, X) crop of an LPS image around a point (x, y, z) in mm in space.

    The image is smoothed and resampled first if `spacing_mm` (z, y, x) is given. `fill` is the
    value outside it.
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
        fill,
    )


def _scale_bytes(image: sitk.Image) -> sitk.Image:
    """8-bit values divided by 255, unless none is above 1 (a binary image); others unchanged."""
    if image.GetPixelID() != sitk.sitkUInt8 or sitk.GetArrayViewFromImage(image).max() <= 1:
        return image
    scaled: sitk.Image = sitk.Cast(image, sitk.sitkFloat32) / 255
    return scaled


def _check_unit(path: Path, image: sitk.Image) -> None:
    """Raise TrainError where an image does not have the values that intensity "unit" needs."""
    values = sitk.GetArrayViewFromImage(image)
    low, high = float(values.min()), float(values.max())
    if image.GetPixelID() != sitk.sitkUInt8 and (low < -_TOLERANCE or high > 1 + _TOLERANCE):
        raise TrainError(
            f'{path}: has values from {low:g} to {high:g}; intensity "unit" needs 0 to 1, or 8-bit'
            " values; give another --intensity"
        )
