"""Whether a crop shows enough of a body to become a class: the content rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.place import Floats


def has_content(
    thumbnail: NDArray[np.uint8],
    box: Floats,
    centre_mm: Floats,
    step_mm: Floats,
    config: PrepareConfig,
) -> bool:
    """Whether a base crop has enough content, and a share of tissue within the limits.

    thumbnail, box
        The scan's thumbnail (Z, Y, X), and the (2, 3) corners in mm of the box that it shows.
    centre_mm, step_mm
        (3,) centre and voxel spacing of the crop.

    The thumbnail is sampled on the crop's grid (nearest voxel), with `tissue_depth - 1` more
    slices towards the head. Outside the box in y and x there is neither content nor tissue; along
    z the box is the scan, whose last slice is repeated.
    """
    depth = config.tissue_depth
    index, inside = [], []
    for axis, num in enumerate(config.shape):
        # in-plane every other sample: the thumbnail is coarser than that
        sample = np.arange(0, num + (depth - 1 if axis == 0 else 0), 1 if axis == 0 else 2)
        mm = centre_mm[axis] + (sample - 0.5 * (num - 1)) * step_mm[axis]
        share = (mm - box[0, axis]) / (box[1, axis] - box[0, axis])
        n = thumbnail.shape[axis]
        index.append(np.clip(np.floor(share * n).astype(int), 0, n - 1))
        inside.append((share >= 0) & (share <= 1))
    low, high = config.window_hu
    hu = thumbnail[np.ix_(*index)] * ((high - low) / 255) + low
    in_box = inside[1][:, None] & inside[2]  # (Y, X)
    tissue = in_box & (hu >= config.tissue_hu)
    num = config.shape[0]
    tissue = np.logical_or.reduce([tissue[d : d + num] for d in range(depth)])
    content = (in_box & (hu >= config.air_hu))[:num].mean()
    return bool(
        config.min_tissue <= tissue.mean() <= config.max_tissue and content >= config.min_content
    )
