"""The long campaigns of tests/campaigns at a size that runs each time."""

import resource
import subprocess
import sys
from pathlib import Path

from tests.campaigns.corrupt import campaign as corrupt
from tests.campaigns.fuzz import campaign as fuzz
from tests.campaigns.nifti import campaign as nifti
from tests.support.command import Semgen
from tests.support.stores import contents


def test_mutated_files_cost_only_themselves() -> None:
    status, errors, ends = fuzz(60, seed=5, workers=2)
    assert status == 0, errors
    assert "Traceback" not in errors
    assert ends["accepted"] >= 3
    assert ends["unreadable"] >= 10


def test_damage_to_any_file_of_a_store_is_found(prepared: Path) -> None:
    num_files = sum(path.is_file() for path in prepared.rglob("*"))
    ends, missed = corrupt(prepared, 3 * num_files, seed=0)
    assert missed == []
    assert ends["deleted", "caught"] == ends["cut", "caught"] == num_files


def test_a_full_disk_is_reported_and_nothing_is_lost(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    limit = 300_000  # bytes of one file
    command = ["prepare", phantoms, tmp_path / "s", "--config", config_file, "--workers", 1]
    done = subprocess.run(
        [sys.executable, "-m", "cli", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert any(word in last for word in ("too large", "full", "disk I/O error"))
    assert semgen(*command).returncode == 0
    assert contents(tmp_path / "s") == contents(prepared)


def test_generated_nifti_headers_are_read_as_the_library_reads_them() -> None:
    ends = nifti(400, seed=1)
    assert [end for end in ends if end.startswith("DIFFERENT")] == []
    assert ends["same"] > 200
