"""Scans that are almost the same, under different patients: found, told, and kept in one split."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from distributed import Client
from scipy import ndimage

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.lookup import add_paths, catalogue_folder
from pipeline.archive.manifest import Manifest
from pipeline.archive.volume import Volume
from pipeline.cluster import connect
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail
from pipeline.frame import frame_box
from pipeline.match_files import read_scan
from pipeline.near_duplicates import (
    MIN_SIMILARITY,
    as_volume,
    describe_cells,
    find_candidates,
    similarity,
)
from pipeline.phantom.files import write_archive
from pipeline.stages.survey import survey_archive
from store import PatchStore
from store.format import THUMBNAIL_SHAPE
from store.inspect import describe_near_duplicates, describe_store, format_near_duplicates
from store.progress import SILENT
from store.settings import to_json
from store.writer import StoreWriter

ORIGINAL, COPY = "phantom-0000.nii.gz", "zebrowski.nii.gz"


@pytest.fixture(scope="module")
def config(config: PrepareConfig) -> PrepareConfig:
    return replace(config, near_duplicates="same-split")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients, and the first once more: on a grid of other spacing, shifted and noisy."""
    folder = tmp_path_factory.mktemp("near")
    write_archive(folder, patients=3, format="nifti", seed=7, matrix=64)
    image: Any = SimpleITK.ReadImage(str(folder / ORIGINAL))
    spacing = np.multiply(image.GetSpacing(), 1.15)
    copy: Any = SimpleITK.Resample(
        image,
        [int(n / 1.15) for n in image.GetSize()],
        SimpleITK.Transform(),
        SimpleITK.sitkLinear,
        image.TransformContinuousIndexToPhysicalPoint([0.4, 0.3, 0.2]),
        spacing.tolist(),
        image.GetDirection(),
    )
    SimpleITK.WriteImage(SimpleITK.AdditiveGaussianNoise(copy, 15.0, 0.0, 1), str(folder / COPY))
    return folder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(1, None) as one_worker:
        yield one_worker


def survey(
    client: Client, archive: Path, store: Path, config: PrepareConfig, manifest: str = ""
) -> PatchStore:
    """A store of which only the survey is done."""
    listed = None
    if manifest:
        file = store.with_suffix(".csv")
        file.write_text(manifest)
        listed = Manifest(file, [archive])
    writer = StoreWriter.create(store, config=to_json(config), software={})
    with contextlib.closing(Catalogue(catalogue_folder(store))) as catalogue:
        survey_archive(
            *(client, [archive], writer, catalogue, config),
            manifest=listed,
            extend=None,
            progress=SILENT,
        )
    return PatchStore(store, allow_building=True)


@pytest.fixture(scope="module")
def joined(
    client: Client, archive: Path, config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory
) -> PatchStore:
    return survey(client, archive, tmp_path_factory.mktemp("stores") / "s", config)


def test_a_copy_under_another_patient_is_reported_and_no_other_pair_is(joined: PatchStore) -> None:
    facts = describe_store(joined)
    add_paths(facts, joined)
    (pair,) = facts["near_duplicates"]
    assert sorted(Path(file).name for file in pair["files"]) == [ORIGINAL, COPY]
    assert pair["similarity"] >= MIN_SIMILARITY


def test_near_duplicates_are_scans_of_one_patient(joined: PatchStore) -> None:
    (pair,) = describe_store(joined)["near_duplicates"]
    assert len(set(pair["splits"])) == 1
    assert [len(joined.scans.patient), len(np.unique(joined.scans.patient))] == [4, 3]


