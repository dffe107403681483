"""Whether a crop shows enough of the body to become a class: the content rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.body import body_mask
from pipeline.config import PrepareConfig
from pipeline.place import Floats

_BELOW_WINDOW_HU = np.float32(-1000)
"""Stands for what the window cuts off at its lower end: it is taken for air."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a crop shows, as shares of its voxels."""

    body: float
    """Body, with the air that it encloses; not table, blankets or air outside."""
    tissue: float
    """Tissue: `tissue_hu` and more."""

    def is_enough(self, config: PrepareConfig) -> bool:
        """Whether the shares are within their limits; a crop of no body at all never is enough."""
        within = config.min_tissue <= self.tissue <= config.max_tissue
        return within and self.body > 0 and self.body >= config.min_body


class ContentOfScan:
    """Judges crops of one scan by its thumbnail."""

    def __init__(self, thumbnail: NDArray[np.uint8], box_mm: Floats, config: PrepareConfig) -> None:
        """Find the body.

        thumbnail, box_mm
            (Z, Y, X), and the (2, 3) corners of the box that it shows.
        """
        self.thumbnail, self.box_mm, self.config = thumbnail, box_mm, config
        thin = thumbnail[::2]  # every other slice shows enough of the body
        hu = np.where(thin == 0, _BELOW_WINDOW_HU, self._to_hu(thin))
        mask = body_mask(hu, (box_mm[1] - box_mm[0]) / thin.shape)
        self.body = np.repeat(mask, 2, axis=0)

    def _to_hu(self, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        low, high = self.config.window_hu
        return values * np.float32((high - low) / 255) + np.float32(low)

    def of_crop(self, centre_mm: Floats, step_mm: Floats) -> Content:
        """The content of a base crop.

        centre_mm, step_mm
            (3,) centre and voxel spacing of the crop.

        The thumbnail is sampled on the crop's grid (nearest voxel), for tissue with
        `tissue_depth - 1` more slices towards the head. Outside the box in y and x there is neither
        body nor tissue; along z the box is the scan, whose last slice is repeated.
        """
        config, depth = self.config, self.config.tissue_depth
        index, inside = [], []
        for axis, num in enumerate(config.shape):
            # in-plane every other sample: the thumbnail is coarser than that
            sample = np.arange(0, num + (depth - 1 if axis == 0 else 0), 1 if axis == 0 else 2)
            mm = centre_mm[axis] + (sample - 0.5 * (num - 1)) * step_mm[axis]
            low, high = self.box_mm[:, axis]
            share, n = (mm - low) / (high - low), self.thumbnail.shape[axis]
            index.append(np.clip(np.floor(share * n).astype(int), 0, n - 1))
            inside.append((share >= 0) & (share <= 1))
        in_box = inside[1][:, None] & inside[2]  # (Y, X)
        grid = np.ix_(*index)
        tissue = in_box & (self._to_hu(self.thumbnail[grid]) >= config.tissue_hu)
        num = config.shape[0]
        tissue = np.logical_or.reduce([tissue[d : d + num] for d in range(depth)])
        body = (in_box & self.body[grid])[:num]
        return Content(body=float(body.mean()), tissue=float(tissue.mean()))
