"""How well anatomy is found in another scan.

    export OMP_NUM_THREADS=1
    python -m benchmarks.anatomy landmarks --ct CT --seeds 101 102 103 [--varied]
    python -m benchmarks.anatomy masks --ct CT --seeds 101 [--varied]
    python -m benchmarks.anatomy store STORE

landmarks: distance to the true place in mm, for the body frame and for matching, the share of pairs
kept, and the share kept of anatomy that the other scan does not show. A pair is kept when the match
can be trusted and its place is at least `--margin` mm inside the scan along z.

masks: organ masks carried to another scan by matches on a grid. Dice, by organ, where the true mask
is known: phantoms, altered copies of real scans, and lungs, which are the air in the body. Else the
place of the carina, and whether a carried mask holds one tissue. "By frame" is the mask carried by
the body frame, without matching.

store: by class, the probability that two members (of different patients) have more similar tissue
than a member and a crop of another class. This is no correlation, unlike `store.quality`: it
compares the shares of air, lung, fat, soft tissue and bone in the eight parts of each base crop.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from benchmarks.scans import (
    AIR_IN_BODY_HU,
    Labels,
    Place,
    Scan,
    abdomen_with_organs,
    altered_copy,
    chests_with_lungs,
    phantom_scans,
    real_abdomens,
    real_chests,
)
from pipeline.match import match_place
from store.quality import TISSUES, share_above
from store.reader import PatchStore

PHANTOMS = 6
MIN_MATCHES = 20
"""Fewest trusted places from which a mask is carried; and how many decide each displacement."""
MASK_STEP_MM, MIN_VOXELS = 4.0, 30
"""Distance of the voxels at which masks are compared; fewest of a mask whose tissue is shown."""
BALL_MM, BONE_HU, SAME_HU = 10.0, 150, 40
"""Radius of the ball at the carina; bone is above, one tissue is this near to its median."""


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
        frame.append(np.linalg.norm((by_frame(place, one, other) - truth)[axes]))
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


def by_frame(place: Place, here: Scan, there: Scan) -> Place:
    """Places (..., 3) of the same coordinate in the body box of another scan, in mm."""
    (low, high), (other_low, other_high) = here.features.box_mm, there.features.box_mm
    return np.asarray(other_low + (place - low) / (high - low) * (other_high - other_low))


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
        measure("real chests", real_chests(arguments.ct), arguments.margin)
    for seed in arguments.seeds:
        measure(f"phantoms, seed {seed}", draw_scans(arguments, seed), arguments.margin)


def draw_scans(arguments: argparse.Namespace, seed: int) -> list[Scan]:
    return phantom_scans(
        seed, varied=arguments.varied, num=arguments.phantoms, matrix=arguments.matrix
    )


# Masks


@dataclass(frozen=True, slots=True)
class Field:
    """Where voxels of a target lie in a source: by matching, and by the body frame."""

    source: Scan
    target: Scan
    voxels: NDArray[np.int64]
    """(n, 3), about `MASK_STEP_MM` apart, within reach of a trusted match."""
    matched_mm: Place
    framed_mm: Place
    """(n, 3) in the source."""


def match_field(source: Scan, target: Scan, step_mm: float) -> Field:
    """Match places every `step_mm` of the target to the source.

    The displacements of the trusted ones are interpolated smoothly, up to `step_mm` from them.
    """
    low, high = target.features.box_mm
    axes = [np.arange(a + step_mm / 2, b, step_mm) for a, b in zip(low, high, strict=True)]
    places, moves = [], []
    for place in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3):
        match = match_place(place, target.features, source.features)
        if match is not None and match.problem() is None:
            places.append(place)
            moves.append(match.place_mm - place)
    if len(places) < MIN_MATCHES:
        return Field(source, target, np.zeros((0, 3), np.int64), np.zeros((0, 3)), np.zeros((0, 3)))
    thin = thinning(target)
    grid = [np.arange(0, n, step) for n, step in zip(target.volume.hu.shape, thin, strict=True)]
    voxels = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3)
    reach = cKDTree(np.array(places)).query(voxels * target.spacing_mm)[0] <= step_mm
    voxels = voxels[reach]
    centres = voxels * target.spacing_mm
    moves_at = RBFInterpolator(
        np.array(places), np.array(moves), neighbors=MIN_MATCHES, smoothing=10.0
    )
    matched_mm = centres + moves_at(centres)
    low, high = source.volume.edges_mm
    inside = ((matched_mm >= low) & (matched_mm < high)).all(axis=1)
    framed_mm = by_frame(centres[inside], target, source)
    return Field(source, target, voxels[inside], matched_mm[inside], framed_mm)


def thinning(scan: Scan) -> NDArray[np.int64]:
    """Every how many voxels along each axis a mask is compared."""
    return np.maximum(np.rint(MASK_STEP_MM / scan.spacing_mm), 1).astype(np.int64)


def labels_at(scan: Scan, places_mm: Place) -> Labels:
    """Labels of the nearest voxels; 0 outside the scan."""
    index = np.rint(places_mm / scan.spacing_mm).astype(int)
    inside = ((index >= 0) & (index < scan.labels.shape)).all(axis=1)
    labels = np.zeros(len(index), np.uint8)
    labels[inside] = scan.labels[tuple(index[inside].T)]
    return labels


def dice_by_organ(field: Field, places_mm: Place) -> dict[str, float]:
    """Dice of the organs that both scans have, only where the field is known."""
    source, target, dice = field.source, field.target, {}
    carried, truth = labels_at(source, places_mm), target.labels[tuple(field.voxels.T)]
    for organ in source.organs.keys() & target.organs.keys():
        one, other = carried == source.organs[organ], truth == target.organs[organ]
        if other.any():
            dice[organ] = float(2 * np.sum(one & other) / (np.sum(one) + np.sum(other)))
    return dice


def compare_masks(arguments: argparse.Namespace) -> None:
    """Masks of phantoms are carried to the next patient, those of real scans to other scans."""

    def fields(pairs: Iterable[tuple[Scan, Scan]]) -> list[Field]:
        return [match_field(source, target, arguments.step) for source, target in pairs]

    for seed in arguments.seeds:
        scans = draw_scans(arguments, seed)
        compare_dice(f"phantoms, seed {seed}", fields(itertools.pairwise(scans)))
    if not arguments.ct:
        return
    abdomen, chests = abdomen_with_organs(arguments.ct), chests_with_lungs(arguments.ct)
    for scan in (abdomen, chests[0]):
        compare_dice(f"altered copy of {scan.name}", fields([(scan, altered_copy(scan))]))
    to_chests = fields((chests[0], chest) for chest in chests[1:])
    compare_dice(f"{chests[0].name} to other chests", to_chests)
    compare_carina(to_chests)
    compare_tissue_of_masks(fields((abdomen, scan) for scan in real_abdomens(arguments.ct)))


def compare_dice(title: str, fields: list[Field]) -> None:
    matched: dict[str, list[float]] = {}
    framed: dict[str, list[float]] = {}
    for field in fields:
        for found, places in ((matched, field.matched_mm), (framed, field.framed_mm)):
            for organ, dice in dice_by_organ(field, places).items():
                found.setdefault(organ, []).append(dice)
    print(f"\n| {title} | pairs | Dice, median | lowest | by frame, median |")
    print("|---|---|---|---|---|")
    for organ, values in sorted(matched.items()):
        print(
            f"| {organ} | {len(values)} | {np.median(values):.2f} | {min(values):.2f} |"
            f" {np.median(framed[organ]):.2f} |"
        )


def compare_carina(fields: list[Field]) -> None:
    """A ball around the centre of the mask is carried; distance of its centre to the landmark."""
    print("\n| carina of | carried, mm | by frame, mm |")
    print("|---|---|---|")
    for field in fields:
        truth, distances = field.target.landmarks["carina"], []
        for places in (field.matched_mm, field.framed_mm):
            ball = np.linalg.norm(places - field.source.landmarks["carina"], axis=1) <= BALL_MM
            if ball.any():
                centre = (field.voxels[ball] * field.target.spacing_mm).mean(axis=0)
                distances.append(f"{np.linalg.norm(centre - truth):.1f}")
            else:
                distances.append("-")
        print(f"| {field.target.name} | {' | '.join(distances)} |")


def compare_tissue_of_masks(fields: list[Field]) -> None:
    """Whether carried masks hold one tissue, as in the source: their true place is not known."""
    for field in fields:
        source, target = field.source, field.target
        hu = target.volume.hu[tuple(field.voxels.T)]
        matched, framed = (labels_at(source, p) for p in (field.matched_mm, field.framed_mm))
        size = np.prod(thinning(target) * target.spacing_mm) / np.prod(source.spacing_mm)
        print(
            f"\n| to {target.name} | volume / source | HU | source | tissue | by frame | source |"
        )
        print("|---|---|---|---|---|---|---|")
        for organ, label in source.organs.items():
            own, found = source.volume.hu[source.labels == label], hu[matched == label]
            middle_hu = f"{np.median(found):.0f}" if len(found) else "-"
            print(
                f"| {organ} | {len(found) * size / len(own):.2f} | {middle_hu} |"
                f" {np.median(own):.0f} | {share_of_tissue(organ, found)} |"
                f" {share_of_tissue(organ, hu[framed == label])} | {share_of_tissue(organ, own)} |"
            )


def share_of_tissue(organ: str, hu: NDArray[np.int16]) -> str:
    """Share of voxels of the organ's tissue: air, bone, or within 40 HU of the median."""
    if len(hu) < MIN_VOXELS:
        return "-"
    if organ == "lungs":
        return f"{np.mean(hu < AIR_IN_BODY_HU):.0%}"
    if organ in {"ribs", "vertebrae"}:
        return f"{np.mean(hu > BONE_HU):.0%}"
    return f"{np.mean(np.abs(hu - np.median(hu)) <= SAME_HU):.0%}"


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
    masks.add_argument("--ct", type=Path, help="folder of real volumes, with masks")
    masks.add_argument("--step", type=float, default=32.0, help="distance of matched places, mm")
    masks.set_defaults(compare=compare_masks)
    store = commands.add_parser("store")
    store.add_argument("store", type=Path)
    store.set_defaults(compare=compare_tissue)
    arguments = parser.parse_args()
    arguments.compare(arguments)


if __name__ == "__main__":
    main()
