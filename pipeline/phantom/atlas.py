"""The atlas of synthetic patients: HU as a function of position in an analytic body.

Positions are z, y, x in mm from the midline at the level of the carina, towards the head, the back
and the patient's left. The body is a list of solids, each a signed distance with layers of tissue,
painted one over the other. It is a trunk from the base of the neck to the hips, arms raised. It
models no disease, and uses no data of real patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
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
CORTEX, SPONGY, DISC, CARTILAGE = Tissue(780), Tissue(210), Tissue(85), Tissue(120)
Layers = tuple[tuple[float, Tissue], ...]  # how far inside the surface (mm) each tissue begins
Paint = Tissue | Layers
BONE: Final[Layers] = ((0, CORTEX), (2.2, SPONGY))


class Solid(NamedTuple):
    """A closed surface and the tissues inside; `centre` and `reach` (half size) are its box."""

    centre: Point
    reach: Point
    distance: Distance
    layers: Layers


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


# fmt: off
TRUNK: Final = Outline(
    Profile((180, 64), (152, 74), (132, 116), (112, 160), (80, 178), (40, 176), (0, 171),
            (-60, 169), (-125, 166), (-200, 159), (-260, 153), (-330, 161), (-400, 176),
            (-460, 183)),
    Profile((180, 62), (150, 63), (130, 71), (105, 84), (60, 100), (0, 111), (-60, 116),
            (-125, 117), (-200, 114), (-270, 109), (-340, 109), (-420, 115), (-520, 113)),
    Profile((180, 8), (130, 12), (85, 10), (20, 8), (-50, 6), (-125, 4), (-210, 2), (-330, 2),
            (-420, 8)))
CAGE: Final = Outline(
    Profile((112, 30), (92, 58), (60, 94), (30, 116), (0, 131), (-60, 145), (-125, 148),
            (-190, 145), (-260, 139)),
    Profile((112, 30), (92, 44), (60, 62), (30, 78), (0, 89), (-60, 96), (-125, 97), (-190, 93),
            (-260, 86)),
    Profile((112, 27), (60, 18), (0, 8), (-60, 4), (-125, 2), (-260, 0)))
BELLY: Final = Outline(
    Profile((-100, 137), (-200, 134), (-260, 126), (-330, 124), (-400, 112), (-460, 88),
            (-520, 70)),
    Profile((-100, 87), (-200, 82), (-260, 73), (-330, 70), (-400, 72), (-520, 66)),
    Profile((-100, 0), (-200, -6), (-260, -12), (-330, -12), (-400, -6), (-520, -4)))
SPINE: Final = Profile((180, 30), (130, 34), (85, 48), (20, 62), (-50, 66), (-125, 60), (-210, 44),
                       (-270, 36), (-330, 41), (-375, 56))
VERTEBRAE: Final[dict[str, float]] = {  # the middle of each body
    "C4": 149, "C5": 133, "C6": 117, "C7": 100, "T1": 81, "T2": 61, "T3": 40, "T4": 18, "T5": -5,
    "T6": -28, "T7": -52, "T8": -76, "T9": -101, "T10": -126, "T11": -152, "T12": -179, "L1": -208,
    "L2": -240, "L3": -273, "L4": -307, "L5": -340}
LANDMARKS: Final[dict[str, Point]] = {
    "carina": (2, 12, 0), "aortic_arch": (25, 2, 13), "heart_centre": (-62, -22, 36),
    "right_lung_apex": (78, 16, -42), "left_lung_apex": (78, 16, 42),
    "right_lung_base": (-140, 66, -85), "left_lung_base": (-140, 66, 85),
    "liver_dome": (-118, -10, -66), "spleen": (-178, 38, 98), "stomach_gas": (-172, -52, 62),
    "right_kidney": (-252, 30, -66), "left_kidney": (-236, 30, 68), "sacrum": (-400, 66, 0),
    "right_femoral_head": (-482, 6, -96), "left_femoral_head": (-482, 6, 96),
    **{f"vertebra_{name}": (z, SPINE.at(z), 0.0) for name, z in VERTEBRAE.items()}}
RIBS: Final[tuple[tuple[float, int, float | None], ...]] = (
    # how far it drops, the angle of its end from the back, where its cartilage meets the sternum
    (30, 150, 48), (46, 152, 17), (58, 154, -2), (68, 154, -22), (74, 154, -44), (76, 152, -66),
    (78, 148, -86), (80, 138, None), (80, 128, None), (78, 118, None), (60, 95, None),
    (42, 70, None))
# fmt: on


def anatomy_hu(z: Field, y: Field, x: Field, *, contrast: float) -> Field:
    """HU of the body, with air around it, at a 3-D block of positions in the atlas.

    z, y, x
        Three arrays of the shape and dtype of the result. Fast where each coordinate grows along
        its own axis, as in a scan: a solid is evaluated within its box only.
    contrast
        0 native, 1 full contrast.
    """
    solids, lows, highs = _atlas()
    firsts, lasts = np.zeros((2, 3, len(solids)), np.int64)
    for axis, (block, others) in enumerate(zip((z, y, x), ((1, 2), (0, 2), (0, 1)), strict=True)):
        least, most = block.min(axis=others), block.max(axis=others)
        within = (most >= lows[:, axis, None]) & (least <= highs[:, axis, None])
        firsts[axis] = within.argmax(axis=1)
        lasts[axis] = np.where(within.any(axis=1), len(least) - within[:, ::-1].argmax(axis=1), 0)
    hu = np.full(z.shape, AIR.hu, z.dtype)
    for number in np.flatnonzero((lasts > firsts).all(axis=0)).tolist():
        solid = solids[number]
        box = tuple(map(slice, firsts[:, number].tolist(), lasts[:, number].tolist()))
        part = hu[box]
        depth = 0.5 - solid.distance(z[box], y[box], x[box]) * (1 / EDGE_MM)
        for inset, tissue in solid.layers:
            share = np.minimum(np.maximum(depth - inset / EDGE_MM, 0), 1)
            gain = tissue.hu + contrast * tissue.uptake_hu - part
            if tissue.gradient_hu:
                gain += tissue.gradient_hu * y[box]
            part += share * gain
    return hu


@cache
def _atlas() -> tuple[list[Solid], Field, Field]:
    """All solids in painting order, and the low and high corners of their boxes."""
    solids = [*_wall(), *_chest(), *_belly_organs(), *_heart_and_vessels(), *_skeleton()]
    centre, reach = (np.array([solid[k] for solid in solids]) for k in (0, 1))
    return solids, centre - reach, centre + reach


def _length(z: Field, y: Field, x: Field) -> Field:
    return np.sqrt(z * z + y * y + x * x)


def _common(first: Field, *others: Field) -> Field:
    """Distance of the intersection of several solids."""
    for distance in others:
        first = np.maximum(first, distance)
    return first


def _mirrored(solid: Solid) -> Solid:
    (z0, y0, x0), reach, distance, layers = solid
    return Solid((z0, y0, -x0), reach, lambda z, y, x: distance(z, y, -x), layers)


def _both(*solids: Solid) -> list[Solid]:
    """The solids and their mirror images."""
    return [*solids, *map(_mirrored, solids)]


def _layers(paint: Paint) -> Layers:
    return ((0, paint),) if isinstance(paint, Tissue) else paint


def _blob(centre: Point, radii: Point, paint: Paint, turn: Point = (0, 0, 0)) -> Solid:
    """An ellipsoid, rotated about z, y, x in that order; `turn` in degrees."""
    frame = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()  # of our axes 0, 1, 2
    rows = (frame.T / np.array(radii)[:, None]).tolist()
    (cz, cy, cx), least = centre, min(radii)

    def distance(z: Field, y: Field, x: Field) -> Field:
        z, y, x = z - cz, y - cy, x - cx
        u, v, w = (a * z + b * y + c * x for a, b, c in rows)
        return least * _length(u, v, w) - least

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
        return _length(z, y, x) - (r0 + along * (r1 - r0))

    centre = (az + dz / 2, ay + dy / 2, ax + dx / 2)
    reach = (abs(dz) / 2 + margin, abs(dy) / 2 + margin, abs(dx) / 2 + margin)
    return Solid(centre, reach, distance, (layer,))


def _tubes(segments: Sequence[Segment], paint: Paint) -> list[Solid]:
    """Tubes that open into each other: a layer of all tubes is painted before the next layer."""
    return [_tube(segment, layer) for layer in _layers(paint) for segment in segments]


def _path(points: Sequence[Point], radii: float | Sequence[float], paint: Paint) -> list[Solid]:
    """Tubes along a path, of one radius or one for each point."""
    each = [radii] * len(points) if isinstance(radii, int | float) else radii
    ends = pairwise(zip(points, each, strict=True))
    return _tubes([(p, q, r0, r1) for (p, r0), (q, r1) in ends], paint)


def _tree(organ: Solid, root: Point, leaves: int, radius: float, paint: Paint) -> list[Solid]:
    """Vessels from the root to random points 6 mm inside the organ, on the root's side."""
    rng = np.random.default_rng(leaves)
    z, y, x = (organ.centre + rng.uniform(-1, 1, (40 * leaves, 3)) * organ.reach).T
    inside = (organ.distance(z, y, x) < -6) & (x * root[2] >= 0)
    return _tubes(_branches(root, np.stack([z, y, x], axis=1)[inside][:leaves], radius), paint)


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


