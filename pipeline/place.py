"""Where classes lie in scans, in mm; which places fit, and which are too close to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from store.reader import PatchStore

Floats: TypeAlias = NDArray[np.float64]
_ROUNDING_MM = 1e-7
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Scans:
    """N scans as discovery sees them. Axes are z, y, x."""

    split: NDArray[np.uint8]
    """(N,) 0 train, 1 validation."""
    spacing_mm: Floats
    """(N, 3)."""
    size: NDArray[np.int32]
    """(N, 3) voxels."""
    frame_mm: Floats
    """(N, 2, 3) low and high corner of the frame box."""
    embedding: NDArray[np.float32]
    """(N, D)."""
    thumbnail: Callable[[int], NDArray[np.uint8]]
    """Reads one scan's thumbnail, (Z, Y, X)."""

    def __len__(self) -> int:
        return len(self.split)


def crop_step_mm(config: PrepareConfig, spacing_mm: Floats) -> Floats:
    """(..., 3) voxel spacing of the base crop in scans of the given spacing (..., 3)."""
    if config.spacing_mm == "native":
        return spacing_mm
    return np.broadcast_to(np.asarray(config.spacing_mm), spacing_mm.shape)


class Geometry:
    """Where a class's crops lie in each of N scans, in mm.

    Attributes, all (N, 3) in mm unless noted: `step_mm` and `extent_mm`, voxel spacing and size of
    the base crop; `last_mm`, centre of the last voxel; `low_mm` and `unit_mm`, start and unit of
    the frame; `base_reach` and `full_reach` (3,), from a class's centre to the outermost sample of
    the base crop and of the largest drawn crop, in steps; `proportion` (2,), y and x of a crop over
    the smaller of the two.
    """

    def __init__(self, scans: Scans, config: PrepareConfig) -> None:
        self.config = config
        self.split = scans.split
        self.spacing_mm = scans.spacing_mm
        self.step_mm = crop_step_mm(config, scans.spacing_mm)  # (N, 3)
        self.extent_mm = self.step_mm * config.shape  # (N, 3), of the base crop
        self.last_mm = (scans.size - 1) * scans.spacing_mm  # (N, 3), the last voxels' centres
        if config.frame == "voxel":
            self.low_mm = np.zeros_like(self.spacing_mm)
            self.unit_mm = self.spacing_mm
        else:
            self.low_mm = scans.frame_mm[:, 0]
            self.unit_mm = scans.frame_mm[:, 1] - scans.frame_mm[:, 0]
        # half the distance between the outermost samples
        sides = np.asarray(config.shape, np.float64)
        self.proportion = sides[1:] / sides[1:].min()
        self.base_reach = 0.5 * (sides - 1)
        largest = np.array([sides[0], *(config.side_steps[1] - 1) * self.proportion])
        shift = max(abs(config.shift_steps[0]), abs(config.shift_steps[1] - 1))
        drawn = 0.5 * largest * (sides - 1) / sides + np.array([0, shift, shift])
        self.full_reach: Floats = self.base_reach
        if config.scales > 1:
            self.full_reach = np.maximum(self.base_reach, drawn)

    def centre_mm(self, centre: Floats, scans: Any = slice(None)) -> Floats:
        """(..., 3) position of one coordinate in every scan, or in those given."""
        position: Floats = self.low_mm[scans] + centre * self.unit_mm[scans]
        return position

    def fits(self, place_mm: Floats, scans: Any = slice(None)) -> NDArray[np.bool_]:
        """(n,) whether scans contain the base crop and, for training, every drawn crop.

        place_mm, scans
            (n, 3) centres of the base crop, and (n,) the scans that they are in; all by default.
        """
        reach = self._reach_mm(scans)
        above = place_mm - reach >= -_ROUNDING_MM
        below = place_mm + reach <= self.last_mm[scans] + _ROUNDING_MM
        return np.asarray((above & below).all(axis=1))

    def is_large_enough(self) -> NDArray[np.bool_]:
        """(N,) whether the crops of a class fit into the scan anywhere."""
        needed_mm = 2 * self._reach_mm(slice(None))
        return np.asarray((needed_mm <= self.last_mm + _ROUNDING_MM).all(axis=1))

    def _reach_mm(self, scans: Any) -> Floats:
        """(n, 3) from a class's centre to the outermost sample of its crops."""
        train = self.split[scans][:, None] == 0
        reach: Floats = np.where(train, self.full_reach, self.base_reach) * self.step_mm[scans]
        return reach

    def draw_centre(self, reference: int, rng: np.random.Generator) -> Floats | None:
        """A random coordinate whose crops lie inside the reference, or None where none fits."""
        border = np.asarray(self.config.border) * self.spacing_mm[reference]
        reach = np.maximum(
            self.full_reach * self.step_mm[reference],
            self.extent_mm[reference] / 2 + border - self.spacing_mm[reference] / 2,
        )
        low, high = reach, self.last_mm[reference] - reach
        if self.config.frame != "voxel":
            low = np.maximum(low, self.low_mm[reference])
            high = np.minimum(high, self.low_mm[reference] + self.unit_mm[reference])
        if (low > high).any():
            return None
        least = (low - self.low_mm[reference]) / self.unit_mm[reference]
        most = (high - self.low_mm[reference]) / self.unit_mm[reference]
        if self.config.frame == "voxel":
            # the first corner at a whole voxel: at native spacing nothing is interpolated
            half = 0.5 * (np.asarray(self.config.shape) - 1)
            first = np.ceil(least - half).astype(int)
            last = np.floor(most - half).astype(int)
            if (first > last).any():
                return None
            return np.asarray(rng.integers(first, last + 1) + half, np.float64)
        return np.asarray(rng.uniform(least, most))


