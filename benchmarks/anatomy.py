"""How well anatomy is found in another scan.

    export OMP_NUM_THREADS=1
    python -m benchmarks.anatomy landmarks --ct ../shared/ct --seeds 101 102 103 [--varied]
    python -m benchmarks.anatomy masks --seeds 101 [--varied]
    python -m benchmarks.anatomy store STORE

landmarks: distance to the true place in mm, for the body frame and for matching, the share of pairs
kept, and the share kept of anatomy that the other scan does not show. A pair is kept when the match
can be trusted and its place is at least `--margin` mm inside the scan along z.

masks: organ masks of one phantom carried to another one by matches on a grid. Dice, by organ.

store: by class, the probability that two members (of different patients) have more similar tissue
than a member and a crop of another class. This is no correlation, unlike `store.quality`: it
compares the shares of air, lung, fat, soft tissue and bone in the eight parts of each base crop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from pipeline.archive.volume import Volume
from pipeline.features import Features
from pipeline.match import match_place
from pipeline.match_files import describe_volume, read_scan
from pipeline.phantom.patients import draw_phantom
from pipeline.phantom.solids import LABELS
from store.quality import TISSUES, share_above
from store.reader import PatchStore

Points = NDArray[np.int64]

PHANTOMS, CUT_MM = 6, 90.0
MIN_MATCHES = 20
"""Fewest trusted places from which a mask is carried; and how many decide each displacement."""
CHESTS = {
    "LIDC-IDRI-0001": "LIDC-IDRI-0001.nii.gz",
    "TCGA-34-2605": "TCGA-34-2605.nii.gz",
    "CMB-CRC-MSB-01068": "CMB-CRC-MSB-01068.nii.gz",
    "4D-Lung-113_HM10395": "4D-Lung-113_HM10395.nii.gz",
    "Lung_Dx-A0002": "Lung_Dx-A0002",
}


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan: its features, the true places of its landmarks, its length along z, its organs."""

    features: Features
    landmarks: dict[str, NDArray[np.float64]]
    depth_mm: float
    labels: NDArray[np.uint8]
    """(Z, Y, X) true organs of a phantom; empty for a real scan."""
    spacing_mm: NDArray[np.float64]

    def shows(self, place: NDArray[np.float64], margin_mm: float) -> bool:
        return bool(margin_mm <= place[0] <= self.depth_mm - margin_mm)


def real_scans(ct: Path) -> list[Scan]:
    marks = json.loads((ct / "landmarks.json").read_text())
    scans = []
    for name, file in CHESTS.items():
        volume = read_scan(ct / "archive" / file)
        places = {k: np.array(v, float) for k, v in marks[name].items()}
        scans.append(make_scan(volume, places, np.zeros((0, 0, 0), np.uint8)))
    return scans


def phantom_scans(
    seed: int, *, varied: bool = False, num: int = PHANTOMS, matrix: int = 128
) -> list[Scan]:
    """Trunks of one population, each cut at random at both ends."""
    scans = []
    for index in range(num):
        phantom = draw_phantom(seed, index, matrix=matrix, protocol="chest-abdomen", varied=varied)
        hu = np.maximum(phantom.render(), -1024).astype(np.int16)
        rng = np.random.default_rng([seed, index])
        first, last = (int(mm / phantom.spacing_mm[0]) for mm in rng.uniform(0, 2 * CUT_MM, 2))
        part = slice(first, len(hu) - last)
        shift = np.array([first * phantom.spacing_mm[0], 0, 0])
        places = {k: np.array(v) - shift for k, v in phantom.landmarks().items()}
        volume = Volume(hu=hu[part], spacing_mm=phantom.spacing_mm)
        scans.append(make_scan(volume, places, phantom.render_masks()[part]))
    return scans


def make_scan(
    volume: Volume, places: dict[str, NDArray[np.float64]], labels: NDArray[np.uint8]
) -> Scan:
    depth_mm, spacing_mm = float(volume.edges_mm[1, 0]), np.array(volume.spacing_mm)
    return Scan(describe_volume(volume), places, depth_mm, labels, spacing_mm)