def _diaphragm(y: Field, x: Field) -> Field:
    """Height of the two domes, the right one higher."""
    side, back = np.abs(x) - 68, y + 10
    fall: Field = np.where(side > 0, 0.0085, 0.003) * side * side + 0.009 * back * back
    return -115 - fall - np.clip(x / 5, -8, 8)


def _lungs(z: Field, y: Field, x: Field) -> Field:
    wall = (CAGE.radius(z, y, x) - 1) * 95 + 10
    beside = np.abs(x)
    apex = z - 90 + 0.02 * ((beside - 42) ** 2 + (y - 14) ** 2)
    base = 0.7 * (_diaphragm(y, x) - z)
    return _common(wall, apex, base, 5 - beside)


def _belly(z: Field, y: Field, x: Field) -> Field:
    return _common((BELLY.radius(z, y, x) - 1) * 85, 0.7 * (z - _diaphragm(y, x)))


def _liver(z: Field, y: Field, x: Field) -> Field:
    under = -270 + 0.0036 * (x + 130) ** 2 + 0.6 * (y + 15)  # the visceral surface
    return _common(_belly(z, y, x) + 3, 0.7 * (under - z))


def _iliac(z: Field, y: Field, x: Field) -> Field:
    bowl = _length((z + 320) / 190, (y + 40) / 110, x / 125)
    crest = z + 302 + 0.009 * (y - 10) ** 2
    front = -58 + 0.45 * np.maximum(-350 - z, 0) - y
    plate = np.abs(bowl - 1) * 110 - 5.5
    return _common(plate, crest, front, y - 72, 38 - np.abs(x), -490 - z)


