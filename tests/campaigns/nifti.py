"""Generated NIfTI headers: what the pipeline reads against what SimpleITK reads.

    python -m tests.campaigns.nifti --files 5000

Data types, byte orders, scaling, q- and s-forms, negative and zero pixdim, units, offsets, gzip
members, axes of length one. A file counts as different when one side reads it and the other does
not (but for spacing that no scan has), or when orientation, spacing or a voxel differ.
"""

import argparse
import gzip
import json
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from pipeline.archive.series import Series
from pipeline.archive.volume import Volume, _read_file
from pipeline.config import PrepareConfig
from store.images import Rejected
from store.images.orientation import find_turn
from store.images.spacing import SPACING_MM

CONFIG = PrepareConfig(min_slices=2)
DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}


def draw_file(rng: np.random.Generator) -> tuple[bytes, str]:
    """A NIfTI-1 file whose header is drawn at random, and why it is to be rejected, or ""."""
    order = "<>"[int(rng.random() < 0.2)]
    code = int(rng.choice(list(DTYPES), p=[0.05, 0.3, 0.15, 0.15, 0.1, 0.05, 0.15, 0.05]))
    size = rng.integers(2, 8, 3).tolist()
    offset = int(rng.choice([352, 368, 1024]))
    values = rng.normal(0, 500, size[::-1]).clip(0 if DTYPES[code][0] == "u" else -100, 100)
    spacing = rng.uniform(0.3, 5, 3).round(2) * np.where(rng.random(3) < 0.05, -1, 1)
    spacing *= rng.choice([1, 1, 1, 1, 1, 0], 3) if rng.random() < 0.1 else 1
    header = bytearray(offset)
    dims = [3 + int(rng.random() < 0.1), *size, 1, 1, 1, 1]
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, *dims)
    struct.pack_into(f"{order}2h", header, 70, code, 8 * np.dtype(DTYPES[code]).itemsize)
    qfac = float(rng.choice([1, 1, -1, 0]))
    struct.pack_into(f"{order}8f", header, 76, qfac, *spacing, 1, 0, 0, 0)
    scaling = [(0, 0), (1, 0), (2, 0), (0.5, -1024), (1, -1024), (-1, 0), (np.nan, 0)]
    slope, intercept = scaling[rng.choice(7, p=[0.3, 0.4, 0.06, 0.06, 0.06, 0.06, 0.06])]
    struct.pack_into(f"{order}3f", header, 108, offset, slope, intercept)
    header[123] = int(rng.choice([0, 2, 10, 1, 3], p=[0.2, 0.3, 0.3, 0.1, 0.1]))
    struct.pack_into(f"{order}2h", header, 252, *rng.choice([0, 0, 1, 2], 2).tolist())
    quaternion = rng.normal(0, 0.3, 3) if rng.random() < 0.3 else rng.choice([0, 1], 3) * 0.5**0.5
    struct.pack_into(f"{order}6f", header, 256, *quaternion, *rng.normal(0, 100, 3))
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) * np.abs(spacing)
    if rng.random() < 0.2:
        axes += rng.normal(0, 0.02, (3, 3))
    struct.pack_into(f"{order}12f", header, 280, *np.c_[axes, rng.normal(0, 100, 3)].ravel())
    header[344:348] = b"n+1\0"
    content = bytes(header) + values.astype(order + DTYPES[code]).tobytes()
    if not (spacing > 0).all():  # the library reads 0 as 1 mm, -2 as 2
        return content, "impossible spacing"
    return content, "not in HU" if DTYPES[code] in ("u1", "i1") else ""


def pack(content: bytes, rng: np.random.Generator) -> bytes:
    """As it is or gzipped, in one member or more."""
    kind = rng.integers(5)
    if kind < 2:
        return content
    if kind < 4:
        return gzip.compress(content, int(rng.integers(1, 10)))
    cut = int(rng.integers(1, len(content)))
    return gzip.compress(content[:cut]) + gzip.compress(content[cut:])


def by_library(path: Path) -> tuple[NDArray[np.generic], tuple[float, ...]]:
    """Voxels and spacing, turned by SimpleITK; RuntimeError where it cannot read the file."""
    image = sitk.ReadImage(str(path))
    if image.GetDimension() == 4:
        image = image[..., 0]
    image = sitk.DICOMOrient(image, "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def by_pipeline(path: Path) -> Volume:
    series = Series(key="k", kind="file", files=(str(path),), patient="p")
    image = _read_file(series, CONFIG)
    values = np.concatenate([block.copy() for block in image.blocks])
    turn = find_turn(image.direction)
    return Volume(hu=turn.view(values), spacing_mm=turn.sort(image.spacing_xyz))


def compare(path: Path, expected: str) -> str:
    """How one file ends: "same", "rejected by both", the `expected` reason, or what differs."""
    try:
        ours = by_pipeline(path)
    except Rejected as rejected:
        reason = rejected.reason
    else:
        reason = ""
    try:
        values, spacing_mm = by_library(path)
    except RuntimeError:
        return "rejected by both" if reason else "DIFFERENT: the library cannot read it"
    if not all(SPACING_MM[0] <= s <= SPACING_MM[1] for s in spacing_mm):
        expected = "impossible spacing"
    if reason != expected:
        return f"DIFFERENT: {spacing_mm} mm, {reason or 'accepted'}, not {expected or 'accepted'}"
    if reason:
        return reason
    if ours.spacing_mm != spacing_mm:
        return f"DIFFERENT: spacing {ours.spacing_mm}, {spacing_mm}"
    same = np.array_equal(ours.hu, values, equal_nan=values.dtype.kind == "f")
    return "same" if same else "DIFFERENT: voxels"


def campaign(num_files: int, seed: int) -> Counter[str]:
    """How many generated files met which end."""
    rng = np.random.default_rng(seed)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as scratch:
        ends: Counter[str] = Counter()
        for number in range(num_files):
            content, expected = draw_file(rng)
            content = pack(content, rng)
            suffix = ".nii.gz" if content.startswith(b"\x1f\x8b") else ".nii"
            path = Path(scratch) / f"{number}{suffix}"
            path.write_bytes(content)
            ends[compare(path, expected)] += 1
            path.unlink()
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    counts = campaign(chosen.files, chosen.seed)
    print(json.dumps({"files": chosen.files, **dict(counts.most_common())}))
    sys.exit(int(any(end.startswith("DIFFERENT") for end in counts)))
