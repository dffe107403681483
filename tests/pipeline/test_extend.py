"""A grown archive: a new store from an old one's survey is the same as one from nothing."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import zarr

from pipeline.archive.lookup import catalogue_folder
from tests.support.command import Semgen
from tests.support.stores import contents


@pytest.fixture
def grown(prepared: Path, phantoms: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An archive, its store, and then one scan more, one changed."""
    archive = shutil.copytree(phantoms, tmp_path / "archive")  # times and all
    old = shutil.copytree(prepared, tmp_path / "old.store")
    shutil.copytree(catalogue_folder(prepared), catalogue_folder(old))
    files = sorted(archive.glob("phantom-*.nii.gz"))
    shutil.copy(files[0], archive / "new.nii.gz")
    shutil.copy(files[1], files[0])
    return archive, old


def test_an_extended_store_equals_a_new_one(
    grown: tuple[Path, Path], semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    archive, old = grown
    before = contents(old)
    command = ["prepare", archive, "--config", config_file, "--workers", 1]
    anew = semgen(*command[:2], tmp_path / "anew", *command[2:])
    extended = semgen(*command[:2], tmp_path / "extended", *command[2:], "--extend", old)
    assert anew.returncode == extended.returncode == 0, extended.stderr
    assert contents(tmp_path / "extended") == contents(tmp_path / "anew")
    assert contents(old) == before
    shown = extended.stderr.splitlines()
    assert any(line.startswith("2 of 9: survey: 8 scans, 3 in this run") for line in shown), shown
    assert any(line.startswith("2 of 9: reuse survey: ") for line in shown)


def test_a_file_that_was_only_touched_is_read_again(
    grown: tuple[Path, Path], semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    archive, old = grown
    for file in archive.rglob("*"):
        os.utime(file, (1, 1))
    done = semgen(
        "prepare", archive, tmp_path / "s", "--config", config_file, "--extend", old, "--workers", 1
    )
    assert done.returncode == 0, done.stderr
    assert any(
        line.startswith("2 of 9: reuse survey: 0 scans") for line in done.stderr.splitlines()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frame", "scan"], ["surveyed with other settings", "frame: body -> scan"]),
        (["same"], ["STORE and --extend are the same store", "a new folder"]),
    ],
)
def test_extend_is_refused_for_other_settings_and_for_the_same_store(
    prepared: Path,
    phantoms: Path,
    semgen: Semgen,
    config_file: Path,
    tmp_path: Path,
    options: list[str],
    words: list[str],
) -> None:
    target = prepared if options == ["same"] else tmp_path / "s"
    options = [option for option in options if option != "same"]
    done = semgen(
        *("prepare", phantoms, target, "--config", config_file, "--extend", prepared),
        *options,
    )
    assert done.returncode == 1
    assert [word for word in words if word not in done.stderr] == []
    assert not (tmp_path / "s").exists()


def test_an_old_store_without_its_catalogue_cannot_be_extended(
    prepared: Path, phantoms: Path, semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(prepared, tmp_path / "old.store")
    assert not catalogue_folder(old).exists()
    done = semgen(
        *("prepare", phantoms, tmp_path / "s", "--config", config_file, "--extend", old),
        *("--workers", 1),
    )
    assert done.returncode == 1
    assert "only this file records" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "s").exists()


def test_a_survey_of_another_version_is_not_reused(
    grown: tuple[Path, Path], semgen: Semgen, config_file: Path, tmp_path: Path
) -> None:
    archive, old = grown
    group = zarr.open_group(str(old), mode="r+")
    attribute: Any = group.attrs["semgen"]
    del attribute["stages"]["survey"]["version"]  # as before it was noted
    group.attrs["semgen"] = attribute
    done = semgen(
        *("prepare", archive, tmp_path / "s", "--config", config_file, "--extend", old),
        *("--workers", 1),
    )
    assert done.returncode == 1
    assert "surveyed by another version of semgen" in done.stderr.splitlines()[-1]
    group.attrs["semgen"] = {**attribute, "state": "building"}
    done = semgen("prepare", archive, old, "--config", config_file, "--workers", 1)
    assert done.returncode == 1
    assert "started by another version of semgen" in done.stderr.splitlines()[-1]
