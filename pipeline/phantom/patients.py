"""Synthetic CT patients whose anatomy is known at every point.

A smooth, invertible map deforms the *atlas* into each patient. The HU of a voxel is that of the
atlas at the voxel's mapped position, with table, noise and padding added. Varied patients may also
have arms and disease, which the atlas lacks. So a point of one patient
is known exactly in another one: `b.from_atlas(a.to_atlas(points_mm))`.

Axes are z, y, x everywhere and grow to the head, the back and the patient's left (LPS). Scan
positions are in mm from the centre of voxel (0, 0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.phantom.arms import Arms, draw_arms, draw_pose
from pipeline.phantom.atlas import LANDMARKS, TRUNK
from pipeline.phantom.deformation import Deformation
from pipeline.phantom.disease import Disease, anatomy, draw_disease, labels_at
from pipeline.phantom.solids import AIR, EDGE_MM, LABELS, Field, Painting, Point
from pipeline.phantom.variation import cut_ends, vary_build

COVERAGE_MM: Final[dict[str, tuple[float, float]]] = {  # lowest and highest atlas z
    "chest": (-205.0, 108.0),
    "abdomen": (-455.0, -92.0),
    "chest-abdomen": (-455.0, 108.0),
}
ORIENTATIONS: Final = ("LPS", "RAS", "LAS", "LPI", "RPI", "PSR", "SAL")
TABLE_RADIUS_MM: Final = 430.0
SLAB_VOXELS: Final = 2**19  # rendered at once, which bounds memory
BODY, SCAN, STORAGE, NOISE, BUILD, CUT, ARMS, DISEASE = range(8)  # roles of the random generators


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """One synthetic patient and the parameters of the scan; made by `draw_phantom`."""

    seed: int
    index: int
    protocol: str  # a key of COVERAGE_MM
    size: tuple[int, int, int]  # voxels along z, y, x
    spacing_mm: Point
    origin_mm: Point  # world position of voxel (0, 0, 0), LPS
    deformation: Deformation
    contrast: float  # 0 native, 1 blood at about 235 HU
    noise_hu: float  # standard deviation
    table_mm: float | None  # y of the table's lowest line, if there is a table
    padding_hu: int | None  # outside the circular field of view, if that is marked
    orientation: str  # of the NIfTI file
    signed: bool  # pixels of the DICOM files
    varied: bool = False
    arms: Arms | None = None
    disease: Disease | None = None

    def to_atlas(self, points_mm: Field) -> Field:
        """Atlas positions (n, 3) of scan positions (n, 3), both z, y, x in mm."""
        return np.stack(self.deformation.to_atlas(*np.asarray(points_mm, np.float64).T), axis=1)

    def from_atlas(self, points: Field) -> Field:
        """Scan positions (n, 3) of atlas positions (n, 3); they may lie outside the scan."""
        return np.stack(self.deformation.from_atlas(*np.asarray(points, np.float64).T), axis=1)

    def anatomy_hu(self, points_mm: Field) -> Field:
        """HU (n,) of the body at scan positions (n, 3), without noise and table."""
        points_mm = np.asarray(points_mm, np.float64)
        order = np.argsort(points_mm[:, 0])  # painting is fast where z grows along the block
        z, y, x = points_mm[order].T[:, :, None, None]
        hu = np.empty(len(points_mm))
        hu[order] = self._paint_hu(anatomy(self.disease), z, y, x)[:, 0, 0]
        return hu

    def landmarks(self) -> dict[str, Point]:
        """The named points within the scan and outside the disease, (z, y, x) in mm."""
        last = (np.array(self.size) - 1) * self.spacing_mm
        points = np.array(list(LANDMARKS.values()), np.float64)
        points_mm = self.from_atlas(points)
        shown = np.all((points_mm >= 0) & (points_mm <= last), axis=1)
        if self.disease is not None:
            shown &= labels_at(anatomy(self.disease), points) != LABELS[self.disease.kind]
        return {
            name: tuple(point.tolist())
            for name, point, visible in zip(LANDMARKS, points_mm, shown, strict=True)
            if visible
        }

    def render(self) -> NDArray[np.int16]:
        """The scan, int16 HU of shape `size`; the same bytes every time."""
        scan, body = np.empty(self.size, np.int16), anatomy(self.disease)
        for start, z, y, x in self._slabs():
            hu = np.maximum(self._paint_hu(body, z, y, x), self._table(y[0], x[0]))
            for number, image in enumerate(hu, start):
                scan[number] = np.clip(np.rint(image + self._noise(number)), -1024, 3071)
        if self.padding_hu is not None:
            radius = self.spacing_mm[2] * self.size[2] / 2
            scan[:, np.hypot(y[0] - y.mean(), x[0] - x.mean()) > radius] = self.padding_hu
        return scan

    def render_masks(self) -> NDArray[np.uint8]:
        """The true organs, uint8 `LABELS` of shape `size`. Table and padding are background."""
        masks, body = np.zeros(self.size, np.uint8), anatomy(self.disease)
        for start, z, y, x in self._slabs():
            where = self.deformation.to_atlas(z, y, x)
            part = masks[start : start + len(z)]
            if self.arms is not None:
                self.arms.soft.paint_labels(part, *np.broadcast_arrays(z, y, x))
            body.paint_labels(part, *where)
        return masks

    def _slabs(self) -> Iterator[tuple[int, Field, Field, Field]]:
        """Number of a slab's first slice, and its positions in mm, which broadcast."""
        single: Any = np.float32
        axes = zip(self.size, self.spacing_mm, strict=True)
        z, y, x = np.ix_(*((np.arange(n) * step).astype(single) for n, step in axes))
        slab = max(1, SLAB_VOXELS // (self.size[1] * self.size[2]))
        for start in range(0, self.size[0], slab):
            yield start, z[start : start + slab], y, x

    def _paint_hu(self, body: Painting, z: Field, y: Field, x: Field) -> Field:
        """HU of a 3-D block of scan positions, which may broadcast."""
        where = self.deformation.to_atlas(z, y, x)
        hu = np.full(where[0].shape, AIR.hu, where[0].dtype)
        z, y, x = np.broadcast_arrays(z, y, x)
        if self.arms is not None:
            self.arms.soft.paint_hu(hu, z, y, x, contrast=self.contrast)
        body.paint_hu(hu, *where, contrast=self.contrast)
        if self.arms is not None:
            self.arms.hard.paint_hu(hu, z, y, x, contrast=self.contrast)
        return hu

    def _table(self, y: Field, x: Field) -> Field:
        """HU of a curved table top (a shell around foam) in one slice, air elsewhere."""
        radius, middle = TABLE_RADIUS_MM, self.deformation.centre_mm[2]
        top = 1e4 if self.table_mm is None else self.table_mm
        under = np.hypot(y - top + radius, x - middle) - radius
        depth = np.maximum(np.abs(under - 10) - 10, np.abs(x - middle) - 205) * (1 / EDGE_MM)
        hu: Field = 900 * np.clip(0.5 - depth, 0, 1) - 830 * np.clip(-1 - depth, 0, 1) - 1000
        return hu

    def _noise(self, number: int) -> Field:
        rng = np.random.default_rng([self.seed, self.index, NOISE, number])
        noise = rng.standard_normal((self.size[1] + 1, self.size[2] + 1), dtype=np.float32)
        rows: Any = noise[:-1] + noise[1:]
        mixed: Field = rows[:, :-1] + rows[:, 1:]  # four draws: twice the deviation of one
        return mixed * (self.noise_hu / 2)


def draw_phantom(
    seed: int,
    index: int,
    *,
    matrix: int = 256,
    protocol: str | None = None,
    varied: bool = False,
) -> Phantom:
    """Draw patient number `index`.

    matrix
        Voxels along y and x; patient and field of view do not depend on it.
    protocol
        One of `COVERAGE_MM`; drawn at random when None.
    varied
        Draw a harder patient: more varied in build and in the position of organs, cut at both ends,
        some with arms or with a mass or a pleural effusion.

    Scans are at least 180 mm high (varied: 140 mm) and 320 mm wide. Raises ValueError for an
    unknown protocol, a negative seed or index, or a matrix under 16.
    """
    if protocol is not None and protocol not in COVERAGE_MM:
        raise ValueError(f"protocol must be one of {', '.join(COVERAGE_MM)}, got {protocol!r}")
    if min(seed, index) < 0 or matrix < 16:
        raise ValueError(
            f"seed and index must be >= 0 and matrix >= 16, got {seed}, {index} and {matrix}"
        )
    body = _draw_body(np.random.default_rng([seed, index, BODY]))
    arms_rng = np.random.default_rng([seed, index, ARMS])
    pose = draw_pose(arms_rng) if varied else None
    if varied:
        body = vary_build(body, np.random.default_rng([seed, index, BUILD]))
    rng = np.random.default_rng([seed, index, SCAN])
    drawn = str(rng.choice(list(COVERAGE_MM), p=(0.45, 0.2, 0.35)))  # whether or not it is used
    protocol = protocol or drawn
    low, high = np.array(COVERAGE_MM[protocol]) * body.scale[0] + rng.uniform(-16, 16, 2)
    if varied:
        low, high = cut_ends(low, high, np.random.default_rng([seed, index, CUT]))
    slice_mm = float(rng.choice((1.25, 1.5, 2, 2.5, 3, 5), p=(0.1, 0.15, 0.25, 0.25, 0.15, 0.1)))
    girth = 2 * 178 * body.scale[2] * (1 + max(0.3 * body.fat, 0))
    if pose == "down":
        girth += 180
    fov_mm = float(np.clip(girth * rng.uniform(0.97, 1.22), 330, 620 if varied else 500))
    pixel_mm = round(fov_mm / matrix, 4)
    middle = fov_mm / 2 + rng.uniform(-12, 12, 2)
    deformation = replace(
        body,
        centre_mm=(float(-low), float(middle[0]), float(middle[1])),
        turn_rad=float(np.deg2rad(np.clip(rng.normal(0, 2.5), -6, 6))),
    )
    contrast = float(rng.uniform(0.55, 1.1)) if rng.random() < 0.45 else 0.0
    noise_hu = float(rng.uniform(6, 26))
    back_mm = _find_back(deformation, low, high)
    table_mm = back_mm + float(rng.uniform(0, 4)) if rng.random() < 0.88 else None
    padding_hu = int(rng.choice((-2000, -3024))) if rng.random() < 0.15 else None

    size = (int((high - low) // slice_mm) + 1, matrix, matrix)
    spacing_mm = (slice_mm, pixel_mm, pixel_mm)
    arms: Arms | None = None
    disease: Disease | None = None
    if varied:
        if pose is not None:
            middle_mm = deformation.centre_mm[2]
            arms = draw_arms(
                pose,
                deformation,
                lambda x: back_mm - (x - middle_mm) ** 2 / (2 * TABLE_RADIUS_MM),
                arms_rng,
            )
        extent_mm = (np.array(size) - 1) * spacing_mm
        disease = draw_disease(
            deformation, extent_mm, np.random.default_rng([seed, index, DISEASE])
        )

    rng = np.random.default_rng([seed, index, STORAGE])
    corner = [round(float(v), 2) for v in rng.uniform(-60, 20, 3)]
    return Phantom(
        seed=seed, index=index, protocol=protocol,
        size=size, spacing_mm=spacing_mm,
        origin_mm=(corner[0] - 800, corner[1] - 200, corner[2] - 200),
        deformation=deformation, contrast=contrast, noise_hu=noise_hu, table_mm=table_mm,
        padding_hu=padding_hu,
        orientation=str(rng.choice(ORIENTATIONS)) if rng.random() < 0.6 else "LPS",
        signed=bool(rng.random() < 0.4) or padding_hu is not None,
        varied=varied, arms=arms, disease=disease,
    )  # fmt: skip


def _draw_body(rng: np.random.Generator) -> Deformation:
    """The patient's size, fat and waves; not yet placed in a scan."""
    stature = float(np.clip(rng.normal(1, 0.06), 0.86, 1.14))
    scale = tuple((stature * np.clip(rng.normal(1, 0.03, 3), 0.94, 1.06)).tolist())
    fat = float(rng.uniform(-0.4, 0.6))
    waves = []
    for _ in range(4):
        wave = rng.normal(size=3)
        wave *= 2 * np.pi / rng.uniform(190, 330) / np.linalg.norm(wave)
        push = rng.normal(size=3)
        push *= rng.uniform(1.5, 4.0) / np.linalg.norm(push)
        waves.append((tuple(wave.tolist()), float(rng.uniform(0, 2 * np.pi)), tuple(push.tolist())))
    return Deformation(
        centre_mm=(0.0, 0.0, 0.0), turn_rad=0.0, scale=scale, fat=fat, waves=tuple(waves)
    )


def _find_back(deformation: Deformation, low: float, high: float) -> float:
    """Position along y in mm of the lowest line of a table that just touches the patient's back.

    low, high
        The scan's range along z, in mm from the atlas's origin.
    """
    levels = np.arange(
        max(low / deformation.scale[0], -520), min(high / deformation.scale[0], 60), 10.0
    )
    level, angle = np.meshgrid(levels, np.deg2rad(np.arange(-50.0, 51.0, 10.0)))
    _, y, x = deformation.from_atlas(level, *TRUNK.around(level, angle))
    return float((y + (x - deformation.centre_mm[2]) ** 2 / (2 * TABLE_RADIUS_MM)).max())
