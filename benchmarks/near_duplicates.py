"""Which changed copies of a scan are found as near-duplicates, and how similar other scans are.

    python -m benchmarks.near_duplicates archive-2mm sts

Copies are made of the first scans of the first folder. They are searched for among all scans of all
folders and some phantoms, one kind and seed of copies at a time. "Second acquisition": the scan is
deformed smoothly, as by another breath and position, and gets other noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.archive.folders import find_folders, resolve_archive
from pipeline.archive.headers import read_folder
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail, resample
from pipeline.frame import frame_box
from pipeline.near_duplicates import (
    MIN_SIMILARITY,
    as_volume,
    describe_cells,
    find_candidates,
    similarity,
)
from pipeline.phantom.patients import draw_phantom
from store.format import THUMBNAIL_SHAPE
from store.images import Rejected

CONFIG = PrepareConfig()
Array = NDArray[Any]
Rng = np.random.Generator


def changed(scan: Volume, hu: Array, scale: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    z, y, x = np.multiply(scan.spacing_mm, scale)
    return Volume(hu=np.clip(np.rint(hu), -1024, 3071).astype(np.int16), spacing_mm=(z, y, x))


def on_grid(scan: Volume, scale: tuple[float, float, float], first: float = 0) -> Volume:
    """Resampled to other spacing; `first` is the shift in voxels."""
    spacing = np.multiply(scan.spacing_mm, scale)
    shape = np.floor(np.divide(scan.hu.shape, scale)).astype(int)
    start = scan.edges_mm[0] + first * spacing
    return changed(
        scan, resample(scan, origin_mm=start, extent_mm=shape * spacing, shape=shape), scale
    )


def smoothed(scan: Volume) -> Array:
    return ndimage.gaussian_filter(scan.hu.astype(np.float32), (0, 0.6, 0.6))


def sharp(scan: Volume, noise_hu: float, rng: Rng) -> Volume:
    hu = scan.hu + (scan.hu - smoothed(scan)) + rng.normal(0, noise_hu, scan.hu.shape)
    return changed(scan, hu)


def thick(scan: Volume) -> Volume:
    return changed(scan, 0.5 * (scan.hu[:-1:2] + scan.hu[1::2]), (2, 1, 1))


def cropped(scan: Volume, share: float, axes: tuple[int, ...], rng: Rng) -> Volume:
    """Without `share` of the body's extent along some axes, at both ends in random parts."""
    low, high = frame_box(scan, "body") / scan.spacing_mm + 0.5
    parts = [slice(None)] * 3
    for axis in axes:
        loss, part = share * (high[axis] - low[axis]), rng.uniform(0.25, 0.75)
        first, last = low[axis] + loss * part, high[axis] - loss * (1 - part)
        parts[axis] = slice(max(0, round(first)), round(last))
    return Volume(hu=scan.hu[tuple(parts)], spacing_mm=scan.spacing_mm)


def deformed(scan: Volume, rms_mm: float, rng: Rng) -> Volume:
    """Moved by smooth random fields, about 40 mm from one node to the next, and 20 HU of noise."""
    shape = scan.hu.shape
    nodes = [max(2, round(n * s / 40)) for n, s in zip(shape, scan.spacing_mm, strict=True)]
    moved = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)
    for axis in range(3):
        field = ndimage.zoom(rng.normal(size=nodes), np.divide(shape, nodes), order=1)
        moved[axis] += (field - field.mean()) * rms_mm / field.std() / scan.spacing_mm[axis]
    hu = ndimage.map_coordinates(scan.hu.astype(np.float32), moved, order=1, mode="nearest")
    return changed(scan, hu + rng.normal(0, 20, shape))


