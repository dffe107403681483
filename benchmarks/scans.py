"""Scans with known anatomy for `benchmarks.anatomy`: real ones and phantoms."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)
from numpy.typing import NDArray

from pipeline.archive.volume import Volume
from pipeline.body import body_mask
from pipeline.features import Features
from pipeline.match_files import describe_volume, read_scan
from pipeline.phantom.patients import draw_phantom
from pipeline.phantom.solids import LABELS
from trainer.finetuning.images import read_image, to_lps

Place = NDArray[np.float64]
Labels = NDArray[np.uint8]

CUT_MM = 90.0
CHESTS = {
    "LIDC-IDRI-0001": "LIDC-IDRI-0001.nii.gz",
    "TCGA-34-2605": "TCGA-34-2605.nii.gz",
    "CMB-CRC-MSB-01068": "CMB-CRC-MSB-01068.nii.gz",
    "4D-Lung-113_HM10395": "4D-Lung-113_HM10395.nii.gz",
    "Lung_Dx-A0002": "Lung_Dx-A0002",
}
ABDOMENS = ("CRLM-CT-1004", "C3L-00189", "ACRIN-FLT-Breast_001-b", "4D-Lung-113_HM10395")
"""All or a part of the organs of TOTALSEG are in these; the last one is a chest."""
TOTALSEG = {
    "spleen": (1,),
    "kidneys": (2, 3),
    "liver": (5,),
    "lungs": range(10, 15),
    "vertebrae": range(26, 51),
    "aorta": (52,),
    "back muscles": (86, 87),
    "ribs": range(92, 116),
}
"""Numbers of TotalSegmentator's labels (version 2) by organ."""
TOTALSEG_FIRST_SLICE = 82
"""The labels' origin is that of the whole scan, but they are of its upper 30 slices: only there has
each label one tissue (HU deviate by 30 within a label, and by 48 and more at any other slice)."""
AIR_IN_BODY_HU = -500


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan: its features, the true places of its landmarks, its organs."""

    name: str
    volume: Volume
    features: Features
    landmarks: dict[str, Place]
    """(z, y, x) in mm."""
    labels: Labels
    """(Z, Y, X) organs, 0 where unknown; empty if all are unknown."""
    organs: dict[str, int] = field(default_factory=dict)
    """Label by name."""

    @property
    def spacing_mm(self) -> Place:
        return np.array(self.volume.spacing_mm)

    def shows(self, place: Place, margin_mm: float) -> bool:
        depth_mm = float(self.volume.edges_mm[1, 0])
        return bool(margin_mm <= place[0] <= depth_mm - margin_mm)


def make_scan(
    name: str,
    volume: Volume,
    *,
    landmarks: dict[str, Place] | None = None,
    labels: Labels | None = None,
    organs: dict[str, int] | None = None,
) -> Scan:
    unknown = np.zeros((0, 0, 0), np.uint8)
    return Scan(
        name,
        volume,
        describe_volume(volume),
        landmarks or {},
        unknown if labels is None else labels,
        organs or {},
    )


def phantom_scans(seed: int, *, varied: bool, num: int, matrix: int) -> list[Scan]:
    """Trunks of one population, each cut at random at both ends."""
    scans = []
    for index in range(num):
        phantom = draw_phantom(seed, index, matrix=matrix, protocol="chest-abdomen", varied=varied)
        hu = np.maximum(phantom.render(), -1024).astype(np.int16)
        rng = np.random.default_rng([seed, index])
        first, last = (int(mm / phantom.spacing_mm[0]) for mm in rng.uniform(0, 2 * CUT_MM, 2))
        part = slice(first, len(hu) - last)
        shift = np.array([first * phantom.spacing_mm[0], 0, 0])
        scan = make_scan(
            f"phantom {index}",
            Volume(hu=hu[part], spacing_mm=phantom.spacing_mm),
            landmarks={k: np.array(v) - shift for k, v in phantom.landmarks().items()},
            labels=phantom.render_masks()[part],
            organs={organ: label for organ, label in LABELS.items() if label},
        )
        scans.append(scan)
    return scans


def real_chests(ct: Path) -> list[Scan]:
    """Chests at full resolution, with landmarks."""
    marks = read_landmarks(ct)
    return [
        make_scan(name, read_scan(ct / "archive" / file), landmarks=marks[name])
        for name, file in CHESTS.items()
    ]


def read_landmarks(ct: Path) -> dict[str, dict[str, Place]]:
    """Places by scan and name."""
    marks = json.loads((ct / "landmarks.json").read_text())
    return {
        scan: {name: np.array(place, float) for name, place in places.items()}
        for scan, places in marks.items()
    }


def chests_with_lungs(ct: Path) -> list[Scan]:
    """Chests of 2 mm: lungs are the air in the body. The first one has masks of other organs, too.

    Its carina is the centre of a mask, not the landmark.
    """
    marks = read_landmarks(ct)
    scans: list[Scan] = []
    for name in sorted(CHESTS):
        file = ct / "archive-2mm" / f"{name}.nii.gz"
        volume = read_scan(file)
        hu = volume.hu.astype(np.float32)
        lungs = (hu < AIR_IN_BODY_HU) & body_mask(hu, volume.spacing_mm)
        organs, labels, landmarks = {"lungs": 1}, lungs.astype(np.uint8), marks[name]
        if not scans:
            organs |= {"Vertebra": 2, "LN": 3, "Tumor": 4}
            for organ in ("Vertebra", "LN", "Tumor"):
                labels[_read_labels(_mask_file(ct, name, f"{organ}_c40"), file) > 0] = organs[organ]
            carina = np.argwhere(_read_labels(_mask_file(ct, name, "Carina_c40"), file))
            landmarks = {"carina": carina.mean(axis=0) * volume.spacing_mm}
        scans.append(make_scan(name, volume, landmarks=landmarks, labels=labels, organs=organs))
    return scans


def abdomen_with_organs(ct: Path) -> Scan:
    """A scan of 3 mm with labels of many organs in its upper 90 mm."""
    name = "totalseg_example_ct"
    file = ct / "small" / f"{name}.nii.gz"
    numbers = _read_labels(_mask_file(ct, name, "example_seg"), file, TOTALSEG_FIRST_SLICE)
    labels, organs = np.zeros_like(numbers), {}
    for label, (organ, members) in enumerate(TOTALSEG.items(), 1):
        labels[np.isin(numbers, tuple(members))] = label
        organs[organ] = label
    return make_scan(name, read_scan(file), labels=labels, organs=organs)


def real_abdomens(ct: Path) -> list[Scan]:
    """Scans of 2 mm that show the upper abdomen, without masks."""
    return [make_scan(name, read_scan(ct / "archive-2mm" / f"{name}.nii.gz")) for name in ABDOMENS]


def _mask_file(ct: Path, scan: str, mask: str) -> Path:
    return ct / "small" / "masks" / f"{scan}__{mask}.nii.gz"


def _read_labels(file: Path, scan: Path, first_slice: int = 0) -> Labels:
    """Labels on the grid of a scan, turned to LPS: the nearest one in space, 0 beyond them.

    first_slice
        How many of its slices the mask lies higher than its header says.
    """
    mask = read_image(file)
    mask.SetOrigin(mask.TransformIndexToPhysicalPoint((0, 0, first_slice)))
    grid = read_image(scan)
    on_grid = sitk.Resample(mask, grid, sitk.Transform(), sitk.sitkNearestNeighbor)
    labels: Labels = sitk.GetArrayFromImage(to_lps(on_grid)).astype(np.uint8)
    assert labels.any(), f"{file} does not overlap {scan}"
    return labels


def altered_copy(scan: Scan) -> Scan:
    """The scan cut along all axes, 10 % larger and with noise of 30 HU."""
    z, y, x = scan.labels.shape
    part = np.s_[z // 5 :, y // 12 :, : x - x // 16]
    rng = np.random.default_rng([z, y, x])
    hu = scan.volume.hu[part] + np.rint(rng.normal(0, 30, scan.volume.hu[part].shape))
    z_mm, y_mm, x_mm = (1.1 * mm for mm in scan.volume.spacing_mm)
    return make_scan(
        f"copy of {scan.name}",
        Volume(hu=hu.astype(np.int16), spacing_mm=(z_mm, y_mm, x_mm)),
        labels=scan.labels[part],
        organs=scan.organs,
    )
