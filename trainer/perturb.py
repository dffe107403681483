"""Models Genesis perturbations of whole batches, on the device where the batch is.

Every function takes cubes (n, 1, Z, Y, X) float32 in [0, 1] and returns new ones; the input
is never written to. Small decisions are drawn on the CPU, so that a GPU is never waited for;
per-voxel noise is drawn on the device. Both depend on (seed, role, epoch, batch) alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.plan import derive_seed

ALPHA_VOXELS = 991.0
SIGMA_VOXELS = 8.0
NUM_BLOCKS = 10_000
MAX_BOXES = 5
NEXT_BOX_PROBABILITY = 0.95
MARGIN_VOXELS = 3
_CURVE_STEPS = 4096
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one batch: `host` for decisions, `device` for noise."""

    host: Generator
    device: Generator

    @classmethod
    def keyed(cls, seed: int, role: str, *index: int, device: torch.device | str = "cpu") -> Draws:
        """Two generators that depend on the key alone (and on the kind of device)."""
        host, noise = Generator(), Generator(device)
        host.manual_seed(derive_seed(seed, role, *index, 0) >> 1)  # CUDA takes 63 bits
        noise.manual_seed(derive_seed(seed, role, *index, 1) >> 1)
        return cls(host, noise)

    def integers(self, low: Tensor | int, high: Tensor | int, *shape: int) -> Tensor:
        """Whole numbers from low to high, both included, on the CPU; bounds broadcast."""
        span = torch.as_tensor(high) - low + 1
        return low + (self.uniform(*shape) * span).long()

    def uniform(self, *shape: int) -> Tensor:
        """From [0, 1), float64, on the CPU."""
        return torch.rand(shape, dtype=torch.float64, generator=self.host)

    def noise(self, like: Tensor) -> Tensor:
        """Uniform noise in [0, 1) of a tensor's shape, on its device."""
        return torch.rand(like.shape, device=like.device, generator=self.device)


# Elastic deformation


@lru_cache(maxsize=32)
def _smooth_modes(length: int, sigma: float, device: torch.device) -> Tensor:
    """(length, modes): what Gaussian smoothing along one axis leaves of white noise.

    Smoothing with zeros beyond the ends is a symmetric matrix; all but about length / sigma
    of its eigenvalues vanish. White noise is white in its eigenvectors, too, so drawing the
    few that matter gives fields of the same covariance as smoothing noise of every voxel.
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
    num: int,
    shape: tuple[int, int, int],
    draws: Draws,
    device: torch.device,
    *,
    alpha: float = ALPHA_VOXELS,
    sigma: float = SIGMA_VOXELS,
) -> Tensor:
    """In-plane displacement fields (num, Z, 2, Y, X) in voxels, along x, then along y.

    That order is what torch samples with, and held to this function and `displace`.

    As published: noise in [-1, 1] at every voxel, smoothed in 3-D with a Gaussian of `sigma`
    voxels (zeros beyond the cube), times `alpha`.
    """
    z, y, x = (_smooth_modes(length, sigma, device) for length in shape)  # (length, modes) each
    field = torch.randn(
        (num, 2, x.shape[1], y.shape[1], z.shape[1]), device=device, generator=draws.device
    )
    field *= alpha / 3**0.5  # the variance of noise in [-1, 1] is 1/3
    field = (field @ z.T).permute(0, 4, 1, 2, 3)  # (n, Z, 2, x modes, y modes)
    field = (field @ y.T).transpose(3, 4)  # (n, Z, 2, Y, x modes)
    return field @ x.T  # (n, Z, 2, Y, X)


def displace(cubes: Tensor, displacement: Tensor) -> Tensor:
    """Cubes read at displaced places, linearly, mirrored at the border (d c b a | a b c d).

    displacement
        (n, Z, 2, Y, X) in voxels, along x, then along y: nothing moves along z.
    """
    num, _, depth, height, width = cubes.shape
    y = (2 * torch.arange(height, device=cubes.device) + 1) / height - 1
    x = (2 * torch.arange(width, device=cubes.device) + 1) / width - 1
    rest = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)))  # (2, Y, X)
    per_voxel = torch.tensor((2 / width, 2 / height), device=cubes.device)[:, None, None]
    grid = torch.addcmul(rest, displacement, per_voxel)  # (n, Z, 2, Y, X); [-1, 1] is the cube
    moved = F.grid_sample(  # slices as images: the 2-D kernel is the fast one
        cubes.reshape(num * depth, 1, height, width),
        grid.reshape(num * depth, 2, height, width).permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved.reshape(cubes.shape)


def deform(
    cubes: Tensor, draws: Draws, *, alpha: float = ALPHA_VOXELS, sigma: float = SIGMA_VOXELS
) -> Tensor:
    """Elastic deformation in-plane."""
    num, _, depth, height, width = cubes.shape
    shape = (depth, height, width)
    field = draw_displacement(num, shape, draws, cubes.device, alpha=alpha, sigma=sigma)
    return displace(cubes, field)


# Local pixel shuffling


@lru_cache(maxsize=8)
def _block_offsets(
    largest: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat offsets of the voxels of every possible block, joined; start and size of each.

    A block with sides (z, y, x) is entry ((z - 1) * Y + y - 1) * X + x - 1.
    """
    offsets = []
    for sides in itertools.product(*(range(1, side + 1) for side in largest)):
        z, y, x = np.indices(sides).reshape(3, -1)
        offsets.append((z * shape[1] + y) * shape[2] + x)
    sizes = np.array([len(part) for part in offsets])
    joined, starts = torch.from_numpy(np.concatenate(offsets)), np.cumsum(sizes) - sizes
    return joined, torch.from_numpy(starts), torch.from_numpy(sizes)


