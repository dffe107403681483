"""Elastic deformation in-plane, by smoothed random displacement fields."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.device import upload
from trainer.transforms.draws import Draws

ALPHA_VOXELS = 991.0
SIGMA_VOXELS = 8.0
_NEGLIGIBLE = 1e-3


@lru_cache(maxsize=32)
def _smooth_modes(length: int, sigma: float, device: torch.device) -> Tensor:
    """Eigenvectors of Gaussian smoothing along one axis, times their eigenvalues: (length, modes).

    Smoothing with zeros beyond the ends is a symmetric matrix, and all but about length / sigma of
    its eigenvalues are close to zero. White noise is also white in the basis of eigenvectors.
    Drawing only the large modes therefore gives fields with the same covariance as smoothed noise.
    """
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    matrix = np.where(distance <= radius, taps[radius + np.minimum(distance, radius)], 0.0)
    values, vectors = np.linalg.eigh(matrix)
    kept = np.abs(values) > _NEGLIGIBLE * np.abs(values).max()
    modes = (vectors[:, kept] * values[kept]).astype(np.float32)
    return torch.from_numpy(modes).to(device)


def draw_displacement(
    shape: tuple[int, int, int],
    draws: Draws,
    *,
    alpha: float = ALPHA_VOXELS,
    sigma: float = SIGMA_VOXELS,
) -> Tensor:
    """Draw in-plane displacement fields (n, Z, 2, Y, X) in voxels, along x, then along y.

    x comes first because `torch.nn.functional.grid_sample` wants it so; only this function and
    `displace` use that order.

    As published: noise in [-1, 1] at every voxel, smoothed in 3-D with a Gaussian of `sigma`
    voxels (zeros beyond the crop), times `alpha`.
    """
    z, y, x = (_smooth_modes(length, sigma, draws.device) for length in shape)  # (length, modes)
    field = draws.normal(2, x.shape[1], y.shape[1], z.shape[1])
    field *= alpha / 3**0.5  # the variance of noise in [-1, 1] is 1/3
    field = (field @ z.T).permute(0, 4, 1, 2, 3)  # (n, Z, 2, x modes, y modes)
    field = (field @ y.T).transpose(3, 4)  # (n, Z, 2, Y, x modes)
    return field @ x.T  # (n, Z, 2, Y, X)


def displace(crops: Tensor, displacement: Tensor) -> Tensor:
    """Sample crops at displaced positions: linear, mirrored at the border (d c b a | a b c d).

    displacement
        (n, Z, 2, Y, X) in voxels, along x, then along y; there is none along z.
    """
    num, _, depth, height, width = crops.shape
    y = (2 * torch.arange(height, device=crops.device) + 1) / height - 1
    x = (2 * torch.arange(width, device=crops.device) + 1) / width - 1
    rest = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)))  # (2, Y, X)
    per_voxel = upload(torch.tensor((2 / width, 2 / height)), crops.device)[:, None, None]
    grid = torch.addcmul(rest, displacement, per_voxel)  # (n, Z, 2, Y, X); [-1, 1] is the crop
    moved = F.grid_sample(  # slices as images: the 2-D kernel is the fast one
        crops.reshape(num * depth, 1, height, width),
        grid.reshape(num * depth, 2, height, width).permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved.reshape(crops.shape)


def deform(crops: Tensor, draws: Draws) -> Tensor:
    """Deform each crop elastically in-plane."""
    _, _, depth, height, width = crops.shape
    return displace(crops, draw_displacement((depth, height, width), draws))
