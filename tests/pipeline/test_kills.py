"""Killed jobs, workers and schedulers: the same bytes in the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.archive.lookup import catalogue_folder
from tests.support.command import ENVIRONMENT, Semgen, running_semgen
from tests.support.stores import assert_same_bytes


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_says_in_one_line_how_to_resume(
    phantoms: Path, config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    store = tmp_path / "interrupted.store"
    command = ["prepare", phantoms, store, "--config", config_file, "--workers", 2]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as job:
        while not has_survey(store):
            assert job.poll() is None
            time.sleep(0.002)
        if number == signal.SIGINT:  # the terminal sends it to the whole group: workers and all
            os.killpg(job.pid, number)
        else:
            job.send_signal(number)
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
