"""Smooth, invertible maps between a scan and the atlas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Final, NamedTuple

import numpy as np

from pipeline.phantom.atlas import TRUNK
from pipeline.phantom.solids import Field, Point, boxes, rounded

STEEPEST: Final = 1.72  # slope of (1 - r^2)^3, at most


class Shift(NamedTuple):
    """A local, smooth displacement: `push` at the centre, less around it, none beyond the radii.

    All in mm of the atlas. Invertible while |push| < smallest radius / STEEPEST.
    """

    centre: Point
    radii: Point
    push: Point

    def displacement(self, z: Field, y: Field, x: Field) -> tuple[Field, Field, Field]:
        """What to add to positions."""
        u, v, w = (
            (axis - middle) * (1 / radius)
            for axis, middle, radius in zip((z, y, x), self.centre, self.radii, strict=True)
        )
        share = np.maximum(1 - (u * u + v * v + w * w), 0)
        share *= share * share
        return self.push[0] * share, self.push[1] * share, self.push[2] * share

    def undo(self, z: Field, y: Field, x: Field) -> tuple[Field, Field, Field]:
        """Positions that the displacement moves to (z, y, x)."""
        here = z, y, x
        for _ in range(30):  # contracts by more than half
            dz, dy, dx = self.displacement(*here)
            here = z - dz, y - dy, x - dx
        return here

    def boxes(self, z: Field, y: Field, x: Field) -> Iterator[tuple[slice, ...] | EllipsisType]:
        """The part of a block of positions that may move: none or one box of a 3-D block."""
        if z.ndim == 3:
            low, high = np.subtract(self.centre, self.radii), np.add(self.centre, self.radii)
            for _, box in boxes(low[None], high[None], z, y, x):
                yield box
        else:
            yield ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Deformation:
    """A smooth, invertible map between scan and atlas; all lengths in mm.

    To the atlas: shift, rotate in-plane and scale; then change the thickness of fat under the skin;
    then add a few long sine waves, too small to fold the body; then move single organs.
    """

    centre_mm: Point  # where the atlas's origin lies in the scan
    turn_rad: float  # in-plane rotation of the patient
    scale: Point  # patient size over atlas size
    fat: float  # stretch of the outer body: -0.5 lean to 0.65 stout
    waves: tuple[tuple[Point, float, Point], ...]  # wave vector in 1/mm, phase, amplitude in mm
    shifts: tuple[Shift, ...] = ()  # one after the other

    def to_atlas(self, z: Field, y: Field, x: Field) -> tuple[Field, Field, Field]:
        """Atlas coordinates of scan coordinates; the arrays may broadcast."""
        cos, sin = float(np.cos(self.turn_rad)), float(np.sin(self.turn_rad))
        z, y, x = z - self.centre_mm[0], y - self.centre_mm[1], x - self.centre_mm[2]
        y, x = (cos * y + sin * x) * (1 / self.scale[1]), (cos * x - sin * y) * (1 / self.scale[2])
        z = z * (1 / self.scale[0])
        y, x = self._radially(z, y, x, stretch=False)
        dz, dy, dx = self._wave(z, y, x)
        z, y, x = z + dz, y + dy, x + dx
        if self.shifts:
            z, y, x = (np.array(axis) for axis in np.broadcast_arrays(z, y, x))
        for shift in self.shifts:
            for box in shift.boxes(z, y, x):
                part = shift.displacement(z[box], y[box], x[box])
                for axis, moved in zip((z, y, x), part, strict=True):
                    axis[box] += moved
        return z, y, x

    def from_atlas(self, z: Field, y: Field, x: Field) -> tuple[Field, Field, Field]:
        """Inverse of `to_atlas`, exact to a micrometre."""
        for shift in reversed(self.shifts):
            z, y, x = shift.undo(z, y, x)
        z0, y0, x0 = z, y, x
        for _ in range(60):  # the waves contract by more than half
            dz, dy, dx = self._wave(z, y, x)
            z, y, x = z0 - dz, y0 - dy, x0 - dx
        y, x = self._radially(z, y, x, stretch=True)
        z, y, x = z * self.scale[0], y * self.scale[1], x * self.scale[2]
        cos, sin = float(np.cos(self.turn_rad)), float(np.sin(self.turn_rad))
        y, x = cos * y - sin * x, sin * y + cos * x
        return z + self.centre_mm[0], y + self.centre_mm[1], x + self.centre_mm[2]

    def _wave(self, z: Field, y: Field, x: Field) -> list[Field]:
        shifts = [np.zeros((), z.dtype)] * 3
        for (kz, ky, kx), phase, amplitude in self.waves:
            wave = np.sin(kz * z + (ky * y + (kx * x + phase)))
            shifts = [s + a * wave for s, a in zip(shifts, amplitude, strict=True)]
        return shifts

    def _radially(self, z: Field, y: Field, x: Field, *, stretch: bool) -> tuple[Field, Field]:
        """Move points along rays from the trunk's middle, beyond 0.84 of the way to the skin.

        A distance t beyond that radius in the patient becomes t - c(sqrt(t^2 + w^2) - w).
        """
        inner, w, c = 0.84, 0.05, self.fat
        exact = z.astype(np.float64)
        width, depth, middle = (profile(exact).astype(z.dtype) for profile in TRUNK)
        y = y - middle
        t = np.maximum(rounded(x / width, y / depth) - inner, 0)
        if stretch:
            a, rest = t - c * w, 1 - c * c
            moved = (a + c * np.sqrt(a * a + w * w * rest)) / rest
        else:
            moved = t - c * (np.sqrt(t * t + w * w) - w)
        ratio = (inner + moved) / (inner + t)
        return y * ratio + middle, x * ratio
