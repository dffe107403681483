"""What many tests share: real volumes, a small phantom archive, the store prepared from it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import PrepareConfig, load_config
from store import PatchStore
from tests.support.command import ROOT, Semgen, run_semgen
from tests.support.settings import SETTINGS

if TYPE_CHECKING:
    from selenium import webdriver


@pytest.fixture(scope="session")
def ct() -> Path:
    """The folder of real volumes."""
    folder = Path(os.environ.get("SEMGEN_CT") or ROOT.parent / "shared" / "ct")
    if not folder.is_dir():
        reason = f"no real volumes in {folder}; set SEMGEN_CT"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings under which preparing takes seconds."""
    file = tmp_path_factory.mktemp("settings") / "small.toml"
    file.write_text(SETTINGS)
    return file


@pytest.fixture(scope="session")
def config(config_file: Path) -> PrepareConfig:
    return load_config(config_file)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five patients, alternately NIfTI and DICOM, one of them twice, and a broken file."""
    import SimpleITK

    from pipeline.phantom.files import write_archive

    archive = tmp_path_factory.mktemp("archive")
    write_archive(archive, patients=5, format="mixed", seed=7, matrix=64)
    first = SimpleITK.ReadImage(str(archive / "phantom-0000.nii.gz"))
    (archive / "again").mkdir()
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(first, "SAR"), str(archive / "again/turned.nii"))
    (archive / "again" / "broken.nii.gz").write_bytes(b"this is not an image" * 100)
    return archive


@pytest.fixture(scope="session")
def semgen() -> Semgen:
    """Run the command line to its end in a process of its own, elsewhere than in the checkout."""
    return run_semgen


@pytest.fixture(scope="session")
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `phantoms`, made by one worker and never interrupted. Not to be changed.

    Where only what `store` needs is installed, SEMGEN_PREPARED names one that was made elsewhere.
    """
    if given := os.environ.get("SEMGEN_PREPARED"):
        return Path(given)
    phantoms, config_file = map(request.getfixturevalue, ("phantoms", "config_file"))
    store = tmp_path_factory.mktemp("stores") / "phantoms.store"
    done = run_semgen("prepare", phantoms, store, "--config", config_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return store


@pytest.fixture(scope="session")
def browser() -> "Iterator[webdriver.Chrome]":
    """A headless browser."""
    from tests.support.browser import start_browser

    yield from start_browser()


@pytest.fixture(scope="session")
def patches(prepared: Path) -> PatchStore:
    """`prepared`, open."""
    return PatchStore(prepared)
