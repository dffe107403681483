"""A dry run: what headers tell is what reading the voxels finds; the estimate follows from both."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.archive.catalogue import ListedSeries
from pipeline.archive.folders import find_folders, resolve_archive
from pipeline.archive.headers import read_folder
from pipeline.archive.volume import read_geometry, read_volume
from pipeline.config import PrepareConfig
from pipeline.estimate import estimate
from pipeline.plan import min_members
from pipeline.sample import Sample, sample_scan
from pipeline.stages.survey import inspect_header
from store import PatchStore
from store.images import Rejected
from tests.support.listing import list_series

CONFIG = PrepareConfig(min_slices=8)


@pytest.mark.parametrize("folder", ["awkward", "small", "archive-2mm", "archive/Lung_Dx-A0002"])
def test_headers_tell_the_size_and_spacing_of_the_volume(ct: Path, folder: str) -> None:
    compared = 0
    for found in find_folders(resolve_archive(ct / folder)):
        for series in read_folder(found, CONFIG):
            if series.reason is None:
                with contextlib.suppress(Rejected):
                    volume = read_volume(series, CONFIG)
                    size, spacing_mm = read_geometry(series, CONFIG)
                    assert size == volume.hu.shape
                    assert spacing_mm == pytest.approx(volume.spacing_mm)
                    compared += 1
    assert compared > 0


def test_what_headers_reject_is_rejected_for_the_same_reason_when_it_is_read(ct: Path) -> None:
    rejected = set()
    for found in find_folders(resolve_archive([ct / "awkward", ct / "sts"])):
        for series in read_folder(found, CONFIG):
            if series.reason is not None:
                continue
            by_header = inspect_header(series, CONFIG)
            if by_header.reason is not None:
                rejected.add(by_header.reason)
                with pytest.raises(Rejected) as by_voxels:
                    read_volume(series, CONFIG)
                assert by_voxels.value.args == (by_header.reason, by_header.detail)
    assert rejected >= {"4-D", "RGB or vector", "not in HU", "unreadable"}


def test_a_series_that_claims_too_many_voxels_is_listed_as_too_large(ct: Path) -> None:
    config = PrepareConfig(max_voxels=10**6)
    (listed,) = list_series(ct / "archive-2mm" / "LIDC-IDRI-0001.nii.gz", config)
    assert (listed.reason, listed.size) == ("too large", [])


# The estimate ------------------------------------------------------------------------------------

SAMPLE = Sample(
    num_voxels=1000,
    survey_seconds=0.5,
    num_places=100,
    thumbnail=np.zeros((64, 128, 128), np.uint8),
    thumbnail_bytes=10**5,
    match_seconds=0.25,
    crop_seconds=0.125,
    crop_bytes=10**4,
)
LISTED = [
    ListedSeries(file="a", files=1, reason=None, detail="", size=[10, 10, 10], spacing_mm=[1, 1, 1])
] * 40


def estimated(*samples: Sample, workers: int = 1, **settings: object):
    config = replace(PrepareConfig(validation_fraction=0.0), **settings)
    return estimate(LISTED, samples, config, num_patients=30, num_workers=workers, trains=False)


def test_crops_are_between_the_fewest_and_the_most_members_of_all_classes() -> None:
    found = estimated(SAMPLE, classes=50, neighbours=20)
    least = min_members(PrepareConfig(neighbours=20), np.zeros(40, np.uint8))
    assert found.classes == 50
    assert found.crops == (3 * 50 * least, 3 * 50 * 20)


def test_scans_limit_the_number_of_classes() -> None:
    found = estimated(replace(SAMPLE, num_places=5), classes=50, neighbours=20)
    assert found.classes == 40 * 5 / 20


def test_scans_that_the_sample_rejects_are_counted_for_all() -> None:
    found = estimated(SAMPLE, Sample(reason="not in HU"))
    assert (found.scans, found.sampled, found.sample_rejected) == (20, 2, {"not in HU": 1})


def test_bytes_are_those_of_the_sampled_crops_and_thumbnails() -> None:
    found = estimated(SAMPLE)
    assert np.diff(found.bytes) == np.diff(found.crops) * 10**4
    assert found.bytes[0] >= 40 * 10**5 + found.crops[0] * 10**4


def test_twice_the_workers_take_half_the_time() -> None:
    one, two = estimated(SAMPLE), estimated(SAMPLE, workers=2)
    assert two.seconds == tuple(s / 2 for s in one.seconds)


def test_nothing_is_estimated_where_the_whole_sample_is_rejected() -> None:
    assert estimated(Sample(reason="empty")) is None


def test_a_sampled_scan_is_placed_cut_and_matched(phantoms: Path, config: PrepareConfig) -> None:
    (folder,) = find_folders(resolve_archive(phantoms / "phantom-0000.nii.gz"))
    (series,) = read_folder(folder, config)
    sample = sample_scan(series, config)
    assert 0 < sample.num_places <= config.classes
    assert min(sample.survey_seconds, sample.crop_seconds, sample.match_seconds) > 0


def test_the_estimate_holds_what_a_job_makes(
    phantoms: Path, prepared: Path, config: PrepareConfig
) -> None:
    listed = [one for one in list_series(phantoms, config) if one.reason is None]
    series = [
        one for f in find_folders(resolve_archive(phantoms)) for one in read_folder(f, config)
    ]
    samples = [sample_scan(one, config) for one in series[:3]]
    found = estimate(listed, samples, config, num_patients=5, num_workers=1, trains=False)
    store = PatchStore(prepared)
    size = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    assert found is not None
    assert found.crops[0] <= len(store.train) + len(store.validation) <= found.crops[1]
    assert 0.7 * found.bytes[0] <= size <= 1.3 * found.bytes[1]
