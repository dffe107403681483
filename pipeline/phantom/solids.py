"""Solids with layers of tissue, and how they are painted: as HU, or as labels of organs.

Positions are z, y, x in mm, each an array of the shape of the result. A solid is a signed distance
with layers of tissue. Solids are painted one over the other; a later one hides an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation

Point = tuple[float, float, float]
Field = NDArray[np.float64]  # z, y, x, distance or HU at each point; single precision to render
Distance = Callable[[Field, Field, Field], Field]  # of z, y, x; mm, negative inside

FAR: Final = 9999.0
EDGE_MM: Final = 1.4  # over which one tissue turns into the next


class Tissue(NamedTuple):
    """HU without contrast, HU gained at full contrast, and HU gained per mm towards the back."""

    hu: float
    uptake_hu: float = 0.0
    gradient_hu: float = 0.0


AIR, LUNG, FAT, SKIN = Tissue(-1000), Tissue(-865, 10, 0.45), Tissue(-100), Tissue(5)
MUSCLE, BLOOD, MYOCARDIUM = Tissue(52, 10), Tissue(45, 190), Tissue(48, 60)
LIVER, SPLEEN, KIDNEY, GLAND = Tissue(60, 50), Tissue(50, 75), Tissue(33, 150), Tissue(40, 55)
FLUID, BOWEL, STOOL, CORD = Tissue(10), Tissue(38, 45), Tissue(-25), Tissue(28)
TUMOUR = Tissue(36, 35)
CORTEX, SPONGY, DISC, CARTILAGE = Tissue(780), Tissue(210), Tissue(85), Tissue(120)
Layers = tuple[tuple[float, Tissue], ...]  # how far inside the surface (mm) each tissue begins
Paint = Tissue | Layers
BONE: Final[Layers] = ((0, CORTEX), (2.2, SPONGY))


PAIRED: Final = ("lung", "kidney")  # organs of which a mask tells right from left
LABELS: Final[dict[str, int]] = {
    name: number
    for number, name in enumerate((
        "background", "body", "right_lung", "left_lung", "trachea", "heart", "aorta", "liver",
        "gallbladder", "spleen", "pancreas", "right_kidney", "left_kidney", "stomach",
        "small_bowel", "colon", "bladder", "spine", "mass", "effusion",
    ))
}  # fmt: skip
"""Labels of a mask. "body" is all other tissue; "trachea" has the main bronchi, "spine" the discs,
the spinal canal and the sacrum; lung and liver have their vessels, but not "mass" and "effusion".
"""


class Solid(NamedTuple):
    """A closed surface and the tissues inside; `centre` and `reach` (half size) are its box."""

    centre: Point
    reach: Point
    distance: Distance
    layers: Layers
    organ: str | None = "body"  # of LABELS or PAIRED; None: belongs to what it is painted over


class Profile:
    """A smooth curve through (z, value) knots, constant beyond them."""

    def __init__(self, *knots: tuple[float, float]) -> None:
        z, value = np.array(sorted(knots)).T
        self._z = np.arange(z[0], z[-1] + 1 / 64, 1 / 32)
        self._value = PchipInterpolator(z, value)(self._z)
        self._single: Field = self._value.astype(np.float32)

    def __call__(self, z: Field) -> Field:
        """Values at z: exact in double precision, else of the nearest table entry."""
        if z.dtype != np.float32:
            return np.interp(z, self._z, self._value)
        nearest = (z * 32 + (0.5 - 32 * float(self._z[0]))).astype(np.int32)
        return self._single.take(nearest, mode="clip")

    def at(self, z: float) -> float:
        """Evaluate at one height."""
        return float(np.interp(z, self._z, self._value))


class Outline(NamedTuple):
    """A stack of rounded ellipses: half width along x, half depth along y, middle along y."""

    width: Profile
    depth: Profile
    middle: Profile

    def radius(self, z: Field, y: Field, x: Field) -> Field:
        """1 on the outline, s on its copy scaled by s."""
        return rounded(x / self.width(z), (y - self.middle(z)) / self.depth(z))

    def around(self, z: Field, angle: Field, radius: float = 1) -> tuple[Field, Field]:
        """Points (y, x) on a scaled copy, at angles in rad from the back to the left."""
        back, left = np.cos(angle), np.sin(angle)
        reach = radius / rounded(left / self.width(z), back / self.depth(z))
        return self.middle(z) + reach * back, reach * left


def rounded(u: Field, v: Field) -> Field:
    """Norm whose unit circle is between an ellipse and a rectangle."""
    u, v = u * u, v * v
    return np.sqrt(0.5 * (u + v + np.sqrt(u * u + v * v)))


class Painting:
    """Solids in painting order."""

    def __init__(self, solids: Sequence[Solid]) -> None:
        self.solids = solids
        centre, reach = (np.array([solid[k] for solid in solids]) for k in (0, 1))
        self._lows, self._highs = centre - reach, centre + reach

    def paint_hu(self, hu: Field, z: Field, y: Field, x: Field, *, contrast: float) -> None:
        """Paint over a 3-D block of HU in place.

        z, y, x
            Three arrays of the shape and dtype of `hu`. Fast where each coordinate grows along its
            own axis, as in a scan: a solid is evaluated within its box only.
        contrast
            0 native, 1 full contrast.
        """
        for number, box in boxes(self._lows, self._highs, z, y, x):
            solid = self.solids[number]
            part = hu[box]
            depth = 0.5 - solid.distance(z[box], y[box], x[box]) * (1 / EDGE_MM)
            for inset, tissue in solid.layers:
                share = np.minimum(np.maximum(depth - inset / EDGE_MM, 0), 1)
                gain = tissue.hu + contrast * tissue.uptake_hu - part
                if tissue.gradient_hu:
                    gain += tissue.gradient_hu * y[box]
                part += share * gain

    def paint_labels(self, labels: NDArray[np.uint8], z: Field, y: Field, x: Field) -> None:
        """Paint over a 3-D block of LABELS in place; else like `paint_hu`."""
        for number, box in boxes(self._lows, self._highs, z, y, x):
            solid = self.solids[number]
            if solid.organ is None:
                continue
            inside = solid.distance(z[box], y[box], x[box]) < 0
            if solid.organ in PAIRED:
                right, left = (LABELS[f"{side}_{solid.organ}"] for side in ("right", "left"))
                labels[box][inside] = np.where(x[box][inside] < 0, right, left)
            else:
                labels[box][inside] = LABELS[solid.organ]


def boxes(
    lows: Field, highs: Field, z: Field, y: Field, x: Field
) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Which boxes a 3-D block of positions may touch, and with which part of the block.

    lows, highs
        (n, 3) corners of n boxes.

    Yields the number of a box and the slices of the block, in order of the boxes.
    """
    if not z.size:
        return
    firsts, lasts = np.zeros((2, 3, len(lows)), np.int64)
    for axis, (block, others) in enumerate(zip((z, y, x), ((1, 2), (0, 2), (0, 1)), strict=True)):
        least, most = block.min(axis=others), block.max(axis=others)
        within = (most >= lows[:, axis, None]) & (least <= highs[:, axis, None])
        firsts[axis] = within.argmax(axis=1)
        lasts[axis] = np.where(within.any(axis=1), len(least) - within[:, ::-1].argmax(axis=1), 0)
    for number in np.flatnonzero((lasts > firsts).all(axis=0)).tolist():
        yield number, tuple(map(slice, firsts[:, number].tolist(), lasts[:, number].tolist()))