def pairs(scans: list[Scan], margin_mm: float) -> Iterator[tuple[Scan, Scan, str]]:
    for one, other in itertools.permutations(scans, 2):
        for name in sorted(one.landmarks.keys() & other.landmarks.keys()):
            if one.shows(one.landmarks[name], margin_mm):
                yield one, other, name


def measure(title: str, scans: list[Scan], margin_mm: float) -> None:
    frame, found, wrong, absent, present, seconds = [], [], 0, 0, 0, 0.0
    for one, other, name in pairs(scans, margin_mm):
        place, truth = one.landmarks[name], other.landmarks[name]
        began = time.perf_counter()
        match = match_place(place, one.features, other.features)
        seconds += time.perf_counter() - began
        kept = (
            match is not None and match.problem() is None and other.shows(match.place_mm, margin_mm)
        )
        if not other.shows(truth, margin_mm):
            absent, wrong = absent + 1, wrong + kept
            continue
        present += 1
        axes = slice(0, 1) if name.endswith("_z") else slice(None)
        (low, high), (other_low, other_high) = one.features.box_mm, other.features.box_mm
        by_frame = other_low + (place - low) / (high - low) * (other_high - other_low)
        frame.append(np.linalg.norm((by_frame - truth)[axes]))
        if match is not None and kept:
            found.append(np.linalg.norm((match.place_mm - truth)[axes]))
    kept_share = len(found) / max(present, 1)
    each_ms = 1000 * seconds / max(absent + present, 1)
    share_wrong = f"{wrong / absent:.0%} of {absent}" if absent else "-"
    near = (
        " / ".join(f"{np.mean(np.array(found) <= mm):.0%}" for mm in (5, 10, 20)) if found else "-"
    )
    print(
        f"| {title} | {present} | {middle(frame)} | {middle(found)} | {near} |"
        f" {kept_share:.0%} | {share_wrong} | {each_ms:.0f} |"
    )


def middle(values_mm: list[np.floating[Any]]) -> str:
    return f"{np.median(values_mm):.1f} / {np.mean(values_mm):.1f}" if values_mm else "-"


def compare_landmarks(arguments: argparse.Namespace) -> None:
    print(
        "| scans | pairs | frame, mm (median / mean) | matched, mm | within 5 / 10 / 20 mm |",
        end="",
    )
    print(" kept | absent kept | ms |")
    print("|---|---|---|---|---|---|---|---|")
    if arguments.ct:
        measure("real chests", real_scans(arguments.ct), arguments.margin)
    for seed in arguments.seeds:
        measure(f"phantoms, seed {seed}", draw_scans(arguments, seed), arguments.margin)


def draw_scans(arguments: argparse.Namespace, seed: int) -> list[Scan]:
    return phantom_scans(
        seed, varied=arguments.varied, num=arguments.phantoms, matrix=arguments.matrix
    )


# Masks


def carry_mask(source: Scan, target: Scan, step_mm: float) -> tuple[NDArray[np.uint8], Points]:
    """Labels of `source` at the voxels (n, 3) of `target` within its trusted matches.

    Places every `step_mm` of the target are matched to the source; the displacements of the
    trusted ones are interpolated smoothly.
    """
    low, high = target.features.box_mm
    axes = [np.arange(a + step_mm / 2, b, step_mm) for a, b in zip(low, high, strict=True)]
    places, moves = [], []
    for place in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3):
        match = match_place(place, target.features, source.features)
        if match is not None and match.problem() is None:
            places.append(place)
            moves.append(match.place_mm - place)
    thin = thinning(target)
    grid = [np.arange(0, n, step) for n, step in zip(target.labels.shape, thin, strict=True)]
    voxels = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3)
    if len(places) < MIN_MATCHES:
        return np.zeros(0, np.uint8), voxels[:0]
    reach = cKDTree(np.array(places)).query(voxels * target.spacing_mm)[0] <= step_mm
    voxels = voxels[reach]
    centres = voxels * target.spacing_mm
    field = RBFInterpolator(
        np.array(places), np.array(moves), neighbors=MIN_MATCHES, smoothing=10.0
    )
    index = np.rint((centres + field(centres)) / source.spacing_mm).astype(int)
    inside = ((index >= 0) & (index < source.labels.shape)).all(axis=1)
    index, voxels = index[inside], voxels[inside]
    return source.labels[tuple(index.T)], voxels


