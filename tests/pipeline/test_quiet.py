"""The reading libraries are quiet while semgen reads, and keep the user's settings otherwise."""

import json
import logging
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pydicom.config
import pytest
import SimpleITK

from pipeline.phantom.files import write_dicom
from pipeline.phantom.patients import draw_phantom
from store.images.quiet_itk import quiet_itk
from store.images.quiet_pydicom import quiet_pydicom
from store.images.slices import read_header
from tests.support.command import ENVIRONMENT

IMPORTING = """
import importlib, json, logging, warnings
import pydicom.config, SimpleITK

def state():
    return [
        pydicom.config.settings.reading_validation_mode,
        logging.getLogger("pydicom").level,
        SimpleITK.ProcessObject.GetGlobalWarningDisplay(),
        [str(one) for one in warnings.filters if "pydicom" in str(one)],  # not those of libraries
    ]

before = state()
for name in ("job", "audit", "stages.embed", "stages.discover", "phantom.files"):
    importlib.import_module(f"pipeline.{name}")
for name in ("images.read", "images.slices", "verification", "quality"):
    importlib.import_module(f"store.{name}")
print(json.dumps([before, state()]))
"""


def test_importing_the_packages_changes_no_setting_of_the_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout)
    assert after == before


@pytest.fixture
def suspicious(tmp_path: Path) -> Path:
    """A slice with a value that pydicom quotes in a warning."""
    write_dicom(draw_phantom(2, 1, matrix=16), tmp_path / "series")
    file = min((tmp_path / "series").iterdir())
    study = str(pydicom.dcmread(file).StudyInstanceUID).encode()
    file.write_bytes(file.read_bytes().replace(study, b"Zebrowski".ljust(len(study), b"x")))
    return file


def test_pydicom_would_quote_a_header(suspicious: Path) -> None:
    with pytest.warns(UserWarning, match="Zebrowski"):
        assert pydicom.dcmread(suspicious).StudyInstanceUID


@pytest.mark.filterwarnings("always")
def test_no_header_text_is_written_while_threads_read(
    suspicious: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_header, [str(suspicious)] * 80))
    assert found[0].study.startswith("Zebrowski")
    assert [str(warning.message) for warning in caught] == []
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_no_header_text_is_written_by_a_process_that_reads(suspicious: Path) -> None:
    script = f"from store.images.slices import read_header; print(read_header({str(suspicious)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Zebrowski" in done.stdout
    assert "Zebrowski" not in done.stderr


def test_settings_are_restored_after_the_last_reader() -> None:
    def state() -> list[object]:
        return [
            pydicom.config.settings.reading_validation_mode,
            logging.getLogger("pydicom").level,
            SimpleITK.ProcessObject.GetGlobalWarningDisplay(),
            list(warnings.filters),
        ]

    before = state()
    with quiet_pydicom(), quiet_itk():
        with quiet_pydicom(), quiet_itk():
            pass
        assert pydicom.config.settings.reading_validation_mode == pydicom.config.IGNORE
        assert not SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    assert state() == before


def test_a_filter_that_a_user_adds_meanwhile_is_kept() -> None:
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with quiet_pydicom():
            warnings.filterwarnings("ignore", message="the user's own")
            added = warnings.filters[0]
        assert list(warnings.filters) == [added, *before]
