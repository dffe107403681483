"""Bad series, full disks and lost rights: each costs only itself, in one line."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from distributed import Client

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.folders import ArchiveError
from pipeline.archive.headers import read_folder
from pipeline.archive.rows import select_rejections
from pipeline.config import PrepareConfig
from pipeline.isolation import ProcessCrashed, ProcessEnded, ProcessKilled
from pipeline.stages.survey import survey_archive, survey_series
from store import PatchStore
from store.progress import SILENT
from store.settings import to_json
from store.writer import StoreWriter
from tests.support.command import ENVIRONMENT, Semgen, run_code
from tests.support.stores import assert_same_bytes, contents

# Bad series --------------------------------------------------------------------------------------


def test_rejected_series_are_counted_by_reason(patches: PatchStore) -> None:
    survey = patches.stages["survey"]
    assert survey["accepted"] == 5
    assert survey["rejected"] == {"duplicate": 1, "unreadable": 1}


CRASHES = """
import json, os
import dask
from pipeline.cluster import connect
from pipeline.tasks import run_bounded

# as on a busy machine, where a worker takes longer to restart than Dask waits by default
dask.config.set({"distributed.deploy.lost-worker-timeout": "1ms"})

# shell commands stand for series; PPID is the worker that runs them
crash, fine = "kill -SEGV $PPID", "sleep 0.1"
series = [fine, crash, fine, fine, fine, crash, fine, fine, fine]
with connect(1, None) as client:
    found = list(run_bounded(client, os.system, series))
lost = [item for item, result in found if isinstance(result, BaseException)]
print(json.dumps([sorted(item for item, _ in found) == sorted(series), lost == [crash] * 2]))
"""


def test_a_series_that_crashes_the_reader_costs_only_itself() -> None:
    done = run_code(CRASHES)
    all_are_reported, crashes_alone_are_lost = json.loads(done.stdout)
    assert all_are_reported
    assert crashes_alone_are_lost


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (ProcessCrashed("its process ended by SIGSEGV"), "reader crashed"),
        (ProcessKilled("its process was killed by SIGKILL"), "out of memory"),
    ],
)
def test_a_series_that_ends_its_process_is_rejected_with_the_cause(
    ended: ProcessEnded, reason: str, phantoms: Path, config: PrepareConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run_bounded(_client: None, function: Any, items: Any, *arguments: Any) -> Any:
        reads_voxels = function is survey_series
        return ((i, ended if reads_voxels else function(i, *arguments)) for i in items)

    monkeypatch.setattr("pipeline.stages.survey.run_bounded", run_bounded)
    store = StoreWriter.create(tmp_path / "s", config=to_json(config), software={})
    with contextlib.closing(Catalogue(tmp_path / "catalogue")) as catalogue:
        survey_archive(
            cast("Client", object()), [phantoms], store, catalogue, config, manifest=None,
            extend=None, progress=SILENT,
        )  # fmt: skip
        assert catalogue.reasons() == {reason: 7}
        assert {detail for _, _, detail in select_rejections(catalogue.db)} == {str(ended)}


HANGS = """
import json, re
from pipeline.cluster import connect
from pipeline.tasks import run_bounded
from pipeline.isolation import time_limit

def read(text):
    with time_limit(1):
        return bool(re.match("(a+)+$", text))  # holds the interpreter's lock for years

texts = ["a", "a" * 50 + "b", "aa", "b"]
with connect(1, None) as client:
    found = dict(run_bounded(client, read, texts))