def _flat(zyx: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (zyx[:, 0] * shape[1] + zyx[:, 1]) * shape[2] + zyx[:, 2]


def shuffle_pixels(cubes: Tensor, draws: Draws, *, num_blocks: int = NUM_BLOCKS) -> Tensor:
    """Shuffle the voxels inside many small blocks, sides from 1 to a tenth of the extent.

    As published, each block shuffles the *original* voxels and later blocks overwrite earlier
    ones.
    """
    if not num_blocks:
        return cubes.clone()
    return torch.stack([_shuffle_cube(cube, draws, num_blocks) for cube in cubes])


def _shuffle_cube(cube: Tensor, draws: Draws, num_blocks: int) -> Tensor:
    """Shuffle one (1, Z, Y, X) cube; one at a time stays in the processor's cache.

    All blocks at once: list the voxels of block after block (the members), shuffle the list
    within blocks, and let each voxel take from the last member that covers it.
    """
    shape, volume, device = tuple(cube.shape[1:]), cube.numel(), cube.device
    largest = tuple(max(1, side // 10) for side in shape)
    offsets, starts, sizes = _block_offsets(largest, shape)
    sides = draws.integers(1, torch.tensor(largest), num_blocks, 3)  # (blocks, 3)
    corner = draws.integers(0, torch.tensor(shape) - sides, num_blocks, 3)  # (blocks, 3)
    kind = _flat(sides - 1, largest)
    size = sizes[kind]
    num_members = int(size.sum())
    entry = starts[kind] - (size.cumsum(0) - size)  # of the first member, less its place

    # A member's key is block | random bits | voxel: one sort shuffles within every block.
    voxel_bits = volume.bit_length()
    random_bits = min(30, 62 - voxel_bits - num_blocks.bit_length())
    head = (torch.arange(num_blocks) << (random_bits + voxel_bits)) + _flat(corner, shape)
    size, head, entry, offsets = (part.to(device) for part in (size, head, entry, offsets))
    place = torch.arange(num_members, device=device)
    keys = entry.repeat_interleave(size, output_size=num_members).add_(place)
    keys = offsets.take(keys).add_(head.repeat_interleave(size, output_size=num_members))
    voxel = keys & ((1 << voxel_bits) - 1)
    noise = torch.empty_like(keys, dtype=torch.int32)
    noise.random_(0, 1 << random_bits, generator=draws.device)
    keys += noise.long() << voxel_bits
    source = _sort(keys).bitwise_and_((1 << voxel_bits) - 1)

    last = torch.full((volume,), -1, device=device)
    last.scatter_reduce_(0, voxel, place, "amax")
    shuffled = cube.take(source.take(last.clamp_min(0))).reshape(cube.shape)
    return torch.where(last.reshape(cube.shape) < 0, cube, shuffled)


def _sort(keys: Tensor) -> Tensor:
    """Ascending; on the CPU by numpy, whose vectorised sort is many times as fast as torch's."""
    if keys.device.type != "cpu":
        return keys.sort().values
    keys.numpy().sort()
    return keys


# Non-linear intensity


def draw_curves(num: int, draws: Draws) -> Tensor:
    """(num, 4096) intensities for inputs 0 to 1 in equal steps; monotone, half of them falling.

    A cubic Bezier curve from (0, 0) to (1, 1) with two random control points in the unit
    square; both coordinates rise along such a curve. Falling: y runs backwards.
    """
    points = draws.uniform(num, 2, 2)  # (n, control point, coordinate)
    falling = draws.uniform(num) < 0.5
    t = torch.linspace(0, 1, _CURVE_STEPS, dtype=torch.float64)
    weights = torch.stack((3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2))  # (control point, t)
    x, y = torch.einsum("npc,pt->cnt", points, weights) + t**3  # (n, t) each
    y = torch.where(falling[:, None], y.flip(1), y)
    x = x.contiguous()
    high = torch.searchsorted(x, t.expand(num, -1).contiguous()).clamp(1, _CURVE_STEPS - 1)
    x_low, x_high = x.gather(1, high - 1), x.gather(1, high)
    y_low, y_high = y.gather(1, high - 1), y.gather(1, high)
    share = ((t - x_low) / (x_high - x_low).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(y_low, y_high, share).float()


def bend_intensity(cubes: Tensor, draws: Draws) -> Tensor:
    """Send every intensity through its cube's curve, to the nearest of 4096 steps (half a HU)."""
    num = len(cubes)
    curves = draw_curves(num, draws).to(cubes.device)  # (n, steps)
    start = torch.arange(num, device=cubes.device)[:, None] * _CURVE_STEPS + 0.5
    place = torch.add(start, cubes.reshape(num, -1).double(), alpha=_CURVE_STEPS - 1)
    return curves.take(place.long()).reshape(cubes.shape)


# In-painting and out-painting


def _draw_boxes(low: Tensor, high: Tensor, count: Tensor, cubes: Tensor, draws: Draws) -> Tensor:
    """(n, 1, Z, Y, X) bool: inside any of the cube's first `count` boxes, sides low to high."""
    num, _, *shape = cubes.shape
    extent = torch.tensor(shape)
    side = draws.integers(low, high, num, MAX_BOXES, 3)
    margin = torch.minimum(torch.tensor(MARGIN_VOXELS), (extent - side) // 2)
    corner = draws.integers(margin, extent - side - margin, num, MAX_BOXES, 3)
    unused = torch.arange(MAX_BOXES) >= count[:, None]  # (n, boxes)
    side = side.masked_fill(unused[:, :, None], 0)
    inside = [
        (torch.arange(length) >= corner[:, :, axis, None])
        & (torch.arange(length) < (corner + side)[:, :, axis, None])
        for axis, length in enumerate(shape)
    ]  # (n, boxes, length) of each axis: a box is their product
    z, y, x = (part.to(cubes.device, torch.float32) for part in inside)
    return torch.einsum("nbz,nby,nbx->nzyx", z, y, x)[:, None] > 0


def _draw_counts(num: int, first: int, draws: Draws) -> Tensor:
    """(num,) boxes: `first`, then each next one with probability 0.95, up to five."""
    goes_on = draws.uniform(num, MAX_BOXES - first) < NEXT_BOX_PROBABILITY
    return first + goes_on.long().cumprod(1).sum(1)


def paint_inside(cubes: Tensor, draws: Draws) -> Tensor:
    """Noise in up to five boxes with sides of 1/6 to 1/3 of the extent (in-painting)."""
    extent = torch.tensor(cubes.shape[2:])
    count = _draw_counts(len(cubes), 0, draws)
    boxes = _draw_boxes((extent // 6).clamp_min(1), (extent // 3).clamp_min(1), count, cubes, draws)
    return torch.where(boxes, draws.noise(cubes), cubes)


def paint_outside(cubes: Tensor, draws: Draws) -> Tensor:
    """Noise but for one to five boxes with sides of 3/7 to 4/7 of the extent (out-painting)."""
    extent = torch.tensor(cubes.shape[2:])
    count = _draw_counts(len(cubes), 1, draws)
    boxes = _draw_boxes(extent - 4 * extent // 7, extent - 3 * extent // 7, count, cubes, draws)
    return torch.where(boxes, cubes, draws.noise(cubes))


# The mix

Perturbation = Callable[[Tensor, Draws], Tensor]


def draw_kinds(num: int, draws: Draws, num_kinds: int = 4) -> Tensor:
    """(num,) which perturbation each cube gets, all equally likely, on the CPU."""
    return draws.integers(0, num_kinds - 1, num)


def perturb(cubes: Tensor, draws: Draws, *, num_blocks: int = NUM_BLOCKS) -> Tensor:
    """Elastic deformation, then exactly one of the four others for each cube."""

    def shuffle(part: Tensor, draws: Draws) -> Tensor:
        return shuffle_pixels(part, draws, num_blocks=num_blocks)

    kinds: tuple[Perturbation, ...] = (shuffle, bend_intensity, paint_inside, paint_outside)
    perturbed = deform(cubes, draws)
    chosen = draw_kinds(len(cubes), draws, len(kinds))
    for kind, change in enumerate(kinds):
        members = torch.nonzero(chosen == kind).flatten().to(cubes.device)
        if len(members):
            perturbed[members] = change(perturbed[members], draws)
    return perturbed
