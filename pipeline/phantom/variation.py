"""What makes the scan of a patient harder: unusual build, moved organs, cut ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from pipeline.phantom.deformation import STEEPEST, Deformation, Shift
from pipeline.phantom.solids import Point

GROUPS: Final[tuple[tuple[Point, Point, Point], ...]] = (  # centre, radii, largest push
    ((-128, -25, 0), (130, 110, 185), (24, 3, 3)),  # diaphragm: breathing in or out
    ((-58, -22, 24), (85, 80, 85), (10, 8, 9)),  # heart
    ((12, 2, 4), (85, 80, 85), (10, 6, 7)),  # carina and arch of the aorta
    ((-205, -12, -68), (95, 90, 95), (11, 7, 9)),  # liver
    ((-178, 0, 80), (90, 90, 85), (11, 8, 8)),  # spleen and stomach
    ((-252, 30, -66), (85, 62, 66), (14, 4, 5)),  # right kidney
    ((-236, 30, 68), (85, 62, 66), (14, 4, 5)),  # left kidney
    ((-330, -25, 0), (105, 80, 115), (11, 6, 10)),  # bowel
    ((-470, -25, 0), (90, 80, 90), (11, 6, 5)),  # bladder
)
MAX_CUT_MM: Final = 110.0  # at each end
MAX_NECK_MM: Final = 45.0  # added above the usual scan of a chest
MIN_HEIGHT_MM: Final = 140.0


def vary_build(body: Deformation, rng: np.random.Generator) -> Deformation:
    """Change size and fat, and move groups of organs independently."""
    factor = np.clip(rng.normal(1, 0.07), 0.86, 1.14) * np.clip(rng.normal(1, 0.03, 3), 0.94, 1.06)
    shifts = []
    for centre, radii, largest in GROUPS:
        push = rng.uniform(-1, 1, 3) * largest
        push *= min(1, 0.45 * min(radii) / (STEEPEST * float(np.linalg.norm(push))))
        shifts.append(Shift(centre, radii, tuple(push.tolist())))
    return replace(
        body,
        scale=tuple((factor * body.scale).tolist()),
        fat=float(rng.uniform(-0.5, 0.65)),
        shifts=tuple(shifts),
    )


def cut_ends(low: float, high: float, rng: np.random.Generator) -> tuple[float, float]:
    """Cut a scan from `low` to `high` (mm along z) at random at both ends.

    A scan that shows the top of the chest may show the neck first. At least MIN_HEIGHT_MM is left.
    """
    neck = float(rng.uniform(0, MAX_NECK_MM))
    high += neck if high > 0 else 0
    below, above = rng.uniform(0, MAX_CUT_MM, 2).tolist()
    keep = min(1, (high - low - MIN_HEIGHT_MM) / (below + above))
    return low + keep * below, high - keep * above
