"""Diseases of synthetic patients: a mass, or a pleural effusion.

A disease is painted over one organ of the atlas, and other organs over both. It belongs to one
patient: the atlas has no such point.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.phantom.atlas import atlas
from pipeline.phantom.deformation import Deformation
from pipeline.phantom.solids import (
    EDGE_MM,
    FLUID,
    LABELS,
    TUMOUR,
    Field,
    Painting,
    Point,
    Solid,
    blob,
    common,
)

DISEASED: Final = 0.3  # share of patients, if the scan shows a lung or the liver
BLUR_MM: Final = 4.0  # width of the edge of a mass


class Mass(NamedTuple):
    """An ellipsoid of soft tissue with a blurred edge, in mm of the atlas."""

    organ: str
    centre: Point
    radii: Point
    turn: Point  # degrees
    kind: str = "mass"

    def solid(self, organ: Solid) -> Solid:
        """The part of the ellipsoid within its organ."""
        ball = blob(self.centre, self.radii, TUMOUR, self.turn)

        def distance(z: Field, y: Field, x: Field) -> Field:
            return common(ball.distance(z, y, x) * (EDGE_MM / BLUR_MM), organ.distance(z, y, x))

        reach = max(self.radii) + BLUR_MM
        return ball._replace(reach=(reach, reach, reach), distance=distance, organ="mass")


class Effusion(NamedTuple):
    """Fluid in the pleural cavity of one side, in the back and low part."""

    organ: str
    level: float  # y of its surface at the height of the heart; mm of the atlas
    kind: str = "effusion"

    def solid(self, organ: Solid) -> Solid:
        """The fluid; its surface rises towards the walls and the base."""
        side = -1 if self.organ == "right_lung" else 1

        def distance(z: Field, y: Field, x: Field) -> Field:
            surface = self.level + 0.15 * (z + 60) - 0.004 * (np.abs(x) - 75) ** 2
            return common(surface - y, organ.distance(z, y, x), -side * x)

        return organ._replace(layers=((0, FLUID),), distance=distance, organ="effusion")


Disease = Mass | Effusion


def anatomy(disease: Disease | None) -> Painting:
    """The atlas, with the disease painted over its organ, and other organs over both."""
    if disease is None:
        return atlas()
    solids, organ = atlas().solids, _organ(disease.organ)
    end = 1 + max(number for number, solid in enumerate(solids) if solid.organ == organ.organ)
    return Painting([*solids[:end], disease.solid(organ), *solids[end:]])


def labels_at(painting: Painting, points: Field) -> NDArray[np.uint8]:
    """LABELS (n,) at atlas positions (n, 3)."""
    order = np.argsort(points[:, 0])  # painting is fast where z grows along the block
    painted = np.zeros((len(points), 1, 1), np.uint8)
    painting.paint_labels(painted, *points[order].T[:, :, None, None])
    labels = np.empty(len(points), np.uint8)
    labels[order] = painted[:, 0, 0]
    return labels


def draw_disease(body: Deformation, extent_mm: Field, rng: np.random.Generator) -> Disease | None:
    """Draw a mass or an effusion that the scan shows, or none.

    extent_mm
        Position of the scan's last voxel, z, y, x in mm.
    """
    if rng.random() >= DISEASED:
        return None
    for kind in rng.permutation(["lung mass", "liver mass", "effusion"]).tolist():
        organ = "liver" if kind == "liver mass" else str(rng.choice(["right_lung", "left_lung"]))
        points = _organ(organ).centre + rng.uniform(-1, 1, (400, 3)) * _organ(organ).reach
        points_mm = np.stack(body.from_atlas(*points.T), axis=1)
        points = points[((points_mm > 0) & (points_mm < extent_mm)).all(axis=1)]
        if kind == "effusion":
            effusion = Effusion(organ, float(rng.uniform(15, 55)))
            if np.sum(labels_at(anatomy(effusion), points) == LABELS["effusion"]) >= 5:
                return effusion
        else:
            points = points[labels_at(atlas(), points) == LABELS[organ]]
            if len(points) >= 5:
                radii = rng.uniform(8.4, 27.2) * rng.uniform(0.9, 1.1, 3) / body.scale
                turn = _point(rng.uniform(-45, 45, 3))
                return Mass(organ, centre=_point(points[0]), radii=_point(radii), turn=turn)
    return None


def _organ(name: str) -> Solid:
    """The solid of an organ, or of a pair of organs."""
    kind = name.removeprefix("right_").removeprefix("left_")
    return next(solid for solid in atlas().solids if solid.organ == kind)


def _point(values: Iterable[float]) -> Point:
    z, y, x = map(float, values)
    return z, y, x
