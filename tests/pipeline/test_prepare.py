"""The job: the same bytes from any number of workers, resumed or refused, and nothing private."""

import shutil
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pydicom
import pytest

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.lookup import catalogue_folder
from pipeline.archive.series import Series
from pipeline.config import PrepareConfig
from pipeline.stages.cut import ScanCut, SourceChanged, cut_scan
from store import PatchStore
from tests.support.command import Semgen, assert_refused, run
from tests.support.stores import assert_same_bytes, copy_with_catalogue, unseal

# The same bytes ----------------------------------------------------------------------------------


def test_two_workers_make_the_same_bytes_as_one(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    done = semgen("prepare", phantoms, tmp_path / "s", "--config", config_file, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(tmp_path / "s", prepared)


def test_weights_of_another_store_embed_without_training(
    prepared: Path, patches: PatchStore, phantoms: Path, config_file: Path, semgen: Semgen,
    tmp_path: Path,
) -> None:  # fmt: skip
    weights, store = prepared / "scans/embedding/autoencoder.safetensors", tmp_path / "reused.store"
    done = semgen(
        "prepare", phantoms, store, "--config", config_file, "--workers", 2,
        "--autoencoder", weights,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epochs" not in PatchStore(store).stages["embed"]
    assert PatchStore(store).fingerprint == patches.fingerprint


# Resuming ----------------------------------------------------------------------------------------


@pytest.fixture
def unsealed(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store and its catalogue, as they were before the seal."""
    return unseal(copy_with_catalogue(prepared, tmp_path / "unsealed.store"))


def test_missing_and_damaged_shards_are_cut_again(
    prepared: Path, unsealed: Path, phantoms: Path, config_file: Path, semgen: Semgen
) -> None:
    one, two, three = (unsealed / f"train/patch/c/{shard}/0/0/0" for shard in (0, 2, 3))
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1])
    three.write_bytes(bytes([three.read_bytes()[0] ^ 1]) + three.read_bytes()[1:])
    done = semgen("prepare", phantoms, unsealed, "--config", config_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(unsealed, prepared)


def test_a_scan_that_changed_since_the_survey_stops_the_job_in_one_line(
    unsealed: Path, phantoms: Path, config_file: Path, semgen: Semgen
) -> None:
    shutil.rmtree(unsealed / "train/patch/c")
    with sqlite3.connect(catalogue_folder(unsealed) / "catalogue.sqlite") as catalogue:
        catalogue.execute(
            "UPDATE series SET kind = other.kind, files = other.files, slice_gap_mm ="
            " other.slice_gap_mm FROM (SELECT * FROM series WHERE scan_row = 0) AS other"
        )
    catalogue.close()
    done = semgen("prepare", phantoms, unsealed, "--config", config_file, "--workers", 1)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "changed since the survey" in done.stderr.splitlines()[-1]


def test_a_scan_that_changed_since_the_survey_is_not_cut(
    phantoms: Path, prepared: Path, config: PrepareConfig
) -> None:
    nowhere = np.empty((0, 3))
    cut = ScanCut(
        series=Series(
            key="x", kind="file", files=(str(phantoms / "phantom-0000.nii.gz"),), patient="x"
        ),
        scan_id=1,
        split="train",
        first_row=0,
        origin_mm=nowhere,
        extent_mm=nowhere,
        shards=(),
    )
    with pytest.raises(SourceChanged, match="voxels changed since the survey"):
        cut_scan(str(prepared), cut, config)


def test_a_complete_store_is_left_as_it_is(
    prepared: Path, phantoms: Path, config_file: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    done = run("prepare", phantoms, prepared, "--config", config_file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "is complete; nothing to do" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*")} == before


def test_a_job_killed_while_it_created_the_store_can_be_started_again(
    semgen: Semgen, tmp_path: Path
) -> None:
    archive, store = tmp_path / "archive", tmp_path / "begun.store"
    store.mkdir()
    (store / "zarr.0123456789abcdef.partial").write_text('{"attrib')
    archive.mkdir()
    (archive / "broken.nii").write_bytes(b"no image")
    done = semgen("prepare", archive, store, "--workers", 1)
    assert "no usable CT series" in done.stderr


def test_the_catalogue_of_a_deleted_store_does_not_affect_a_new_one(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    store = tmp_path / "anew.store"
    shutil.copytree(catalogue_folder(prepared), catalogue_folder(store))
    done = semgen(
        "prepare", phantoms, store, "--config", config_file, "--frame", "scan", "--workers", 2
    )
    assert done.returncode == 0, done.stderr
    scans = PatchStore(store).scans
    whole_mm = scans.size * scans.spacing_mm
    np.testing.assert_allclose(scans.frame_mm[:, 1] - scans.frame_mm[:, 0], whole_mm)


# Refusals ----------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(
    prepared: Path, phantoms: Path, config_file: Path
) -> None:
    done = run(
        "prepare", phantoms, prepared, "--config", config_file, "--frame", "scan", "--classes", 7
    )
    assert_refused(done, "other settings", "frame: body -> scan", "classes: 4 -> 7")
    assert "seed" not in done.stderr


def test_other_settings_of_the_autoencoder_are_refused_by_name(
    prepared: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(config_file.read_text().replace("latent = 32", "latent = 64"))
    done = run("prepare", phantoms, prepared, "--config", changed)
    assert_refused(done, "autoencoder", "latent")


def test_a_second_job_on_one_store_is_refused(
    phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "busy.store"
    first = Catalogue(catalogue_folder(store))
    try:
        done = run("prepare", phantoms, store, "--config", config_file)
        assert_refused(done, "another prepare is running on this store")
        assert not store.exists()
    finally:
        first.close()


def test_a_folder_of_something_else_is_refused_and_left_alone(
    phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("CT is")
    done = run("prepare", phantoms, tmp_path / "thesis", "--config", config_file)
    assert_refused(done, "thesis", "not a semgen store")
    assert [file.name for file in tmp_path.rglob("*")] == ["thesis", "chapter1.txt"]


def test_an_archive_that_is_not_there_is_refused_and_nothing_made(tmp_path: Path) -> None:
    done = run("prepare", tmp_path / "no-archive", tmp_path / "s")
    assert_refused(done, "no-archive", "no such file or folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_the_name_of_the_catalogue_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "s.catalogue").mkdir()
    (tmp_path / "s.catalogue" / "notes.txt").write_text("mine")
    assert_refused(run("prepare", tmp_path / "archive", tmp_path / "s"), "is not of semgen")
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"archive", "s.catalogue", "notes.txt"}


def test_an_archive_without_a_usable_series_is_refused_and_nothing_made(
    semgen: Semgen, tmp_path: Path
) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "notes.txt").write_text("no scan")
    (tmp_path / "archive" / "broken.nii.gz").write_bytes(b"no image" * 100)
    done = semgen("prepare", "archive", "out/s", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "no usable CT series in the archive (1 unreadable); semgen prepare"
        in done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_a_job_resumes_only_with_the_manifest_that_it_began_with(
    phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    manifest, other = tmp_path / "list.csv", tmp_path / "other.csv"
    names = [f"phantom-{n:04d}" + (".nii.gz" if n % 2 == 0 else "") for n in range(5)]
    manifest.write_text("path\n" + "\n".join(names) + "\n")
    other.write_text("path\n" + "\n".join(names[1:]) + "\n")
    command = ["prepare", phantoms, tmp_path / "s", "--config", config_file, "--workers", 1]
    assert semgen(*command, "--manifest", manifest).returncode == 0
    assert semgen(*command, "--manifest", manifest).returncode == 0
    for options in ([], ["--manifest", other]):
        done = semgen(*command, *options)
        assert done.returncode == 1
        assert "started with a different --manifest, or with none" in done.stderr.splitlines()[-1]


# Privacy -----------------------------------------------------------------------------------------


def test_only_the_owner_can_read_the_catalogue(prepared: Path) -> None:
    assert stat.S_IMODE(catalogue_folder(prepared).stat().st_mode) == 0o700


def test_the_store_contains_no_path_patient_or_series_identifier(
    prepared: Path, phantoms: Path, config: PrepareConfig
) -> None:
    private = {"phantom", "again", "turned", "broken", "nii.gz", ".dcm", str(phantoms.parent)}
    for folder in find_folders([phantoms]):
        for series in read_folder(folder, config):
            private |= {series.key, series.patient, Path(series.files[0]).name}
            if series.kind == "dicom":
                header = pydicom.dcmread(series.files[0], stop_before_pixels=True)
                private |= {
                    str(header.PatientID),
                    str(header.PatientName),
                    header.SeriesDescription,
                }
                private |= {header.SeriesInstanceUID, header.StudyInstanceUID}
    files = [file for file in prepared.rglob("*") if file.is_file()]
    words = [word.encode() for word in private]
    assert [file for file in files for word in words if word in file.read_bytes()] == []
    names = [file.relative_to(prepared).as_posix() for file in files]
    assert [name for name in names for word in private if word in name] == []


def test_the_output_of_a_job_names_no_series(
    phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    archive = tmp_path / "ward"
    archive.mkdir()
    shutil.copy(phantoms / "again" / "broken.nii.gz", archive / "smith-john.nii.gz")
    done = semgen("prepare", archive, tmp_path / "s", "--config", config_file, "--workers", 1)
    assert "smith" not in (done.stdout + done.stderr).lower()
