"""Mutated files of every format through one `semgen prepare`.

    python -m tests.campaigns.fuzz --files 2000

Counts how many were accepted, or rejected for which reason. Exits 1 unless the job ends well, the
three whole scans are accepted, every folder is told, and none is rejected by an error of ours.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK

from pipeline.archive.series import INTERNAL
from pipeline.phantom.files import write_archive
from tests.support.command import run_semgen

NUM_WHOLE = 3
"""Scans that are not mutated."""
FORMATS = ("nii", "nii.gz", "mha", "nrrd", "mhd", "dcm")
SETTINGS = """
classes = 1
neighbours = 2
min_member_share = 0
shape = [8, 8, 8]
spacing_mm = [4.0, 4.0, 4.0]
side_steps = [6, 9]
shift_steps = [-1, 2]
min_body = 0
place = "frame"
min_slices = 8
max_voxels = 10000000
max_read_seconds = 20

[autoencoder]
max_steps = 2
width = 4
latent = 8
"""


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a few bytes, mostly of the header; sometimes cut off, repeat or drop a part."""
    data = bytearray(content)
    kind = rng.integers(8)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        end = min(len(data), place + int(rng.integers(1, 64)))
        return bytes(data[:place] + data[place:end] + data[place:])
    if kind == 2:
        return bytes(data[:place] + data[place + int(rng.integers(1, 64)) :])
    reach = min(len(data), 400) if kind < 7 else len(data)
    for at in rng.integers(reach, size=rng.integers(1, 9)):
        data[at] = rng.integers(256) if kind % 2 else data[at] ^ (1 << rng.integers(8))
    return bytes(data)


def make_archive(folder: Path, num_files: int, seed: int) -> None:
    """Valid scans, and mutated ones, each in a folder of its own."""
    rng = np.random.default_rng(seed)
    write_archive(folder / "whole", patients=NUM_WHOLE, format="nifti", seed=seed, matrix=64)
    z, y, x = np.indices((12, 16, 16))
    hu = np.where((y - 8) ** 2 + (x - 8) ** 2 < 36, 40 + z, -1000).astype(np.int16)
    image = SimpleITK.GetImageFromArray(hu)
    image.SetSpacing((4, 4, 5))
    seeds = folder.with_name("seeds")
    seeds.mkdir()
    for suffix in ("nii", "nii.gz", "mha", "nrrd", "mhd"):
        SimpleITK.WriteImage(image, str(seeds / f"scan.{suffix}"))
    write_archive(seeds / "dicom", patients=1, format="dicom", seed=seed, matrix=64)
    slices = sorted((seeds / "dicom" / "phantom-0000").iterdir())
    for number in range(num_files):
        suffix = FORMATS[number % len(FORMATS)]
        place = folder / f"{number:05d}"
        place.mkdir(parents=True)
        if suffix == "dcm":
            for file in slices[:16]:
                (place / file.name).hardlink_to(file)
            victim = place / slices[int(rng.integers(16))].name
            content = victim.read_bytes()
            victim.unlink()
        else:
            victim = place / f"scan.{suffix}"
            content = (seeds / victim.name).read_bytes()
            if suffix == "mhd":
                raw = (seeds / "scan.raw").read_bytes()
                (place / "scan.raw").write_bytes(raw if rng.random() < 0.8 else mutate(raw, rng))
        victim.write_bytes(mutate(content, rng))


def campaign(num_files: int, seed: int, workers: int) -> tuple[int, str, dict[str, int]]:
    """Exit status, error output, and the number of series by outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_archive(folder / "archive", num_files, seed)
        (folder / "settings.toml").write_text(SETTINGS)
        done = run_semgen(
            *("prepare", folder / "archive", folder / "store", "--json"),
            *("--config", folder / "settings.toml", "--workers", workers),
        )
        if done.returncode:
            return done.returncode, done.stderr, {}
        summary = json.loads(done.stdout)
        ends = Counter({"accepted": summary["accepted"], **summary["rejected"]})
        return 0, done.stderr, dict(ends.most_common())


def is_right(num_files: int, words: str, ends: dict[str, int]) -> bool:
    told = sum(ends.values()) >= num_files + NUM_WHOLE
    return (
        "Traceback" not in words and INTERNAL not in ends and ends["accepted"] >= NUM_WHOLE and told
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    status, words, ends = campaign(chosen.files, chosen.seed, chosen.workers)
    right = status == 0 and is_right(chosen.files, words, ends)
    if not right:
        print(words)
    print(json.dumps({"files": chosen.files, "exit status": status, **ends}))
    sys.exit(int(not right))
