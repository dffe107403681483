"""How well anatomy is found in another scan: landmarks of real chests, and of cut phantoms.

    OMP_NUM_THREADS=1 python -m benchmarks.anatomy --ct ../shared/ct --seeds 101 102 103

Prints, for the body frame and for matching: distance to the true place in mm (median and mean), the
share of pairs kept, and for phantoms the share of anatomy kept that the other scan does not show.
A pair is kept when the match can be trusted and its place is at least 10 mm inside the scan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.volume import Volume
from pipeline.match import Features, match_place
from pipeline.match_files import describe_volume, read_scan
from pipeline.phantom.patients import draw_phantom

PHANTOMS, CUT_MM = 6, 90.0
CHESTS = {
    "LIDC-IDRI-0001": "LIDC-IDRI-0001.nii.gz",
    "TCGA-34-2605": "TCGA-34-2605.nii.gz",
    "CMB-CRC-MSB-01068": "CMB-CRC-MSB-01068.nii.gz",
    "4D-Lung-113_HM10395": "4D-Lung-113_HM10395.nii.gz",
    "Lung_Dx-A0002": "Lung_Dx-A0002",
}


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan: its features, the true places of its landmarks, and its length along z."""

    features: Features
    landmarks: dict[str, NDArray[np.float64]]
    depth_mm: float

    def shows(self, place: NDArray[np.float64]) -> bool:
        return bool(10 <= place[0] <= self.depth_mm - 10)


def real_scans(ct: Path) -> list[Scan]:
    marks = json.loads((ct / "landmarks.json").read_text())
    scans = []
    for name, file in CHESTS.items():
        volume = read_scan(ct / "archive" / file)
        places = {k: np.array(v, float) for k, v in marks[name].items()}
        scans.append(Scan(describe_volume(volume), places, float(volume.edges_mm[1, 0])))
    return scans


def phantom_scans(seed: int) -> list[Scan]:
    """Trunks of one population, each cut at random at both ends."""
    scans = []
    for index in range(PHANTOMS):
        phantom = draw_phantom(seed, index, matrix=128, protocol="chest-abdomen")
        hu = np.maximum(phantom.render(), -1024).astype(np.int16)
        rng = np.random.default_rng([seed, index])
        first, last = (int(mm / phantom.spacing_mm[0]) for mm in rng.uniform(0, 2 * CUT_MM, 2))
        part = Volume(hu=hu[first : len(hu) - last], spacing_mm=phantom.spacing_mm)
        shift = np.array([first * phantom.spacing_mm[0], 0, 0])
        places = {k: np.array(v) - shift for k, v in phantom.landmarks().items()}
        scans.append(Scan(describe_volume(part), places, float(part.edges_mm[1, 0])))
    return scans


def pairs(scans: list[Scan]) -> Iterator[tuple[Scan, Scan, str]]:
    for one, other in itertools.permutations(scans, 2):
        for name in sorted(one.landmarks.keys() & other.landmarks.keys()):
            if one.shows(one.landmarks[name]):
                yield one, other, name


def measure(title: str, scans: list[Scan]) -> None:
    frame, found, wrong, absent, present, seconds = [], [], 0, 0, 0, 0.0
    for one, other, name in pairs(scans):
        place, truth = one.landmarks[name], other.landmarks[name]
        began = time.perf_counter()
        match = match_place(place, one.features, other.features)
        seconds += time.perf_counter() - began
        kept = match is not None and match.problem() is None and other.shows(match.place_mm)
        if not other.shows(truth):
            absent, wrong = absent + 1, wrong + kept
            continue
        present += 1
        axes = slice(0, 1) if name.endswith("_z") else slice(None)
        (low, high), (other_low, other_high) = one.features.box_mm, other.features.box_mm
        by_frame = other_low + (place - low) / (high - low) * (other_high - other_low)
        frame.append(np.linalg.norm((by_frame - truth)[axes]))
        if match is not None and kept:
            found.append(np.linalg.norm((match.place_mm - truth)[axes]))
    num = absent + present
    share_wrong = f"{wrong / absent:.0%} of {absent}" if absent else "-"
    print(
        f"| {title} | {present} | {np.median(frame):.1f} / {np.mean(frame):.1f} |"
        f" {np.median(found):.1f} / {np.mean(found):.1f} | {len(found) / present:.0%} |"
        f" {share_wrong} | {1000 * seconds / num:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ct", type=Path, help="folder of real volumes, with landmarks.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=[101, 102, 103])
    arguments = parser.parse_args()
    print("| scans | pairs | frame, mm (median / mean) | matched, mm | kept | absent kept | ms |")
    print("|---|---|---|---|---|---|---|")
    if arguments.ct:
        measure("real chests", real_scans(arguments.ct))
    for seed in arguments.seeds:
        measure(f"phantoms, seed {seed}", phantom_scans(seed))


if __name__ == "__main__":
    main()
