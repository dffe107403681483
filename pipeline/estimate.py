"""Estimate what a job will make, and how long it takes, from headers and a sample of scans."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch

from pipeline.archive.catalogue import ListedSeries
from pipeline.autoencoder import Autoencoder
from pipeline.config import PrepareConfig
from pipeline.plan import min_members, most_members
from pipeline.sample import Sample
from pipeline.training import num_torch_threads, train_autoencoder
from store.inspect import format_counts, format_size
from store.progress import format_duration

_TRAINED_STEPS = 8
_MATCHES_PER_MEMBER: Final = (3, 12)
"""Scans that are tried for each member of a class, also for coordinates that become none: in large
archives of one kind of scan, and in small mixed ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a job will make. Ranges are from the fewest to the most members of each class."""

    scans: int
    """Scans that will be accepted."""
    patients: int
    """Patients in the archive with usable series."""
    classes: int
    crops: tuple[int, int]
    bytes: tuple[int, int]
    """Of the store."""
    seconds: tuple[float, float]
    workers: int
    sampled: int
    """Scans that were read for the estimate."""
    sample_rejected: dict[str, int]
    """Of these, the rejected ones by reason; the other numbers take their share into account."""

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        rejected = ""
        if self.sample_rejected:
            rejected = f", of which are rejected: {format_counts(self.sample_rejected)}"
        sizes, times = map(format_size, self.bytes), map(format_duration, self.seconds)
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return "\n".join(
            [
                f"Estimate, from the headers and a sample of {self.sampled} scans{rejected}",
                f"scans    about {self.scans}, of {self.patients} patients",
                f"crops    {self.crops[0]} to {self.crops[1]}, of about {self.classes} classes",
                f"store    {' to '.join(sizes)}",
                f"time     {' to '.join(times)}, with {workers}",
            ]
        )


def estimate(
    listed: Sequence[ListedSeries],
    samples: Sequence[Sample],
    config: PrepareConfig,
    *,
    num_patients: int,
    num_workers: int,
    trains: bool,
) -> Estimate | None:
    """Estimate a job from all series that would be read and some that were; None where none can be.

    trains
        Whether the job trains its autoencoder.
    """
    good = [sample for sample in samples if sample.reason is None]
    if not good:
        return None
    accepted = len(good) / len(samples)
    num_scans = max(1, round(accepted * len(listed)))
    num_validation = round(config.validation_fraction * num_scans)
    if config.validation_fraction > 0:
        num_validation = max(1, num_validation)
    num_train = max(1, num_scans - num_validation)
    split = np.repeat(np.array([0, 1], np.uint8), [num_train, num_validation])
    most = most_members(config, split)
    places = float(np.mean([sample.num_places for sample in good]))
    classes = min(config.classes, num_train * places / most.train)
    members = np.array([min_members(config, split), most.train]) * classes  # fewest, most
    validation = np.array([0, min(classes * most.validation, num_validation * places)])
    crops = members * config.scales + validation

    with_crops = [sample for sample in good if sample.num_places] or good
    crop_bytes, crop_seconds, match_seconds = (
        float(np.mean([getattr(sample, name) for sample in with_crops]))
        for name in ("crop_bytes", "crop_seconds", "match_seconds")
    )
    thumbnail_bytes = float(np.mean([sample.thumbnail_bytes for sample in good]))
    num_voxels = accepted * sum(math.prod(one.size) for one in listed)
    voxel_seconds = sum(s.survey_seconds for s in good) / sum(s.num_voxels for s in good)
    matches = (members + validation) * _MATCHES_PER_MEMBER
    work = 2 * num_voxels * voxel_seconds + crops * crop_seconds + matches * match_seconds
    seconds = work / num_workers
    if trains:
        seconds += _time_training(good, config, num_train)
    num_bytes = _count_weights(config) + num_scans * thumbnail_bytes + crops * crop_bytes
    return Estimate(
        scans=num_scans,
        patients=num_patients,
        classes=round(classes),
        crops=(round(crops[0]), round(crops[1])),
        bytes=(round(num_bytes[0]), round(num_bytes[1])),
        seconds=(float(seconds[0]), float(seconds[1])),
        workers=num_workers,
        sampled=len(samples),
        sample_rejected=dict(Counter(s.reason for s in samples if s.reason is not None)),
    )


def _count_weights(config: PrepareConfig) -> int:
    """Bytes of the autoencoder's weights."""
    with torch.device("meta"):
        net = Autoencoder(latent=config.autoencoder.latent, width=config.autoencoder.width)
    return sum(weights.nbytes for weights in net.state_dict().values())


def _time_training(samples: Sequence[Sample], config: PrepareConfig, num_train: int) -> float:
    """Seconds that training the autoencoder takes at most, from a few steps here."""
    settings, times = config.autoencoder, []
    images = np.stack([sample.thumbnail for sample in samples if sample.thumbnail is not None])
    batch = np.arange(settings.batch_size) % len(images)
    with TemporaryDirectory() as folder, num_torch_threads(settings.threads):
        train_autoencoder(
            lambda rows: images[rows],
            train=batch,
            validation=batch[:2],
            config=dataclasses.replace(
                settings,
                max_steps=_TRAINED_STEPS,
                max_epochs=_TRAINED_STEPS,
                patience=_TRAINED_STEPS,
            ),
            seed=config.seed,
            checkpoint=Path(folder) / "checkpoint",
            advance=lambda _: times.append(time.perf_counter()),
        )
    steps = min(settings.max_steps, settings.max_epochs * -(-num_train // settings.batch_size))
    return steps * (times[-1] - times[0]) / (len(times) - 1)