COPIES: Final[dict[str, Callable[[Volume], Volume]]] = {
    "resampled to 1.3 x the spacing": lambda scan: on_grid(scan, (1.3, 1.3, 1.3)),
    "shifted by half a voxel": lambda scan: on_grid(scan, (1, 1, 1), 0.5),
    "smooth kernel": lambda scan: changed(scan, smoothed(scan)),
    "slices of twice the thickness": thick,
    "clipped to -1000..400 HU": lambda scan: changed(scan, np.clip(scan.hu, -1000, 400)),
    "clipped to -500..300 HU": lambda scan: changed(scan, np.clip(scan.hu, -500, 300)),
    "rounded to 16 HU": lambda scan: changed(scan, scan.hu // 16 * 16),
    "mirrored left to right": lambda scan: changed(scan, scan.hu[:, :, ::-1]),
    "turned upside down": lambda scan: changed(scan, scan.hu[::-1]),
    "half of the slices": lambda scan: changed(scan, scan.hu[len(scan.hu) // 2 :]),
}
RANDOM_COPIES: Final[dict[str, Callable[[Volume, Rng], Volume]]] = {
    "sharp kernel, noise of 40 HU": lambda scan, rng: sharp(scan, 40, rng),
    "body cut by 10 % in-plane": lambda scan, rng: cropped(scan, 0.1, (1, 2), rng),
    "body cut by 20 % in-plane": lambda scan, rng: cropped(scan, 0.2, (1, 2), rng),
    "body cut by 30 % in-plane": lambda scan, rng: cropped(scan, 0.3, (1, 2), rng),
    "40 % of the slices missing": lambda scan, rng: cropped(scan, 0.4, (0,), rng),
    "sharp, thick, and cut by 10 %": lambda scan, rng: cropped(
        sharp(thick(scan), 30, rng), 0.1, (1, 2), rng
    ),
    "second acquisition, 3 mm": lambda scan, rng: deformed(scan, 3, rng),
}


def read_scans(folder: Path) -> list[Volume]:
    scans = []
    for found in find_folders(resolve_archive(folder)):
        for series in read_folder(found, CONFIG):
            if series.reason is None:
                try:
                    scan = read_volume(series, CONFIG)
                except Rejected:
                    continue
                in_plane = max(1, 3 / scan.spacing_mm[1])  # fast, and as fine as thumbnails
                scans.append(on_grid(scan, (1, in_plane, in_plane)))
    return scans


class Seen:
    """What a survey keeps of a scan."""

    def __init__(self, scan: Volume) -> None:
        box = frame_box(scan, "body")
        thumbnail = make_thumbnail(scan, box, THUMBNAIL_SHAPE, CONFIG)
        self.volume = as_volume(thumbnail, box, CONFIG.window_hu)
        self.cells = describe_cells(thumbnail, CONFIG.window_hu)


def candidates(seen: list[Seen]) -> list[tuple[int, int, tuple[int, ...]]]:
    cells = np.stack([one.cells for one in seen])
    return [tuple(one) for one in find_candidates(cells, np.arange(len(seen)))]


def measure(copies: list[Seen], others: list[Seen]) -> list[float]:
    """Similarity of each copy to its scan, the first of `others`; -1 if it is no candidate."""
    start = len(others)
    pairs = {(a, b - start): flips for a, b, flips in candidates(others + copies) if b >= start}
    return [
        similarity(others[n].volume, copy.volume, pairs[n, n]) if (n, n) in pairs else -1
        for n, copy in enumerate(copies)
    ]


def show(name: str, found: list[float]) -> None:
    similar = [s for s in found if s > -1]
    spread = f"{min(similar):.3f}  {np.median(similar):.3f}  {max(similar):.3f}" if similar else ""
    share = sum(s >= MIN_SIMILARITY for s in found)
    print(f"{name:32s} {share:4d} of {len(found):4d}  {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--copied", type=int, default=5, help="Scans that are copied.")
    parser.add_argument("--phantoms", type=int, default=40)
    options = parser.parse_args()
    volumes = [read_scans(folder) for folder in options.folders]
    scans = volumes[0][: options.copied]
    others = [Seen(scan) for folder in volumes for scan in folder]
    for number in range(options.phantoms):
        phantom = draw_phantom(0, number, matrix=96, varied=number % 2 == 1)
        hu = np.maximum(phantom.render(), -1024)
        others.append(Seen(Volume(hu=hu, spacing_mm=phantom.spacing_mm)))
    print(f"{'':32s} {'found':12s}  similarity of candidates: least, median, greatest")
    apart = [similarity(others[a].volume, others[b].volume, f) for a, b, f in candidates(others)]
    show("different scans (candidates)", apart)
    for name, copy in COPIES.items():
        show(name, measure([Seen(copy(scan)) for scan in scans], others))
    for name, random_copy in RANDOM_COPIES.items():
        found = []
        for seed in range(options.seeds):
            rng = [np.random.default_rng([seed, number]) for number in range(len(scans))]
            copies = [Seen(random_copy(*pair)) for pair in zip(scans, rng, strict=True)]
            found += measure(copies, others)
        show(name, found)


if __name__ == "__main__":
    main()
