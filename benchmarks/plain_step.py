"""The published training step, stated plainly: what `pretrain_gpu.py` compares with.

Each cube is perturbed in numpy and scipy on the CPU, as Models Genesis describes it (elastic
deformation, then one of shuffling in a loop of 10,000 blocks, a Bezier curve, noise boxes), by
worker processes; the net runs in float32, channels first.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

Cube = NDArray[np.float32]


def deform(cube: Cube, rng: np.random.Generator) -> Cube:
    """Displace in-plane by smoothed noise, alpha 991, sigma 8."""
    fields = [991 * ndimage.gaussian_filter(rng.uniform(-1, 1, cube.shape), 8, mode="constant")
              for _ in range(2)]  # fmt: skip
    z, y, x = np.indices(cube.shape).astype(np.float64)
    return ndimage.map_coordinates(cube, (z, y + fields[0], x + fields[1]), order=1, mode="reflect")


def shuffle(cube: Cube, rng: np.random.Generator, num_blocks: int = 10_000) -> Cube:
    """Shuffle the voxels of small blocks, one block after the other."""
    out = cube.copy()
    for _ in range(num_blocks):
        side = [int(rng.integers(1, max(1, n // 10) + 1)) for n in cube.shape]
        low = [int(rng.integers(0, n - s + 1)) for n, s in zip(cube.shape, side, strict=True)]
        block = tuple(slice(a, a + s) for a, s in zip(low, side, strict=True))
        out[block] = rng.permutation(cube[block].ravel()).reshape(side)
    return out


def bend(cube: Cube, rng: np.random.Generator) -> Cube:
    """Map intensities by a Bezier curve of 100,000 points."""
    t = np.linspace(0, 1, 100_000)
    weights = np.array([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x, y = np.stack([(0, 0), *rng.random((2, 2)), (1, 1)]).T @ weights
    x, y = np.sort(x), np.sort(y)
    return np.interp(cube, x, y if rng.random() < 0.5 else y[::-1])


def paint(cube: Cube, rng: np.random.Generator, *, inside: bool) -> Cube:
    """Noise in up to five boxes, or everywhere else."""
    mask = np.zeros(cube.shape, bool)
    for _ in range(5):
        low, high = (1 / 6, 1 / 3) if inside else (3 / 7, 4 / 7)
        side = [int(rng.integers(int(low * n), int(high * n) + 1)) for n in cube.shape]
        corner = [int(rng.integers(3, n - s - 2)) for n, s in zip(cube.shape, side, strict=True)]
        mask[tuple(slice(a, a + s) for a, s in zip(corner, side, strict=True))] = True
        if rng.random() >= 0.95:
            break
    return np.where(mask == inside, rng.random(cube.shape), cube)


class PlainPairs(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """(perturbed, original, label) of crops held in memory as float32 in [0, 1]."""

    def __init__(self, cubes: Cube, labels: NDArray[np.integer]) -> None:
        self.cubes, self.labels = cubes, labels

    def __len__(self) -> int:
        return len(self.cubes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        rng = np.random.default_rng(index)
        original = self.cubes[index]
        perturbed = deform(original, rng)
        kind = rng.integers(4)
        if kind == 0:
            perturbed = shuffle(perturbed, rng)
        elif kind == 1:
            perturbed = bend(perturbed, rng)
        else:
            perturbed = paint(perturbed, rng, inside=kind == 2)
        pair = (torch.from_numpy(np.asarray(c, np.float32))[None] for c in (perturbed, original))
        return (*pair, int(self.labels[index]))


def plain_batches(
    cubes: Cube, labels: NDArray[np.integer], batch_size: int, *, workers: int = 4
) -> DataLoader[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches as the published code makes them."""
    return DataLoader(
        PlainPairs(cubes, labels), batch_size, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
    )  # fmt: skip
