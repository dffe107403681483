"""Which axes of an image are the patient's: here SimpleITK's x, y, z become z, y, x of LPS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

Value = TypeVar("Value")
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Turn:
    """How an image is turned to LPS, as `SimpleITK.DICOMOrient(image, "LPS")` does."""

    axes: tuple[int, int, int]
    """The image's axes (x is 0) that are the patient's z, y and x."""
    flips: tuple[bool, bool, bool]
    """Whether each of them runs the other way than to the head, the back and the left."""

    def sort(self, values_xyz: Sequence[Value]) -> tuple[Value, Value, Value]:
        """(z, y, x) of the patient, of values for the image's axes x, y and z."""
        z, y, x = self.axes
        return values_xyz[z], values_xyz[y], values_xyz[x]

    def view(self, voxels: NDArray[Number]) -> NDArray[Number]:
        """(Z, Y, X) voxels of the patient, of (Z, Y, X) along the image's own axes: no copy."""
        turned = voxels.transpose([2 - axis for axis in self.axes])
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]


def find_turn(direction: NDArray[np.float64]) -> Turn:
    """The turn of an image whose axes x, y, z are the columns of `direction`, (3, 3)."""
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(
        direction.ravel().tolist()
    )
    z, y, x = (
        next(axis for axis in range(3) if letters[axis] in pair) for pair in ("SI", "PA", "LR")
    )
    return Turn(axes=(z, y, x), flips=(letters[z] != "S", letters[y] != "P", letters[x] != "L"))


def direction_of(image: Any) -> NDArray[np.float64]:
    """(3, 3) unit vectors of the axes x, y, z of an image or a reader, as columns.

    Further axes are left out.
    """
    cosines = np.asarray(image.GetDirection(), float)
    sides = math.isqrt(len(cosines))
    return cosines.reshape(sides, sides)[:3, :3]