def _under_diaphragm(solid: Solid) -> Solid:
    uncut = solid.distance
    return solid._replace(distance=lambda z, y, x: _common(uncut(z, y, x), _belly(z, y, x) + 3))


def _sternum(z: Field, y: Field, x: Field) -> Field:
    front = CAGE.middle(z) - CAGE.depth(z) + 1
    side = np.abs(x) - 16 - 6 * np.clip((z - 18) / 12, 0, 1)
    return _common(side, np.abs(y - front) - 5.5, np.abs(z + 22) - 70)


def _half_depth(z: float) -> float:
    """Half the front-to-back depth of the vertebral body at height z."""
    return float(np.interp(z, (-340, -200, 80, 150), (18, 16, 11, 9)))


def _along_spine(low: int, high: int, step: int, *, behind: float = 0, x: float = 0) -> list[Point]:
    return [(z, SPINE.at(z) + behind, x) for z in range(low, high, step)]


def _vertebral_body(middle: float, half: float) -> Solid:
    """A cylinder with a waist, from `middle - half` to `middle + half`."""
    y0, depth = SPINE.at(middle), _half_depth(middle)
    width = 1.32 * depth

    def distance(z: Field, y: Field, x: Field) -> Field:
        waist = 0.92 + 0.08 * ((z - middle) / half) ** 2
        around = np.sqrt(((y - y0) / depth) ** 2 + (x / width) ** 2) - waist
        return _common(around * depth, np.abs(z - middle) - half)

    return Solid((middle, y0, 0), (half + 1, depth + 1, width + 1), distance, BONE)