lost = [isinstance(found[text], BaseException) for text in texts]
print(json.dumps([lost, found["a"], found["b"]]))
"""


def test_a_series_that_hangs_the_reader_costs_only_itself() -> None:
    done = run_code(HANGS)
    assert json.loads(done.stdout) == [[False, True, False, False], True, False]


def test_a_broken_link_costs_only_itself(
    phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "gone.nii.gz").symlink_to(tmp_path / "unmounted" / "scan.nii.gz")
    done = semgen(
        "prepare", archive, tmp_path / "s", "--config", config_file, "--workers", 1, cwd=tmp_path
    )
    assert "no usable CT series in the archive (1 broken link)" in done.stderr.splitlines()[-1]


# Disks and rights ---------------------------------------------------------------------------------


def test_a_lost_write_permission_is_reported_and_nothing_is_lost(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    command = [sys.executable, "-m", "cli", "prepare", str(phantoms), str(store)]
    command += ["--config", str(config_file), "--workers", "1"]
    if os.geteuid() == 0:  # a root that must ask like anyone else
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    for stage in ("scans", "train"):  # during the survey, and when the plan is written
        job = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while not (store / stage).exists() and job.poll() is None:
            time.sleep(0.01)
        folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o500)
        _, errors = job.communicate()
        for folder in folders:
            folder.chmod(0o755)
        assert job.returncode == 1, errors
        assert "Traceback" not in errors
        assert "Permission denied" in errors.splitlines()[-1]
    assert semgen(*command[command.index("prepare") :]).returncode == 0
    assert contents(store) == contents(prepared)


@pytest.mark.parametrize("at", [read_folder, survey_series])
@pytest.mark.parametrize("leaves_folder", [False, True])
def test_an_archive_that_is_unmounted_rejects_nothing(
    phantoms: Path, config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    at: Callable[..., Any], leaves_folder: bool,
) -> None:  # fmt: skip
    archive, away = tmp_path / "archive", tmp_path / "away"
    shutil.copytree(phantoms, archive)
    store = StoreWriter.create(tmp_path / "s", config=to_json(config), software={})

    def unmounting(_client: None, function: Any, items: Any, *arguments: Any) -> Any:
        for number, item in enumerate(items):
            if function is at and number == 1:
                archive.rename(away)
                if leaves_folder:
                    archive.mkdir()
            yield item, function(item, *arguments)

    def survey(run_bounded: Any, catalogue: Catalogue) -> None:
        monkeypatch.setattr("pipeline.stages.survey.run_bounded", run_bounded)
        survey_archive(
            cast("Client", object()), [archive], store, catalogue, config, manifest=None,
            extend=None, progress=SILENT,
        )  # fmt: skip

    with contextlib.closing(Catalogue(tmp_path / "catalogue")) as catalogue:
        message = "is empty now" if leaves_folder else "No such file or directory"
        with pytest.raises(
            ArchiveError, match=rf"{archive}: {message}, on .* run the same command"
        ):
            survey(unmounting, catalogue)
        if leaves_folder:
            archive.rmdir()
        away.rename(archive)
        survey(
            lambda _, function, items, *rest: ((i, function(i, *rest)) for i in items), catalogue
        )
        assert catalogue.reasons() == {"duplicate": 1, "unreadable": 1}


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of that size, where this user may mount one; the value makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "semgen", "-o"]
    done = subprocess.run([*mount, f"size={num_bytes}", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no right to mount a disk")

    def grow(to: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={to}", folder], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", folder], check=True)


def run_on_terminal(*arguments: object) -> tuple[int, str]:
    """Exit status, and what standard error showed on a terminal."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as job:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # what reading raises once the last writer is gone
            while piece := os.read(ours, 65536):
                shown += piece
    os.close(ours)
    return job.returncode, shown.decode()


def test_a_full_disk_is_reported_below_the_progress_bar_and_nothing_is_lost(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    whole = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    store = tmp_path / "disk" / "s"
    command = ["prepare", phantoms, store, "--config", config_file, "--workers", 1]
    with small_disk(tmp_path / "disk", int(0.6 * whole)) as grow:
        status, shown = run_on_terminal(*command)
        assert status == 1
        assert "\x1b[" in shown  # bars were drawn
        assert "Traceback" not in shown
        last = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown.splitlines()[-1])
        assert last.startswith("Error: "), shown
        assert "free disk space" in last
        grow(20 * whole)
        assert semgen(*command).returncode == 0
        assert_same_bytes(store, prepared)
