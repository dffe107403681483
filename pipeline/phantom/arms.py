"""Arms of synthetic patients: raised, or beside the trunk.

They are tubes in mm of the scan, drawn for one patient: they are not part of the atlas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from pipeline.phantom.atlas import LANDMARKS, TRUNK
from pipeline.phantom.deformation import Deformation
from pipeline.phantom.solids import BONE, FAT, MUSCLE, SKIN, Painting, Point, Segment, tubes

Pose = Literal["up", "down"]
LIMB: Final = ((0.0, SKIN), (2.0, FAT), (9.0, MUSCLE))
SHAFT_MM, FOREARM_MM = 10.5, 7.0  # radius of the bones
RAISED: Final = ((70, 0.35, 1.05), (170, 0.8, 0.95), (300, 1.0, 0.85))
"""Points of a raised arm: mm above the joint, share of its lean, thickness."""
LOWERED: Final = ((60, 0.35, 1.1), (0, 0.85, 1.0), (-100, 1.0, 0.95), (-235, 1.0, 0.85),
                  (-480, 1.0, 0.55))  # fmt: skip
"""Points of an arm beside the trunk, the elbow and the wrist last: z in the atlas, share of its
distance from the skin, thickness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """Both arms, as tubes in mm of the scan."""

    pose: Pose
    limbs: tuple[Segment, ...]
    bones: tuple[Segment, ...]

    @property
    def soft(self) -> Painting:
        """Skin, fat and muscle; the trunk is painted over them."""
        return Painting(tubes(self.limbs, LIMB))

    @property
    def hard(self) -> Painting:
        """The bones, which are painted over everything."""
        return Painting(tubes(self.bones, BONE))


def draw_pose(rng: np.random.Generator) -> Pose | None:
    """Arms above the head, beside the trunk, or not shown."""
    poses: tuple[Pose | None, ...] = ("up", "down", None)
    return poses[int(rng.choice(3, p=(0.4, 0.3, 0.3)))]


def draw_arms(
    pose: Pose, body: Deformation, back_mm: Callable[[float], float], rng: np.random.Generator
) -> Arms:
    """Draw the arms of a patient who lies in the scan.

    back_mm
        y of the table's surface at a given x, in mm; arms stay above it.
    """
    thickness = 44 * body.scale[2] * (1 + 0.3 * body.fat) * float(rng.uniform(0.9, 1.1))
    limbs: list[Segment] = []
    bones: list[Segment] = []
    for side, name in ((-1, "right_humeral_head"), (1, "left_humeral_head")):
        joint, *skin = _to_scan(
            body,
            LANDMARKS[name],
            *((z, TRUNK.middle.at(z), side * TRUNK.width.at(z)) for z, _, _ in LOWERED),
        )
        points, radii = [joint], [thickness * (1.15 if pose == "up" else 1)]
        radii += [thickness * factor for _, _, factor in (RAISED if pose == "up" else LOWERED)]
        if pose == "up":
            (z, y, x), (front, aside) = joint, rng.uniform((-10, 10), (25, 35))
            points += [
                (z + up, y - share * front, x + side * share * aside) for up, share, _ in RAISED
            ]
            upper = points
        else:
            gap, rise = rng.uniform((0, -5), (18, 30))
            for (z, y, x), (_, share, _), radius in zip(skin, LOWERED, radii[1:], strict=True):
                beside = x + side * share * (radius + gap)
                points.append((z, min(y - rise, back_mm(beside) - radius - 2), beside))
            upper, (elbow, wrist) = points[:-1], points[-2:]
            for apart in (-11, 11):  # radius and ulna
                shift = (0, apart, apart / 2)
                ends = (_sum(elbow, shift), _sum(wrist, shift))
                bones.append((*ends, FOREARM_MM, FOREARM_MM))
        for (start, r0), (end, r1) in pairwise(zip(points, radii, strict=True)):
            limbs.append((start, end, r0, r1))
        away = np.subtract(upper[1], joint)
        neck = _sum(joint, 30 / np.linalg.norm(away) * away)  # the atlas has the head
        bones += [(*ends, SHAFT_MM, SHAFT_MM) for ends in pairwise([neck, *upper[1:]])]
    return Arms(pose=pose, limbs=tuple(limbs), bones=tuple(bones))


def _to_scan(body: Deformation, *points: Point) -> list[Point]:
    """Scan positions of atlas positions."""
    return list(zip(*(a.tolist() for a in body.from_atlas(*np.array(points).T)), strict=True))


def _sum(point: Point, shift: Sequence[float]) -> Point:
    z, y, x = map(float, np.add(point, shift))
    return z, y, x