def thinning(scan: Scan) -> NDArray[np.int64]:
    """Every how many voxels along each axis a mask is compared: about 4 mm."""
    return np.maximum(np.rint(4.0 / scan.spacing_mm), 1).astype(np.int64)


def compare_masks(arguments: argparse.Namespace) -> None:
    """Dice by organ, over consecutive patients; only where the field is known."""
    names = {label: name for name, label in LABELS.items()}
    dice: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        scans = draw_scans(arguments, seed)
        for source, target in itertools.pairwise(scans):
            carried, voxels = carry_mask(source, target, arguments.step)
            truth = target.labels[tuple(voxels.T)]
            for label in np.unique(truth[truth > 0]).tolist():
                both = np.sum((carried == label) & (truth == label))
                total = np.sum(carried == label) + np.sum(truth == label)
                dice.setdefault(names[label], []).append(float(2 * both / total))
    print("| organ | pairs | Dice, median | lowest |")
    print("|---|---|---|---|")
    for name, values in sorted(dice.items()):
        print(f"| {name} | {len(values)} | {np.median(values):.2f} | {min(values):.2f} |")


# Stores


def describe_tissue(crops: NDArray[np.int16]) -> NDArray[np.float32]:
    """(n, Z, Y, X) HU -> (n, 40): share of each tissue in the eight parts of each crop."""
    parts = [crops]
    for axis in (1, 2, 3):
        parts = [half for part in parts for half in np.array_split(part, 2, axis=axis)]
    shares = [
        ((part >= low) & (part < high)).mean(axis=(1, 2, 3))
        for part in parts
        for low, high in TISSUES.values()
    ]
    return np.stack(shares, axis=1).astype(np.float32)


def compare_tissue(arguments: argparse.Namespace) -> None:
    store = PatchStore(arguments.store)
    split, scans = store.train, store.scans
    rows = np.flatnonzero(split.scale == 0)
    tissue = np.concatenate([describe_tissue(split.read(part)) for part in batches(rows)])
    label, patient = split.label[rows], scans.patient[split.scan[rows]]
    likeness = -cdist(tissue, tissue, "cityblock").astype(np.float32) / 8
    apart = patient[:, None] != patient
    found = []
    print("| class | members | tissue consistency |")
    print("|---|---|---|")
    for number in np.unique(label).tolist():
        own = label == number
        pairs_own = likeness[np.ix_(own, own)][np.triu(apart[np.ix_(own, own)], 1)]
        null = likeness[np.ix_(own, ~own)][apart[np.ix_(own, ~own)]]
        found.append(share_above(pairs_own, null))
        print(f"| {number} | {own.sum()} | {found[-1]:.3f} |")
    print(f"| median | {len(rows)} | {np.median(found):.3f} |")


def batches(rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return [rows[start : start + 256] for start in range(0, len(rows), 256)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    phantoms = argparse.ArgumentParser(add_help=False)
    phantoms.add_argument("--seeds", type=int, nargs="*", default=[101, 102, 103])
    phantoms.add_argument("--varied", action="store_true", help="phantoms with arms and disease")
    phantoms.add_argument("--phantoms", type=int, default=PHANTOMS, help="for each seed")
    phantoms.add_argument("--matrix", type=int, default=128, help="voxels along y and x")
    landmarks = commands.add_parser("landmarks", parents=[phantoms])
    landmarks.add_argument("--ct", type=Path, help="folder of real volumes, with landmarks.json")
    landmarks.add_argument("--margin", type=float, default=20.0, help="mm inside the scan along z")
    landmarks.set_defaults(compare=compare_landmarks)
    masks = commands.add_parser("masks", parents=[phantoms])
    masks.add_argument("--step", type=float, default=32.0, help="distance of matched places, mm")
    masks.set_defaults(compare=compare_masks)
    store = commands.add_parser("store")
    store.add_argument("store", type=Path)
    store.set_defaults(compare=compare_tissue)
    arguments = parser.parse_args()
    arguments.compare(arguments)


if __name__ == "__main__":
    main()
