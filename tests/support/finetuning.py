"""Tasks for fine-tuning: small noisy CT images, each with a bright ball to find."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from trainer.finetuning import FinetuneConfig

CONFIG = FinetuneConfig(
    width=4,
    shape=(8, 16, 16),
    batch_size=8,
    steps=60,
    learning_rate=1e-2,
    patches_per_case=4,
    device="cpu",
)
"""Enough to find the ball."""


def draw_case(seed: int, *, bright: bool = True) -> tuple[sitk.Image, sitk.Image]:
    """A noisy CT image with a ball of 800 HU somewhere, or none, and the ball's mask."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(14), np.arange(24), np.arange(24), indexing="ij")
    middle = rng.integers((4, 8, 8), (10, 16, 16))
    ball = sum((a - m) ** 2 for a, m in zip((z, y, x), middle, strict=True)) < 25
    values = rng.normal(-200, 60, ball.shape) + 1000 * (ball if bright else 0)
    arrays = (values.astype(np.int16), ball.astype(np.uint8))
    images = [sitk.GetImageFromArray(array) for array in arrays]
    for image in images:
        image.SetSpacing((1.0, 1.0, 2.0))
        image.SetDirection((-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0) if seed % 2 else np.eye(3).ravel())
    return images[0], images[1]


def make_task(folder: Path, seeds: Sequence[int], *, ending: str = ".nii") -> Path:
    """A manifest of images and masks; cases are named 0, 1, ... whatever the seeds."""
    folder.mkdir()
    rows: list[dict[str, object]] = []
    for number, seed in enumerate(seeds):
        row = {"image": f"{number}{ending}", "mask": f"{number}_mask{ending}"}
        for image, name in zip(draw_case(seed), row.values(), strict=True):
            sitk.WriteImage(image, str(folder / name))
        rows.append({**row})
    return write_manifest(folder / "task.csv", rows)


def write_manifest(file: Path, rows: Sequence[dict[str, object]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))
