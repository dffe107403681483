"""Read a few scans of an archive as a job would, for their time and bytes; nothing is written.

The workers that would run the job do it, so that the speed of disks and processors is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.archive.series import Series
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.content import ContentOfScan
from pipeline.crops import cut_crop, make_thumbnail, one_blas_thread
from pipeline.frame import frame_box
from pipeline.isolation import time_limit
from pipeline.match import describe_place, describe_scan, match_place
from pipeline.place import Floats, Geometry, Scans, TakenPlaces
from pipeline.seeds import COORDINATE
from store.format import THUMBNAIL_SHAPE
from store.images import UNREADABLE, Rejected
from store.scans import mean_and_std
from store.shards import encode_chunk

SAMPLED_SCANS: Final = 8
_SAMPLED_CROPS, _SAMPLED_MATCHES = 8, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one scan took, on a worker."""

    reason: str | None = None
    """Why the scan is rejected; it counts nowhere else then."""
    num_voxels: int = 0
    survey_seconds: float = 0.0
    num_places: int = 0
    """Base crops that were placed in the scan by the rules of discovery."""
    thumbnail: NDArray[np.uint8] | None = None
    thumbnail_bytes: int = 0
    match_seconds: float = 0.0
    """For one place, there and back."""
    crop_seconds: float = 0.0
    crop_bytes: float = 0.0


def sample_scan(series: Series, config: PrepareConfig) -> Sample:
    """In a worker: survey a scan, then place, match and cut a few crops; nothing is written."""
    began = time.perf_counter()
    try:
        with time_limit(config.max_read_seconds):
            volume = read_volume(series, config)
    except Rejected as rejected:
        return Sample(reason=rejected.reason)
    except (MemoryError, OSError):
        return Sample(reason=UNREADABLE)
    volume.scan_id()  # for the time that it takes; so is the next line
    mean_and_std(volume.hu)
    box = frame_box(volume, config.frame)
    with one_blas_thread():
        thumbnail = make_thumbnail(volume, box, THUMBNAIL_SHAPE, config)
        packed = encode_chunk(thumbnail)
        survey_seconds = time.perf_counter() - began
        scan = Scans(
            split=np.zeros(1, np.uint8),
            spacing_mm=np.array([volume.spacing_mm]),
            size=np.array([volume.hu.shape], np.int32),
            frame_mm=box[None],
            embedding=np.empty((1, 0), np.float32),
            thumbnail=lambda _: thumbnail,
        )
        geometry = Geometry(scan, config)
        places = list(_places(scan, geometry, config))
        match_seconds = _time_matches(volume, scan, places, config)
        began = time.perf_counter()
        crops = [
            encode_chunk(
                cut_crop(
                    volume,
                    origin_mm=(place - geometry.extent_mm[0] / 2).tolist(),
                    extent_mm=geometry.extent_mm[0].tolist(),
                    shape=config.shape,
                    window_hu=config.window_hu,
                )
            )
            for place in places[:_SAMPLED_CROPS]
        ]
        crop_seconds = (time.perf_counter() - began) / max(1, len(crops))
    return Sample(
        num_voxels=volume.hu.size,
        survey_seconds=survey_seconds,
        num_places=len(places),
        thumbnail=thumbnail,
        thumbnail_bytes=len(packed),
        match_seconds=match_seconds,
        crop_seconds=crop_seconds,
        crop_bytes=float(np.mean([len(crop) for crop in crops])) if crops else 0.0,
    )


def _places(scan: Scans, geometry: Geometry, config: PrepareConfig) -> Iterator[Floats]:
    """Places of base crops in one scan that the rules of discovery allow together."""
    rng, row = np.random.default_rng([config.seed, COORDINATE]), np.zeros(1, np.intp)
    content = ContentOfScan(scan.thumbnail(0), scan.frame_mm[0], config)
    taken, failures = TakenPlaces(geometry), 0
    while len(taken.scans) < config.classes and failures < config.tries:
        centre = geometry.draw_centre(0, rng)
        if centre is None:
            return
        place, failures = geometry.centre_mm(centre, 0), failures + 1
        if taken.are_too_close(row, place[None]):
            continue
        if content.of_crop(place, geometry.step_mm[0]).is_enough(config):
            failures = 0
            taken.add(row, place[None])
            yield place


def _time_matches(
    volume: Volume, scan: Scans, places: Sequence[Floats], config: PrepareConfig
) -> float:
    """Seconds for matching a place in the scan itself, which takes as long as in another."""
    if config.place == "frame" or not places:
        return 0.0
    features = describe_scan(
        scan.thumbnail(0),
        box_mm=scan.frame_mm[0],
        edges_mm=volume.edges_mm,
        window_hu=config.window_hu,
    )
    places = places[:_SAMPLED_MATCHES]
    began = time.perf_counter()
    for place in places:
        match_place(place, describe_place(features, place), features, min_score=config.min_score)
    return (time.perf_counter() - began) / len(places)
