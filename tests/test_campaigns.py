"""The long campaigns of tests/campaigns at a size that runs each time."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import __main__ as campaigns
from tests.campaigns.corrupt import campaign as corrupt
from tests.campaigns.corrupt import list_places, sweep
from tests.campaigns.fuzz import campaign as fuzz
from tests.campaigns.fuzz import is_right
from tests.campaigns.nifti import campaign as nifti
from tests.support.command import Semgen
from tests.support.stores import contents


def test_mutated_files_cost_only_themselves() -> None:
    status, errors, ends = fuzz(60, seed=5, workers=2)
    assert status == 0, errors
    assert is_right(60, errors, ends), (errors, ends)
    assert ends["unreadable"] >= 10


def test_a_store_without_the_end_of_a_file_or_all_of_it_is_found_broken(prepared: Path) -> None:
    num_files = sum(path.is_file() for path in prepared.rglob("*"))
    ends, missed = corrupt(prepared, 2 * num_files, seed=0)
    assert missed == []
    assert ends["deleted", "caught"] == ends["cut", "caught"] == num_files


def test_a_flipped_bit_in_any_block_of_a_store_is_found(prepared: Path) -> None:
    ends, missed = sweep(prepared, 100_000, seed=0)
    assert missed == []
    assert {kind for kind, _ in ends} == {"metadata", "table", "end of a file", "payload"}


def test_blocks_cover_every_byte_of_the_ends_of_a_file() -> None:
    places = dict(reversed(place) for place in list_places(20_000, 1, seed=3))
    ends = {at for at, part in places.items() if part == "end of a file"}
    assert ends == {*range(2048), *range(20_000 - 2048, 20_000)}
    assert len(places) == len(ends) + -(-(20_000 - 4096) // 64)


def test_only_campaigns_that_failed_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = campaigns.Campaign("right", "calendar {} 1", 4000, 2)
    wrong = campaigns.Campaign("wrong", "calendar {} 13", 2000)
    monkeypatch.setattr(campaigns, "CAMPAIGNS", (right, wrong))
    monkeypatch.setattr(sys, "argv", ["campaigns", str(tmp_path), "--scale", "0.5"])
    for begun in (["right-0", "wrong-0"], ["wrong-0"]):
        with pytest.raises(SystemExit, match="1"):
            campaigns.main()
        printed = capsys.readouterr().out
        assert re.findall(r"(\w+-\d): calendar", printed) == begun
        assert "| right | 1 | yes |" in printed
        assert "| wrong | 1 | no, 1 not |" in printed
    assert "January 2000" in (tmp_path / "right-0.log").read_text()


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
