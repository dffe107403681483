"""DICOM series whose slices lie in several folders, as exports to disks and archives leave them."""

import contextlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.folders import find_folders
from pipeline.archive.headers import join_parts, read_folder
from pipeline.archive.manifest import ManifestError
from pipeline.archive.selection import series_in_parts
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.phantom.files import write_dicom
from pipeline.phantom.patients import draw_phantom
from tests.support.command import Semgen
from tests.support.listing import list_series
from tests.support.stores import contents

CONFIG = PrepareConfig(min_slices=16)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A series of 59 slices."""
    folder = tmp_path / "archive" / "series"
    write_dicom(draw_phantom(5, 20, matrix=16, protocol="chest"), folder)
    return folder


def by_position(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])


def spread(folder: Path, parts: list[list[Path]]) -> None:
    """Move files into folders of their own; what is left goes with the folder."""
    for number, files in enumerate(parts):
        part = folder.with_name(f"part{number}")
        part.mkdir()
        for file in files:
            file.rename(part / file.name)
    shutil.rmtree(folder)


def fates(archive: Path, manifest: Path | None = None) -> dict[str, tuple[int, str | None]]:
    """Number of files and reason, by folder."""
    listed = list_series([archive], CONFIG, manifest)
    return {Path(one.file).parent.name: (one.files, one.reason) for one in listed}


@pytest.mark.parametrize("how", ["one after the other", "by turns"])
def test_slices_in_several_folders_are_one_scan(series: Path, tmp_path: Path, how: str) -> None:
    (whole,) = read_folder(next(find_folders([series])), CONFIG)
    expected = read_volume(whole, CONFIG)
    files = by_position(series)
    parts = [files[:20], files[20:40], files[40:]]
    spread(series, parts if how != "by turns" else [files[::3], files[1::3], files[2::3]])
    found = fates(series.parent)
    assert sorted(found.values(), key=str) == [(19, "joined"), (20, "joined"), (59, None)] or (
        sorted(found.values(), key=str) == [(20, "joined"), (20, "joined"), (59, None)]
    )
    pieces = [s for f in find_folders([series.parent]) for s in read_folder(f, CONFIG)]
    volume = read_volume(join_parts(pieces, CONFIG)[0], CONFIG)
    assert volume.spacing_mm == expected.spacing_mm
    np.testing.assert_array_equal(volume.hu, expected.hu)


def test_a_copy_in_another_folder_is_a_duplicate_also_if_it_is_partial(series: Path) -> None:
    shutil.copytree(series, series.with_name("xcopy"))
    files = by_position(series)
    (series.parent / "xpart").mkdir()
    for file in files[10:40]:
        shutil.copy(file, series.parent / "xpart")
    assert fates(series.parent) == {
        "series": (59, None),
        "xcopy": (59, "duplicate"),
        "xpart": (30, "duplicate"),
    }


def test_a_slice_missing_from_all_folders_is_detected(series: Path) -> None:
    files = by_position(series)
    spread(series, [files[:20], files[21:40], files[40:]])
    assert Counter(reason for _, reason in fates(series.parent).values()) == {
        "missing slices": 1,
        "joined": 2,
    }


def test_different_scans_with_the_same_uid_stay_separate(series: Path) -> None:
    other = series.with_name("zother")
    write_dicom(draw_phantom(5, 21, matrix=16, protocol="chest"), other)
    same = pydicom.dcmread(next(series.iterdir()))
    for file in other.iterdir():
        data = pydicom.dcmread(file)
        data.PatientID, data.StudyInstanceUID = same.PatientID, same.StudyInstanceUID
        data.SeriesInstanceUID = same.SeriesInstanceUID
        data.save_as(file)
    reasons = Counter(reason for _, reason in fates(series.parent).values())
    assert reasons == {None: 1, "not chosen": 1}


def test_listing_parts_again_changes_nothing(series: Path, tmp_path: Path) -> None:
    files = by_position(series)
    spread(series, [files[:30], files[30:]])
    with contextlib.closing(Catalogue(tmp_path / "catalogue")) as catalogue:
        for _ in range(2):  # as a resumed job does
            for folder in find_folders([series.parent]):
                catalogue.add(read_folder(folder, CONFIG))
            for parts in series_in_parts(catalogue):
                catalogue.add(join_parts(parts, CONFIG), again=True)
            found = [(one.files, one.reason) for one in catalogue.listing()]
            assert found == [(59, None), (29, "joined")]
            assert catalogue.reasons() == {}


def list_csv(folder: Path, *lines: str) -> Path:
    file = folder / "list.csv"
    file.write_text("\n".join(("path,split", *lines, "")))
    return file


def test_a_manifest_line_for_one_file_stands_for_a_series_in_several_folders(series: Path) -> None:
    files = by_position(series)
    spread(series, [files[:8], files[8:20], files[20:22]])  # none is a scan by itself
    listed = list_csv(series.parent, f"part1/{files[9].name},")
    found = list_series([series.parent], CONFIG, listed)
    assert sorted((one.files, one.reason) for one in found) == [
        (2, "joined"),
        (8, "joined"),
        (22, None),
    ]


def test_listed_parts_that_make_a_scan_are_not_joined_with_unlisted_ones(series: Path) -> None:
    files = by_position(series)
    spread(series, [files[:30], files[31:]])
    assert fates(series.parent, list_csv(series.parent, "part1,")) == {
        "part0": (30, "not in the manifest"),
        "part1": (28, None),
    }


def test_the_folders_of_one_series_cannot_be_listed_for_both_splits(series: Path) -> None:
    files = by_position(series)
    spread(series, [files[:30], files[30:]])
    listed = list_csv(series.parent, "part0,train", "part1,validation")
    with pytest.raises(ManifestError, match="one DICOM series lies in several folders"):
        fates(series.parent, listed)


def test_a_series_in_several_folders_gives_the_same_store(
    prepared: Path, phantoms: Path, semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    archive = shutil.copytree(phantoms, tmp_path / "archive")
    folder = next(path for path in sorted(archive.iterdir()) if path.is_dir() and "again" not in
                  path.name)  # fmt: skip
    files = by_position(folder)
    spread(folder, [files[:5], files[5:]])
    store = tmp_path / "s"
    done = semgen("prepare", archive, store, "--config", config_file, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert contents(store) == contents(prepared)
