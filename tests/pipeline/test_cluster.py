"""The Dask cluster: one that cannot be used is refused early, in one line; workers are light."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import LocalCluster

from pipeline import cluster
from pipeline.batch import ClusterError
from pipeline.cluster import connect
from pipeline.tasks import run_bounded
from tests.support.command import ENVIRONMENT, run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Starts `dask` with these words, in a process of its own."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*words: str) -> None:
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *words, "--no-dashboard"],
                env=ENVIRONMENT,
                cwd=tmp_path,
                stderr=subprocess.DEVNULL,
            )
        )

    yield begin
    for process in reversed(running):
        process.terminate()
        process.wait()


@pytest.fixture
def scheduler(start: Callable[..., None], tmp_path: Path) -> str:
    """The address of a scheduler without workers."""
    file = tmp_path / "scheduler.json"
    start("scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(file))
    while not file.is_file():
        time.sleep(0.05)
    return str(json.loads(file.read_text())["address"])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost", "must be an address such as tcp://HOST:8786"),
        ("tcp://127.0.0.1:many", "must be an address such as tcp://HOST:8786"),
        ("carrier-pigeon://127.0.0.1:8786", "must be an address such as tcp://HOST:8786"),
        ("tcp://127.0.0.1:1", "no Dask scheduler can be reached there (Connection refused)"),
    ],
)
def test_a_wrong_scheduler_address_is_refused_before_anything_is_created(
    phantoms: Path, tmp_path: Path, address: str, words: str
) -> None:
    done = run("prepare", phantoms, tmp_path / "s", "--scheduler", address)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: --scheduler {address}: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_the_job_waits_for_workers_for_a_limited_time(
    scheduler: str, monkeypatch: pytest.MonkeyPatch, phantoms: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "_WORKER_SECONDS", 1)
    done = run("prepare", phantoms, tmp_path / "s", "--scheduler", scheduler)
    assert done.exit_code == 1
    shown, error = done.stderr.splitlines()
    assert shown.startswith("waiting for workers: 0 worker")
    assert "no worker joined it within 1 s" in error
    assert f"dask worker {scheduler}" in error


def test_a_worker_that_joins_late_is_used(scheduler: str, start: Callable[..., None]) -> None:
    start("worker", scheduler, "--nthreads", "1")
    with connect(1, scheduler) as client:
        assert list(run_bounded(client, abs, [-1])) == [(-1, 1)]


def test_workers_of_several_threads_are_refused(
    scheduler: str, start: Callable[..., None], phantoms: Path, tmp_path: Path
) -> None:
    start("worker", scheduler, "--nthreads", "2")
    done = run("prepare", phantoms, tmp_path / "s", "--scheduler", scheduler)
    assert done.exit_code == 1
    assert "has 2 threads" in done.stderr.splitlines()[-1]
    assert "--nthreads 1" in done.stderr.splitlines()[-1]


def test_a_worker_of_several_threads_that_joins_later_is_refused_too() -> None:
    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as running,
        connect(1, running.scheduler_address) as client,
    ):
        assert list(run_bounded(client, abs, [-1])) == [(-1, 1)]
        (worker,) = running.workers.values()
        worker.state.nthreads = 2  # as a worker has that joined meanwhile
        with pytest.raises(ClusterError, match="has 2 threads"):
            list(run_bounded(client, abs, [-1]))


def test_workers_load_neither_torch_nor_faiss() -> None:
    script = (
        "import importlib, sys\n"
        "from pipeline.cluster import WORKER_MODULES\n"
        "for name in WORKER_MODULES: importlib.import_module(name)\n"
        "print(sorted({'torch', 'faiss', 'monai', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
