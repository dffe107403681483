"""The job: the same bytes whatever happens to it, and nothing private in them."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pydicom
import pytest
from distributed import Client

from pipeline.archive.catalogue import Catalogue
from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.lookup import catalogue_folder
from pipeline.archive.rows import select_rejections
from pipeline.archive.series import Series
from pipeline.config import PrepareConfig
from pipeline.isolation import ProcessCrashed, ProcessEnded, ProcessKilled
from pipeline.stages.cut import ScanCut, SourceChanged, cut_scan
from pipeline.stages.survey import survey_archive, survey_series
from store import PatchStore
from store.progress import SILENT
from store.settings import to_json
from store.writer import StoreWriter
from tests.support.command import (
    ENVIRONMENT,
    Semgen,
    assert_refused,
    run,
    run_code,
    running_semgen,
)
from tests.support.stores import contents, copy_with_catalogue, unseal


def assert_same_bytes(store: Path, other: Path) -> None:
    one, two = contents(store), contents(other)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


# The same bytes ----------------------------------------------------------------------------------


def test_two_workers_make_the_same_bytes_as_one(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    done = semgen("prepare", phantoms, tmp_path / "s", "--config", config_file, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(tmp_path / "s", prepared)


def has_survey(store: Path) -> bool:
    return any((catalogue_folder(store) / "survey").rglob("*.chunk"))


def is_surveyed(store: Path) -> bool:
    file = store / "zarr.json"
    return file.is_file() and '"accepted"' in file.read_text()


def has_digests(store: Path) -> bool:
    file = store / "scans/thumbnail/zarr.json"
    return file.is_file() and "shard_sha256" in file.read_text()


STAGES: dict[str, Callable[[Path], bool]] = {
    "list series": lambda store: (catalogue_folder(store) / "catalogue.sqlite").is_file(),
    "survey": has_survey,
    "embed": is_surveyed,
    "discover": lambda store: (store / "classes").is_dir(),
    "cut": lambda store: any((store / "train" / "patch").glob("c/*/*/*/*")),
    "seal": has_digests,
}


def test_a_job_killed_in_every_stage_makes_the_same_bytes_in_the_end(
    prepared: Path, phantoms: Path, config_file: Path, semgen: Semgen, tmp_path: Path
) -> None:
    store = tmp_path / "killed.store"
    command = ["prepare", phantoms, store, "--config", config_file, "--workers", 2]
    for stage, has_begun in STAGES.items():
        with running_semgen(*command) as job:
            while not has_begun(store):
                assert job.is_alive(), f"ended before {stage}"
                time.sleep(0.005)
            job.kill()
        assert job.exitcode == -signal.SIGKILL
    done = semgen(*command)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(store, prepared)


def test_an_interrupted_job_says_in_one_line_how_to_resume(
    phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "interrupted.store"
    command = ["prepare", phantoms, store, "--config", config_file, "--workers", 2]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the whole group: workers and all
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as job:
        while not has_survey(store):
            assert job.poll() is None
            time.sleep(0.002)
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate()
    assert job.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "Error: interrupted; run the same command again to resume"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address of a scheduler with one worker, each a process of its own; the scheduler's."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--port", "0", "--scheduler-file", str(file), "--no-dashboard"]
    worker = [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard"]
    # a scheduler that gives a task up as soon as one worker is lost that had it
    environment = ENVIRONMENT | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    quiet = {"env": environment, "cwd": tmp_path, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(scheduler, **quiet) as first:  # type: ignore[call-overload]
        while not file.is_file():
            assert first.poll() is None
            time.sleep(0.05)
        with subprocess.Popen(worker, **quiet) as second:  # type: ignore[call-overload]
            try:
                yield json.loads(file.read_text())["address"], first
            finally:
                second.terminate()
                second.wait()
                first.terminate()


def kill_workers() -> None:
    """Kill the worker processes of `cluster`; they are started again."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = (process.parent() or process).cmdline(), process.cmdline()
            if "worker" in words[0] and "spawn_main" in words[1][-1]:
                process.kill()


@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_loses_its_worker_in_every_stage_makes_the_same_bytes(
    prepared: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "cluster.store"
    command = ["prepare", phantoms, store, "--config", config_file]
    command += ["--scheduler-file", tmp_path / "scheduler.json"]
    errors = tmp_path / "errors"
    errors.touch()
    with running_semgen(*command, errors=errors) as job:
        for stage in ("survey", "discover", "cut"):
            while not STAGES[stage](store):
                assert job.is_alive(), errors.read_text()
                time.sleep(0.005)
            kill_workers()
        job.join()
    assert job.exitcode == 0, errors.read_text()
    assert_same_bytes(store, prepared)


def test_nothing_is_lost_when_the_scheduler_dies(
    prepared: Path,
    phantoms: Path,
    config_file: Path,
    semgen: Semgen,
    cluster: tuple[str, "subprocess.Popen[bytes]"],
    tmp_path: Path,
) -> None:
    address, scheduler = cluster
    store = tmp_path / "lost.store"
    command = ["prepare", phantoms, store, "--config", config_file]
    errors = tmp_path / "errors"
    errors.touch()
    with running_semgen(*command, "--scheduler", address, errors=errors) as job:
        while not has_survey(store):
            assert job.is_alive()
            time.sleep(0.005)
        scheduler.kill()
        job.join()
    assert job.exitcode == 1
    assert "Traceback" not in errors.read_text()
    assert "lost the Dask scheduler" in errors.read_text().splitlines()[-1]
    done = semgen(*command, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(store, prepared)


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
from pipeline.stages.survey import time_limit

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