def test_with_warn_patients_stay_apart_and_two_workers_find_the_same(
    joined: PatchStore, archive: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    with connect(2, None) as client:
        store = survey(client, archive, tmp_path / "s", replace(config, near_duplicates="warn"))
    assert store.stages["survey"] == joined.stages["survey"]
    assert len(np.unique(store.scans.patient)) == 4


def test_a_manifest_keeps_its_splits_and_the_report_names_the_pair_first(
    client: Client, archive: Path, config: PrepareConfig, tmp_path: Path
) -> None:
    manifest = f"path,split\n.,\n{ORIGINAL},train\n{COPY},validation\n"
    store = survey(client, archive, tmp_path / "s", config, manifest)
    pairs = describe_near_duplicates(store)
    assert pairs is not None
    assert sorted(pairs[0]["splits"]) == ["train", "validation"]
    assert "1 in both splits" in format_near_duplicates(pairs, limit=1)[0]


def test_no_word_of_a_path_is_told_without_the_catalogue(joined: PatchStore) -> None:
    facts = describe_store(joined)
    shown = json.dumps(facts) + "\n".join(format_near_duplicates(facts["near_duplicates"], limit=9))
    assert "zebrowski" not in shown


def test_a_long_list_is_cut_and_starts_with_pairs_in_both_splits() -> None:
    pairs = [
        {"scans": [f"{n:016x}"] * 2, "splits": ["train", split], "similarity": 0.95}
        for n, split in enumerate(["train"] * 5 + ["validation"])
    ]
    lines = format_near_duplicates(pairs, limit=2)
    assert f"{5:016x} (validation)" in lines[1]
    assert [len(lines), lines[-1].split(":")[0]] == [4, "  4 more"]


# Comparing scans ---------------------------------------------------------------------------------


def thumbnail(volume: Volume, config: PrepareConfig) -> Volume:
    box = frame_box(volume, config.frame)
    return as_volume(make_thumbnail(volume, box, THUMBNAIL_SHAPE, config), box, config.window_hu)


@pytest.fixture(scope="module")
def scan(ct: Path) -> Volume:
    return read_scan(ct / "archive-2mm" / "C3L-00189.nii.gz")


def test_two_real_scans_of_one_kind_are_not_similar(
    ct: Path, scan: Volume, config: PrepareConfig
) -> None:
    other = read_scan(ct / "archive-2mm" / "CRLM-CT-1004.nii.gz")
    assert similarity(thumbnail(scan, config), thumbnail(other, config), ()) < MIN_SIMILARITY


def test_a_smoothed_thick_mirrored_and_cropped_copy_is_similar(
    scan: Volume, config: PrepareConfig
) -> None:
    thick = 0.5 * (scan.hu[:-1:2] + scan.hu[1::2])
    smooth = ndimage.gaussian_filter(thick, (0, 1, 1))[:, 10:, 60:180]
    z, y, x = scan.spacing_mm
    copy = Volume(hu=np.flip(np.rint(smooth).astype(np.int16), 2), spacing_mm=(2 * z, y, x))
    assert similarity(thumbnail(scan, config), thumbnail(copy, config), (2,)) > MIN_SIMILARITY


def smooth_cells(num: int, seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).normal(size=(num, 8, 16, 16))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 3, 3))
    smooth /= smooth.std(axis=(1, 2, 3), keepdims=True)
    return np.clip(128 + 50 * smooth, 0, 255).astype(np.uint8)


def test_mirrored_and_cropped_scans_are_candidates_unless_of_the_same_patient() -> None:
    cells = smooth_cells(40)
    cells[1] = np.flip(cells[0], 2)
    cells[3] = np.repeat(cells[2][4:], 2, axis=0)  # the upper half
    cells[5] = cells[4]
    patient = np.arange(40)
    patient[5] = 4
    found = {(one.first, one.second): one.flips for one in find_candidates(cells, patient)}
    assert found[0, 1] == (2,)
    assert found[2, 3] == ()
    assert (4, 5) not in found


@pytest.mark.parametrize("seed", range(3))
def test_candidates_do_not_depend_on_the_order_of_scans(seed: int) -> None:
    cells = smooth_cells(30, seed)
    cells[7], cells[20] = cells[3], cells[3] // 2
    order = np.random.default_rng(seed).permutation(30)
    pairs = [
        {frozenset((rows[one.first], rows[one.second])) for one in find_candidates(part, rows)}
        for part, rows in ((cells, np.arange(30)), (cells[order], order))
    ]
    assert pairs[0] == pairs[1]
    assert {frozenset((3, 7)), frozenset((3, 20))} <= pairs[0]


def test_with_an_index_copies_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = smooth_cells(480)
    cells[::60] = np.flip(cells[5::60], 3)
    everything = find_candidates(cells, np.arange(480))
    monkeypatch.setattr("pipeline.near_duplicates._EXHAUSTIVE", 0)
    monkeypatch.setattr("pipeline.near_duplicates._SCANS_PER_LIST", 40)
    found = find_candidates(cells, np.arange(480))
    copies = {(row, row + 5, (2,)) for row in range(0, 480, 60)}
    assert copies <= set(found) <= set(everything)


def test_descriptions_are_means_of_equal_parts() -> None:
    dark = np.zeros(THUMBNAIL_SHAPE, np.uint8)
    dark[:8, :8, :8] = 255
    cells = describe_cells(dark, (-1000, 1000))
    assert (cells[0, 0, 0], cells.sum()) == (255, 255)