def length(z: Field, y: Field, x: Field) -> Field:
    """Length of each vector."""
    return np.sqrt(z * z + y * y + x * x)


def common(first: Field, *others: Field) -> Field:
    """Distance of the intersection of several solids."""
    for distance in others:
        first = np.maximum(first, distance)
    return first


def _mirrored(solid: Solid) -> Solid:
    (z0, y0, x0), distance = solid.centre, solid.distance
    return solid._replace(centre=(z0, y0, -x0), distance=lambda z, y, x: distance(z, y, -x))


def both(*solids: Solid) -> list[Solid]:
    """The solids and their mirror images."""
    return [*solids, *map(_mirrored, solids)]


def belonging(organ: str | None, solids: Iterable[Solid]) -> list[Solid]:
    """The solids as parts of an organ."""
    return [solid._replace(organ=organ) for solid in solids]


def _layers(paint: Paint) -> Layers:
    return ((0, paint),) if isinstance(paint, Tissue) else paint


def blob(centre: Point, radii: Point, paint: Paint, turn: Point = (0, 0, 0)) -> Solid:
    """An ellipsoid, rotated about z, y, x in that order; `turn` in degrees."""
    frame = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()  # of our axes 0, 1, 2
    rows = (frame.T / np.array(radii)[:, None]).tolist()
    (cz, cy, cx), least = centre, min(radii)

    def distance(z: Field, y: Field, x: Field) -> Field:
        z, y, x = z - cz, y - cy, x - cx
        u, v, w = (a * z + b * y + c * x for a, b, c in rows)
        return least * length(u, v, w) - least

    # The distance is exact along the shortest axis only: along others the edge is softer.
    reach = np.sqrt((frame**2) @ np.square(radii)) * (1 + EDGE_MM / least)
    return Solid(centre, tuple(reach.tolist()), distance, _layers(paint))