def _rib(start: float, drop: float, end: int) -> list[Point]:
    """Path of a left rib's bone, from a vertebra at `start` down and around to `end` degrees."""
    angle = np.deg2rad(np.linspace(38, end, 3 + end // 12))
    z = start - drop * (1 - np.cos(angle)) / 2
    course = np.stack([z, *CAGE.around(z, angle, 0.95)], axis=1).tolist()
    spine = SPINE.at(start) + _half_depth(start)
    return [(start + 4, spine, 16), (start, spine + 17, 38), *map(tuple, course)]


# fmt: off
def _wall() -> list[Solid]:
    skin = Solid((0, 5, 0), (FAR, 130, 195), lambda z, y, x: (TRUNK.radius(z, y, x) - 1) * 112,
                 ((0, SKIN), (2, FAT), (12, MUSCLE)))
    return [skin, *_both(
        _blob((42, 22, 148), (46, 30, 16), FAT),  # armpit
        _blob((42, 74, 92), (58, 4.5, 42), BONE, (24, 0, 0)),  # scapula
        _blob((108, 12, 138), (22, 22, 22), BONE))]  # head of humerus


def _chest() -> list[Solid]:
    lungs = Solid((-72, 0, 0), (168, 110, 160), _lungs, ((-3.5, MUSCLE), (0, LUNG)))
    trees = [tree for s in (-1, 1) for tree in (
        *_tree(lungs, (-18, -2, 34 * s), 260, 7.5, BLOOD),  # arteries
        *_tree(lungs, (-38, 6, 30 * s), 140, 6.5, BLOOD),  # veins
        *_tree(lungs, (-26, 14, 34 * s), 16, 6.2, ((0, MUSCLE), (1.5, AIR))))]  # airways
    return [
        lungs, *trees,
        _blob((-20, -16, 2), (150, 72, 27), FAT),  # mediastinum
        _blob((110, 14, 0), (95, 32, 38), MUSCLE),  # root of the neck
        *_path(_along_spine(-215, 125, 20, behind=6), 27, MUSCLE),
        *_both(*_path(_along_spine(-215, 125, 20, behind=23, x=24), 17, MUSCLE))]


def _belly_organs() -> list[Solid]:
    wall = Solid((-95 - FAR, -5, 0), (FAR, 95, 145), _belly, ((0, MUSCLE), (3.5, FAT)))
    liver = Solid((-220, -5, -18), (120, 90, 118), _liver, ((0, LIVER),))
    stomach = _under_diaphragm(
        _blob((-174, -28, 60), (54, 48, 38), ((0, BOWEL), (5, FLUID)), (-15, -20, 0)))
    gas = stomach._replace(  # at the front of a patient who lies on the back
        layers=((0, AIR),), distance=lambda z, y, x: _common(stomach.distance(z, y, x) + 5, y + 40))
    kidneys = [kidney for s, z in ((-1, -252), (1, -236)) for kidney in (
        _blob((z, 32, 63 * s), (54, 25, 29), KIDNEY, (35 * s, -10 * s, 0)),
        _blob((z, 23, 48 * s), (26, 10, 14), FAT, (35 * s, -10 * s, 0)))]
    colon: list[Point] = [
        (-430, 0, -82), (-345, 18, -98), (-290, 8, -96), (-296, -52, -62), (-312, -60, 0),
        (-290, -55, 60), (-236, 4, 104), (-330, 24, 104), (-395, 14, 88), (-425, -8, 40),
        (-440, 22, 8), (-500, 40, 0)]
    t = np.linspace(0, 1, 180)
    loops = np.stack([-228 - 200 * t + 9 * np.sin(53 * t), -34 + 25 * np.sin(43 * t),
                      48 * (1 - t) ** 2 + (40 + 26 * t) * np.sin(119 * t)], axis=1)
    small_bowel: list[Point] = list(map(tuple, loops.tolist()))
    return [
        wall, *_path(_along_spine(-400, -200, 20, behind=4), 27, MUSCLE),
        *_both(*_path([(-212, 34, 28), (-330, 24, 47), (-455, -8, 80)], (11, 20, 17), MUSCLE)),
        liver, *_tree(liver, (-196, -8, -32), 40, 6.5, BLOOD),
        _blob((-236, -48, -58), (27, 13, 14), FLUID, (0, 0, 25)),  # gallbladder
        _under_diaphragm(_blob((-178, 38, 98), (50, 40, 23), SPLEEN, (30, 0, 15))),
        *kidneys,
        *_path([(-222, 0, -22), (-212, -8, 4), (-206, -2, 40), (-198, 14, 76)], 11, GLAND),
        stomach, gas,
        *_path(colon, 19, ((0, BOWEL), (3, STOOL))),
        *_path(small_bowel, 11.5, ((0, BOWEL), (3, FLUID))),
        *(_blob((z - 12, y - 6, x), (20, 9, 12), AIR) for z, y, x in colon[:8]),
        *(_blob((z, y - 4, x), (7, 4, 8), AIR) for z, y, x in small_bowel[5::14]),
        _blob((-478, -28, 0), (30, 30, 36), ((0, MUSCLE), (4, FLUID)))]  # bladder


def _heart_and_vessels() -> list[Solid]:
    turn, fork = (-38, 0, 28), (0, 12, 0)
    chambers: list[tuple[Point, Point]] = [  # left and right ventricle, left and right atrium
        ((-70, -22, 48), (25, 22, 36)), ((-74, -46, 20), (26, 14, 40)),
        ((-46, 8, 16), (24, 15, 30)), ((-60, -20, -18), (32, 24, 18))]
    vessels: list[tuple[list[Point], float | Sequence[float]]] = [
        ([(-46, -28, 8), (-15, -32, -16), (12, -22, -10), (24, -8, 4), (25, 10, 15), (12, 30, 24),
          (-15, 36, 27), (-70, 38, 25), (-130, 32, 14), (-208, 14, 7), (-304, 8, 5)],
         (15, 15, 14.5, 14, 13.5, 12.5, 12, 11.5, 11, 10, 8.5)),  # aorta
        ([(-95, -4, -20), (-130, 2, -24), (-210, 10, -23), (-306, 14, -15)], 11),  # venae cavae
        ([(-52, -20, -22), (-10, -16, -27), (50, -22, -22), (72, -16, -28)], 9),
        ([(-44, -46, 16), (-14, -32, 20), (-8, -8, 26), (-16, 0, 36)], 12),  # pulmonary arteries
        ([(-10, -20, 18), (-18, -6, -12), (-18, -2, -34)], 10.5)]
    for s in (-1, 1):  # to the neck, the arm, the leg, the kidney
        vessels += [([(22, -6, 6), (58, -10, 14 * s), (180, -2, 27 * s)], 4.5),
                    ([(180, -2, 36 * s), (76, -16, 30 * s), (86, -16, 90 * s)], 6),
                    ([(-304, 8, 4), (-375, 22, 36 * s), (-470, -38, 72 * s)], 6.5),
                    ([(-234, 10, 6), (-240, 22, 46 * s)], 4)]
    gullet: list[Point] = [(180, 12, 4), (40, 30, 5), (-60, 24, 8), (-135, 10, 16), (-160, -12, 40)]
    return [
        _blob((-66, -26, 26), (53, 49, 66), ((0, FAT), (4, MYOCARDIUM)), turn),
        *(_blob(centre, radii, BLOOD, turn) for centre, radii in chambers),
        *(tube for points, radii in vessels for tube in _path(points, radii, BLOOD)),
        *_path(gullet, 7, BOWEL),
        *_tubes([((180, -18, 0), fork, 10.5, 10.5), (fork, (-26, 14, -34), 9, 8),
                 (fork, (-30, 14, 40), 8.5, 7.5)], ((0, CARTILAGE), (2, AIR)))]  # windpipe


def _skeleton() -> list[Solid]:
    solids = _path(_along_spine(-356, 170, 8), 12, DISC)
    heights = [16, *(a - b for a, b in pairwise(VERTEBRAE.values()))]
    for (name, z), height in zip(VERTEBRAE.items(), heights, strict=True):
        y, droop = SPINE.at(z) + _half_depth(z) + 9, 14 if name[0] == "T" else 4
        solids += [
            _vertebral_body(z, 0.4 * height),
            _blob((z - 2, y, 0), (0.44 * height, 15, 17), ((0, CORTEX), (3, SPONGY))),  # arch
            *_path([(z - 3, y + 13, 0), (z - droop, y + 29, 0)], 4.2, BONE),
            *_both(*_path([(z, y + 1, 14), (z, y + 7, 36)], (5, 4), BONE))]
    canal: list[Point] = [(z, y + _half_depth(z) + 9, x) for z, y, x in _along_spine(-400, 185, 8)]
    solids += [
        _blob((-405, 66, 0), (62, 15, 50), BONE, (0, 0, -18)),  # sacrum
        *_path(canal, 8.5, CORD),
        Solid((-22, -75, 0), (73, 35, 24), _sternum, BONE),
        Solid((-394, 5, 0), (98, 75, 136), _iliac, BONE)]
    for number, (drop, end, sternal_z) in enumerate(RIBS, 1):
        rib = _rib(VERTEBRAE[f"T{number}"], drop, end)
        if sternal_z is not None:
            front = CAGE.middle.at(sternal_z) - CAGE.depth.at(sternal_z) + 2
            solids += _both(*_path([rib[-1], (sternal_z, front, 17)], 5, CARTILAGE))
        solids += _both(*_path(rib, 5.2, BONE))
    return solids + _both(
        *_path([(54, -58, 18), (70, -66, 60), (104, -22, 122)], 6.5, BONE),  # clavicle
        _blob((-482, 6, 96), (33, 33, 30), BONE),  # socket of the hip, then head of femur
        _blob((-484, 6, 100), (26, 26, 26), ((0, CARTILAGE), (2, CORTEX), (4, SPONGY))))
# fmt: on
