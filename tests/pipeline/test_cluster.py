"""The Dask cluster: one that cannot be used is refused early, in one line; workers are light."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import LocalCluster

from pipeline import cluster
from pipeline.cluster import connect
from pipeline.errors import ClusterError
from pipeline.job import prepare
from pipeline.tasks import run_bounded
from tests.support.command import ENVIRONMENT, assert_refused, run
from tests.support.progress import CountedProgress


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


def test_a_scheduler_file_that_is_none_is_refused(phantoms: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text('{"workers": {}}')
    done = run("prepare", phantoms, tmp_path / "s", "--scheduler-file", file)
    assert_refused(done, f"{file}: not a scheduler file of Dask")
    with pytest.raises(ClusterError, match="no such file"):
        prepare(phantoms, tmp_path / "s", scheduler_file=tmp_path / "missing.json")
    assert not (tmp_path / "s").exists()


def test_two_places_for_the_work_are_refused(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="--workers and --scheduler exclude each other"):
        prepare(phantoms, tmp_path / "s", workers=2, scheduler="tcp://127.0.0.1:8786")


def test_missing_workers_are_reported_and_the_job_goes_on_when_they_come(
    scheduler: str, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_WATCH_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "_PATIENCE_SECONDS", 0.2)
    progress = CountedProgress()

    def wait_for(text: str, times: int = 1) -> None:
        while sum(note.startswith(text) for note in progress.notes) < times:
            time.sleep(0.02)

    def start_workers_when_missed() -> None:
        wait_for("waiting for workers: none has joined yet; start some with `dask worker")
        start("worker", scheduler, "--nthreads", "1")
        wait_for("waiting for workers: all were lost; ")
        start("worker", scheduler, "--nthreads", "1")

    starting = threading.Thread(target=start_workers_when_missed)
    starting.start()
    with connect(None, scheduler, progress) as client:
        wait_for("workers joined: 1")
        client.retire_workers(list(client.nthreads()))
        assert list(run_bounded(client, abs, [-1])) == [(-1, 1)]
        wait_for("workers joined: 1", times=2)
    starting.join()


def test_lost_workers_are_counted_as_they_are_lost() -> None:
    seen = iter([{"a": 1, "b": 1}, {"b": 1}, {"b": 1, "c": 1}, {"d": 1}])
    task = SimpleNamespace(status="pending")
    client = SimpleNamespace(nthreads=lambda: next(seen), futures={"task": task})
    ends = iter([False] * 4 + [True])
    ended = SimpleNamespace(wait=lambda seconds: next(ends))
    progress = CountedProgress()
    cluster._watch(client, progress, "", None, ended)
    assert progress.notes == [f"workers lost: {num}; their tasks are done again" for num in (1, 3)]


def test_a_worker_that_cannot_import_semgen_is_refused(
    scheduler: str, start: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "without.py").write_text("import sys; sys.modules['pipeline'] = None")
    start("worker", scheduler, "--nthreads", "1", "--preload", str(tmp_path / "without.py"))
    with (
        pytest.raises(ClusterError, match="cannot import semgen"),
        connect(None, scheduler),
    ):
        pass


class Versions:
    """A client of a cluster with these versions of a package."""

    def __init__(self, package: str, here: str, there: str) -> None:
        names = ("semgen", *cluster._COMPARED)
        ours, theirs = ({**dict.fromkeys(names, "1"), package: one} for one in (here, there))
        self.found = {"client": {"packages": ours}, "scheduler": {"packages": ours}}
        self.found["workers"] = {"tcp://one": {"packages": theirs}, "tcp://two": {"packages": ours}}

    def get_versions(self, packages: list[str]) -> dict[str, Any]:
        return self.found


def test_another_version_of_semgen_is_refused_and_of_a_library_reported() -> None:
    progress = CountedProgress()
    with pytest.raises(ClusterError, match="Dask tcp://one has semgen 2, not 1; install the same"):
        cluster._compare_versions(Versions("semgen", "1", "2"), progress)
    cluster._compare_versions(Versions("numpy", "1", "2"), progress)
    assert progress.notes == [
        "other versions than in this process: Dask tcp://one has numpy 2, not 1"
    ]


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
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
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
