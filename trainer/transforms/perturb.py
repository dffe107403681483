"""Perturbations of whole batches, on the device where the batch is.

Every function takes cubes (n, 1, Z, Y, X) float32 in [0, 1] and returns new ones; the input
is never written to. Small decisions are drawn on the CPU, so that a GPU is never waited for;
per-voxel noise is drawn on the device. Every cube has random numbers of its own: what it gets
depends on its key alone, not on the batch or the process that it is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.data.plan import derive_seeds
from trainer.nets.blocks import join_blocks, split_blocks

ALPHA_VOXELS = 991.0
SIGMA_VOXELS = 8.0
NUM_BLOCKS = 10_000
MAX_BOXES = 5
NEXT_BOX_PROBABILITY = 0.95
MARGIN_VOXELS = 3
NUM_SWAPS = 10
_SWAP_TRIES = 16
_CURVE_STEPS = 4096
_NEGLIGIBLE = 1e-3


class Draws:
    """The random numbers of a batch, of each cube its own: decisions, and noise on the device.

    Methods return (n, *shape) for n cubes.
    """

    def __init__(self, host: Sequence[Generator], noise: Sequence[Generator]) -> None:
        self._host, self._noise = host, noise
        self.device = noise[0].device if noise else torch.device("cpu")

    @classmethod
    def keyed(
        cls,
        seed: int,
        role: str,
        *index: int,
        rows: Iterable[int],
        device: torch.device | str = "cpu",
    ) -> Draws:
        """For cubes of these rows; each cube's numbers follow from (seed, role, index, row).

        Noise depends on the kind of device, too.
        """
        host, noise = [], []
        for row in rows:
            one, other = derive_seeds(seed, role, *index, int(row))
            host.append(Generator().manual_seed(one))
            noise.append(Generator(device).manual_seed(other))
        return cls(host, noise)

    def __len__(self) -> int:
        return len(self._host)

    def of(self, members: Iterable[int]) -> Draws:
        """Those of some cubes; they go on from where they are."""
        chosen = list(members)
        return Draws([self._host[i] for i in chosen], [self._noise[i] for i in chosen])

    def integers(self, low: Tensor | int, high: Tensor | int, *shape: int) -> Tensor:
        """Whole numbers from low to high, both included, on the CPU; bounds broadcast."""
        span = torch.as_tensor(high) - low + 1
        return low + (self.uniform(*shape) * span).long()

    def uniform(self, *shape: int) -> Tensor:
        """From [0, 1), float64, on the CPU."""
        found = torch.empty((len(self), *shape), dtype=torch.float64)
        for part, generator in zip(found, self._host, strict=True):
            part.uniform_(generator=generator)
        return found

    def noise(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32, on the device."""
        found = torch.empty((len(self), *shape), device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.uniform_(generator=generator)
        return found

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, on the device."""
        found = torch.empty((len(self), *shape), device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.normal_(generator=generator)
        return found

    def bits(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high - 1, int32, on the device."""
        found = torch.empty((len(self), *shape), dtype=torch.int32, device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.random_(0, high, generator=generator)
        return found


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
    shape: tuple[int, int, int],
    draws: Draws,
    *,
    alpha: float = ALPHA_VOXELS,
    sigma: float = SIGMA_VOXELS,
) -> Tensor:
    """In-plane displacement fields (n, Z, 2, Y, X) in voxels, along x, then along y.

    That order is what torch samples with, and held to this function and `displace`.

    As published: noise in [-1, 1] at every voxel, smoothed in 3-D with a Gaussian of `sigma`
    voxels (zeros beyond the cube), times `alpha`.
    """
    z, y, x = (_smooth_modes(length, sigma, draws.device) for length in shape)  # (length, modes)
    field = draws.normal(2, x.shape[1], y.shape[1], z.shape[1])
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
    _, _, depth, height, width = cubes.shape
    return displace(
        cubes, draw_displacement((depth, height, width), draws, alpha=alpha, sigma=sigma)
    )


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
    return torch.stack([_shuffle_cube(c, draws.of([i]), num_blocks) for i, c in enumerate(cubes)])


def _shuffle_cube(cube: Tensor, draws: Draws, num_blocks: int) -> Tensor:
    """Shuffle one (1, Z, Y, X) cube; one at a time stays in the processor's cache.

    All blocks at once: list the voxels of block after block (the members), shuffle the list
    within blocks, and let each voxel take from the last member that covers it.
    """
    shape, volume, device = tuple(cube.shape[1:]), cube.numel(), cube.device
    largest = tuple(max(1, side // 10) for side in shape)
    offsets, starts, sizes = _block_offsets(largest, shape)
    sides = draws.integers(1, torch.tensor(largest), num_blocks, 3)[0]  # (blocks, 3)
    corner = draws.integers(0, torch.tensor(shape) - sides, num_blocks, 3)[0]  # (blocks, 3)
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
    keys += draws.bits(1 << random_bits, num_members)[0].long() << voxel_bits
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


def draw_curves(draws: Draws) -> Tensor:
    """(n, 4096) intensities for inputs 0 to 1 in equal steps; monotone, half of them falling.

    A cubic Bezier curve from (0, 0) to (1, 1) with two random control points in the unit
    square; both coordinates rise along such a curve. Falling: y runs backwards.
    """
    points = draws.uniform(2, 2)  # (n, control point, coordinate)
    falling = draws.uniform() < 0.5
    t = torch.linspace(0, 1, _CURVE_STEPS, dtype=torch.float64)
    weights = torch.stack((3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2))  # (control point, t)
    x, y = torch.einsum("npc,pt->cnt", points, weights) + t**3  # (n, t) each
    y = torch.where(falling[:, None], y.flip(1), y)
    x = x.contiguous()
    high = torch.searchsorted(x, t.expand(len(x), -1).contiguous()).clamp(1, _CURVE_STEPS - 1)
    x_low, x_high = x.gather(1, high - 1), x.gather(1, high)
    y_low, y_high = y.gather(1, high - 1), y.gather(1, high)
    share = ((t - x_low) / (x_high - x_low).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(y_low, y_high, share).float()


def bend_intensity(cubes: Tensor, draws: Draws) -> Tensor:
    """Send every intensity through its cube's curve, to the nearest of 4096 steps (half a HU)."""
    num = len(cubes)
    curves = draw_curves(draws).to(cubes.device)  # (n, steps)
    start = torch.arange(num, device=cubes.device)[:, None] * _CURVE_STEPS + 0.5
    place = torch.add(start, cubes.reshape(num, -1).double(), alpha=_CURVE_STEPS - 1)
    return curves.take(place.long()).reshape(cubes.shape)


# In-painting and out-painting


def _draw_boxes(low: Tensor, high: Tensor, count: Tensor, cubes: Tensor, draws: Draws) -> Tensor:
    """(n, 1, Z, Y, X) bool: inside any of the cube's first `count` boxes, sides low to high."""
    shape = cubes.shape[2:]
    extent = torch.tensor(shape)
    side = draws.integers(low, high, MAX_BOXES, 3)
    margin = torch.minimum(torch.tensor(MARGIN_VOXELS), (extent - side) // 2)
    corner = draws.integers(margin, extent - side - margin, MAX_BOXES, 3)
    unused = torch.arange(MAX_BOXES) >= count[:, None]  # (n, boxes)
    side = side.masked_fill(unused[:, :, None], 0)
    inside = [
        (torch.arange(length) >= corner[:, :, axis, None])
        & (torch.arange(length) < (corner + side)[:, :, axis, None])
        for axis, length in enumerate(shape)
    ]  # (n, boxes, length) of each axis: a box is their product
    z, y, x = (part.to(cubes.device, torch.float32) for part in inside)
    return torch.einsum("nbz,nby,nbx->nzyx", z, y, x)[:, None] > 0


def _draw_counts(first: int, draws: Draws) -> Tensor:
    """(n,) boxes: `first`, then each next one with probability 0.95, up to five."""
    goes_on = draws.uniform(MAX_BOXES - first) < NEXT_BOX_PROBABILITY
    return first + goes_on.long().cumprod(1).sum(1)


def paint_inside(cubes: Tensor, draws: Draws) -> Tensor:
    """Noise in up to five boxes with sides of 1/6 to 1/3 of the extent (in-painting)."""
    extent = torch.tensor(cubes.shape[2:])
    count = _draw_counts(0, draws)
    boxes = _draw_boxes((extent // 6).clamp_min(1), (extent // 3).clamp_min(1), count, cubes, draws)
    return torch.where(boxes, draws.noise(*cubes.shape[1:]), cubes)


def paint_outside(cubes: Tensor, draws: Draws) -> Tensor:
    """Noise but for one to five boxes with sides of 3/7 to 4/7 of the extent (out-painting)."""
    extent = torch.tensor(cubes.shape[2:])
    count = _draw_counts(1, draws)
    boxes = _draw_boxes(extent - 4 * extent // 7, extent - 3 * extent // 7, count, cubes, draws)
    return torch.where(boxes, cubes, draws.noise(*cubes.shape[1:]))


# Patch swaps


def swap_patches(cubes: Tensor, draws: Draws, *, num_swaps: int = NUM_SWAPS) -> Tensor:
    """Swap pairs of disjoint patches, one pair after the other (context restoration).

    Both patches of a pair have the same sides, each from an eighth to a quarter of the extent.
    """
    shape = tuple(cubes.shape[2:])
    extent = torch.tensor(shape)
    low, high = (extent // 8).clamp_min(1), (extent // 4).clamp_min(1)
    side = draws.integers(low, high, num_swaps, 3)  # (n, swaps, 3)
    corners = draws.integers(0, (extent - side)[:, :, None, None], num_swaps, _SWAP_TRIES, 2, 3)
    apart = (corners[..., 0, :] - corners[..., 1, :]).abs() >= side[:, :, None]
    first = apart.any(-1).int().argmax(-1)  # (n, swaps): the first of the tries that is disjoint
    corners = corners.take_along_dim(first[:, :, None, None, None], 2)[:, :, 0]  # (n, swaps, 2, 3)

    place = torch.cartesian_prod(*(torch.arange(int(length)) for length in high))  # (voxels, 3)
    inside = (place < side[:, :, None]).all(-1)  # (n, swaps, voxels)
    volume = cubes[0].numel()
    start = _flat(corners.reshape(-1, 3), shape).reshape(*corners.shape[:3], 1)
    index = (start + _flat(place, shape)).masked_fill(~inside[:, :, None], volume)
    index = index.to(cubes.device)  # (n, swaps, 2, voxels); `volume` is a voxel to spare
    swapped = F.pad(cubes.reshape(len(cubes), -1), (0, 1))
    for one, other in index.permute(1, 2, 0, 3):
        patch = swapped.gather(1, one)
        swapped.scatter_(1, one, swapped.gather(1, other))
        swapped.scatter_(1, other, patch)
    return swapped[:, :-1].reshape(cubes.shape)


# Rotations


@lru_cache
def find_rotations(shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """The rotations that map a box onto itself, as (order of axes, axes to flip after).

    The first is the identity. 24 for a cube, 8 where two sides are the same, else 4.
    """
    found = []
    for axes in itertools.permutations(range(3)):
        if tuple(shape[axis] for axis in axes) != tuple(shape):
            continue
        for flips in itertools.product((1, -1), repeat=3):
            matrix = np.eye(3)[list(axes)] * np.array(flips)[:, None]
            if np.linalg.det(matrix) > 0:  # a rotation, no mirror image
                found.append((axes, tuple(a for a in range(3) if flips[a] < 0)))
    return tuple(found)


def rotate(cubes: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Rotated cubes, and (n,) which of `find_rotations` each got, all equally likely."""
    rotations = find_rotations(tuple(cubes.shape[2:]))
    chosen = draws.integers(0, len(rotations) - 1)
    rotated = torch.empty_like(cubes)
    for number, (axes, flips) in enumerate(rotations):
        members = torch.nonzero(chosen == number).flatten().to(cubes.device)
        turned = cubes[members].permute(0, 1, *(2 + axis for axis in axes))
        rotated[members] = turned.flip([2 + axis for axis in flips])
    return rotated, chosen.to(cubes.device)


# Rubik's cube


@lru_cache
def find_permutations(num: int, length: int = 8) -> Tensor:
    """(num, length) orders far apart: each next one is the farthest from those before.

    Farthest: the largest Hamming distance to the nearest of them, then to all together.
    """
    every = np.array(list(itertools.permutations(range(length))), np.int8)
    nearest, total = np.full(len(every), length + 1), np.zeros(len(every), int)
    chosen: list[int] = []
    while len(chosen) < num:
        chosen.append(int(np.lexsort((-total, -nearest))[0]))
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, total = np.minimum(nearest, distance), total + distance
    return torch.from_numpy(every[chosen].astype(np.int64))


def jumble(cubes: Tensor, draws: Draws, *, num_orders: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cubes cut in 2 x 2 x 2, put together in another order, some parts rotated by 180 degrees.

    Returns the cubes, (n,) which of `find_permutations` orders the parts (place i holds part
    order[i]), and (n, 8) whether the part at each place was rotated, about z or about y.
    """
    num = len(cubes)
    parts = split_blocks(cubes, 2).reshape(num, 8, *(side // 2 for side in cubes.shape[2:]))
    chosen = draws.integers(0, num_orders - 1)
    order = find_permutations(num_orders)[chosen].to(cubes.device)  # (n, 8)
    parts = parts.take_along_dim(order[:, :, None, None, None], 1)
    about = draws.integers(0, 3, 8).to(cubes.device)[:, :, None, None, None]  # 0 z, 1 y, else none
    parts = torch.where(about == 0, parts.flip((3, 4)), parts)
    parts = torch.where(about == 1, parts.flip((2, 4)), parts)
    jumbled = join_blocks(parts.reshape(num * 8, 1, *parts.shape[2:]), 2)
    return jumbled, chosen.to(cubes.device), (about < 2).reshape(num, 8)


# The Models Genesis mix

Perturbation = Callable[[Tensor, Draws], Tensor]


def draw_kinds(draws: Draws, num_kinds: int = 4) -> Tensor:
    """(n,) which perturbation each cube gets, all equally likely, on the CPU."""
    return draws.integers(0, num_kinds - 1)


def perturb(cubes: Tensor, draws: Draws, *, num_blocks: int = NUM_BLOCKS) -> Tensor:
    """Elastic deformation, then exactly one of the four others for each cube."""

    def shuffle(part: Tensor, draws: Draws) -> Tensor:
        return shuffle_pixels(part, draws, num_blocks=num_blocks)

    kinds: tuple[Perturbation, ...] = (shuffle, bend_intensity, paint_inside, paint_outside)
    perturbed = deform(cubes, draws)
    chosen = draw_kinds(draws, len(kinds))
    for kind, change in enumerate(kinds):
        members = torch.nonzero(chosen == kind).flatten()
        if len(members):
            there = members.to(cubes.device)
            perturbed[there] = change(perturbed[there], draws.of(members.tolist()))
    return perturbed