Segment = tuple[Point, Point, float, float]  # two ends and the radius at each


def _tube(segment: Segment, layer: tuple[float, Tissue]) -> Solid:
    """A tapering tube with round ends."""
    start, end, r0, r1 = segment
    (az, ay, ax), (dz, dy, dx) = start, (q - p for p, q in zip(start, end, strict=True))
    scale, margin = 1 / max(dz * dz + dy * dy + dx * dx, 1e-6), max(r0, r1) + EDGE_MM

    def distance(z: Field, y: Field, x: Field) -> Field:
        z, y, x = z - az, y - ay, x - ax
        along = z * (dz * scale) + y * (dy * scale) + x * (dx * scale)
        along = np.minimum(np.maximum(along, 0), 1)
        z, y, x = z - along * dz, y - along * dy, x - along * dx
        return length(z, y, x) - (r0 + along * (r1 - r0))

    centre = (az + dz / 2, ay + dy / 2, ax + dx / 2)
    reach = (abs(dz) / 2 + margin, abs(dy) / 2 + margin, abs(dx) / 2 + margin)
    return Solid(centre, reach, distance, (layer,))


def tubes(segments: Sequence[Segment], paint: Paint) -> list[Solid]:
    """Tubes that open into each other: a layer of all tubes is painted before the next layer."""
    return [_tube(segment, layer) for layer in _layers(paint) for segment in segments]


def path(points: Sequence[Point], radii: float | Sequence[float], paint: Paint) -> list[Solid]:
    """Tubes along a path, of one radius or one for each point."""
    each = [radii] * len(points) if isinstance(radii, int | float) else radii
    ends = pairwise(zip(points, each, strict=True))
    return tubes([(p, q, r0, r1) for (p, r0), (q, r1) in ends], paint)


def tree(organ: Solid, root: Point, leaves: int, radius: float, paint: Paint) -> list[Solid]:
    """Vessels from the root to random points 6 mm inside the organ, on the root's side."""
    rng = np.random.default_rng(leaves)
    z, y, x = (organ.centre + rng.uniform(-1, 1, (40 * leaves, 3)) * organ.reach).T
    inside = (organ.distance(z, y, x) < -6) & (x * root[2] >= 0)
    return tubes(_branches(root, np.stack([z, y, x], axis=1)[inside][:leaves], radius), paint)


def _branches(root: Point, targets: Field, radius: float) -> list[Segment]:
    """A tree from the root to all targets; radii follow Murray's cubic law."""
    if len(targets) == 1:
        return [(root, tuple(targets[0].tolist()), radius, 0.6 * radius)]
    fork: Point = tuple((0.5 * (np.array(root) + targets.mean(axis=0))).tolist())
    order = targets[np.argsort(targets[:, np.argmax(np.ptp(targets, axis=0))])]
    cut = len(order) * 2 // 5 or 1
    small, large = (radius * float(np.cbrt(n / len(order))) for n in (cut, len(order) - cut))
    branches = _branches(fork, order[:cut], small) + _branches(fork, order[cut:], large)
    return [(root, fork, radius, large), *branches]