def load_scans(store: PatchStore, *, embedding: NDArray[np.float32] | None = None) -> Scans:
    """What the store knows of its scans; without embeddings unless these are given."""
    thumbnails = store.thumbnails
    if embedding is None:
        embedding = np.empty((len(store.scans.id), 0), np.float32)
    return Scans(
        split=store.scans.split,
        spacing_mm=store.scans.spacing_mm,
        size=store.scans.size,
        frame_mm=store.scans.frame_mm,
        embedding=embedding,
        thumbnail=lambda row: np.asarray(thumbnails.read([row])[0]),
    )


def count_too_small(store: PatchStore, config: PrepareConfig) -> int:
    """Surveyed scans in which the crops of a class do not fit anywhere."""
    return int((~Geometry(load_scans(store), config).is_large_enough()).sum())


class TakenPlaces:
    """Where the classes that were already found lie in each scan."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.scans = np.empty(0, np.intp)
        self.place_mm = np.empty((0, 3))

    def add(self, scans: NDArray[np.intp], place_mm: Floats) -> None:
        """Add the n members of a class: (n,) scans, (n, 3) places."""
        self.scans = np.concatenate([self.scans, scans])
        self.place_mm = np.concatenate([self.place_mm, place_mm])

    def are_too_close(self, scans: NDArray[np.intp], place_mm: Floats) -> bool:
        """Whether, in any scan, one of these places is too close to a place taken.

        Base crops overlap by more than `max_overlap`, or are not separated by `separation_steps`.
        """
        geometry, config = self.geometry, self.geometry.config
        new_mm = np.full((len(geometry.split), 3), np.nan)
        new_mm[scans] = place_mm
        shared = np.isfinite(new_mm[self.scans, 0])
        rows = self.scans[shared]
        apart = np.abs(self.place_mm[shared] - new_mm[rows])
        overlap = np.clip(1 - apart / geometry.extent_mm[rows], 0, 1).prod(axis=1)
        steps = (apart / geometry.step_mm[rows]).max(axis=1)
        too_close = overlap > config.max_overlap + _ROUNDING
        return bool((too_close | (steps < config.separation_steps - _ROUNDING)).any())
