"""Dask: connect to workers on this machine, of a running scheduler, or of a batch system."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import dask
from distributed import Client, LocalCluster
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import get_backend
from distributed.versions import VersionMismatchWarning

from pipeline.batch import (
    WORKER_ENVIRONMENT,
    ClusterConfig,
    Jobs,
    load_cluster_config,
)
from pipeline.errors import ClusterError
from pipeline.tasks import refuse_threads
from store.interrupts import interrupts_delayed
from store.progress import SILENT, Progress, show_note

WORKER_MODULES: Final = (
    "pipeline.stages.survey",
    "pipeline.stages.near_duplicates",
    "pipeline.stages.placing",
    "pipeline.stages.cut",
)
"""Modules of the functions that workers run."""
_IMPORTS: Final = f"import {', '.join(WORKER_MODULES)}"
_COMPARED: Final = ("python", "dask", "distributed", "numpy", "scipy", "SimpleITK")
"""Packages whose versions should be the same everywhere."""
_CONNECT_SECONDS = 10.0
_WATCH_SECONDS = 2.0
_PATIENCE_SECONDS, _REPEAT_SECONDS = 5.0, 60.0
"""Missing workers are reported after this time, then again at this interval."""


_SETTINGS: Final = {
    "distributed.worker.memory.terminate": False,
    "distributed.admin.log-format": "%(name)s - %(levelname)s",
    "distributed.comm.timeouts.connect": "60s",
    # By default, a worker that does not restart within 15 s, as on a busy machine, is given up for
    # good; without workers, the job would wait for ever.
    "distributed.deploy.lost-worker-timeout": "1 day",
    # a series that hangs takes its time limit at each try
    "distributed.scheduler.allowed-failures": 1,
    # looks at the stack of each process every 10 ms, on the cores that should cut crops
    "distributed.worker.profile.enabled": False,
    **{f"distributed.nanny.pre-spawn-environ.{k}": v for k, v in WORKER_ENVIRONMENT.items()},
}
"""Of clusters that are started here."""


def resolve_workers(
    *,
    workers: int | None,
    scheduler: str | None,
    scheduler_file: str | Path | None,
    cluster: ClusterConfig | str | Path | None,
) -> tuple[str | None, ClusterConfig | None]:
    """Where the tasks will run: a scheduler's address, jobs of a batch system, or neither.

    Raises ClusterError when several are given, or nothing can be listening at the address.
    """
    given = {
        "--workers": workers,
        "--scheduler": scheduler,
        "--scheduler-file": scheduler_file,
        "--cluster": cluster,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ClusterError(f"{' and '.join(names)} exclude each other; give one of them")
    if scheduler_file is not None:
        scheduler = _read_scheduler_file(Path(scheduler_file))
    if scheduler is not None:
        _check_scheduler(scheduler)
    if cluster is not None and not isinstance(cluster, ClusterConfig):
        cluster = load_cluster_config(cluster)
    return scheduler, cluster


def _read_scheduler_file(file: Path) -> str:
    try:
        return str(json.loads(file.read_text("utf-8"))["address"])
    except FileNotFoundError:
        raise ClusterError(
            f"{file}: no such file; `dask scheduler --scheduler-file {file}` writes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{file}: not a scheduler file of Dask; `dask scheduler --scheduler-file {file}` writes"
            " one"
        ) from error


def _check_scheduler(address: str) -> None:
    """ClusterError when nothing can be listening at a scheduler's address."""
    try:
        protocol, host_port = parse_address(address)
        get_backend(protocol)  # ValueError when there is no such protocol
        host, port = parse_host_port(host_port, 0)
        if not host or not port:
            raise ValueError
    except ValueError as error:
        raise ClusterError(
            f"--scheduler {address}: must be an address such as tcp://HOST:8786, which"
            " `dask scheduler` prints"
        ) from error
    if protocol not in ("tcp", "tls"):
        return  # only connecting shows it
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _not_answering(address, error) from error


def _not_answering(address: str, error: Exception) -> ClusterError:
    reason = (isinstance(error, OSError) and error.strerror) or "no answer"
    return ClusterError(
        f"--scheduler {address}: no Dask scheduler can be reached there ({reason});"
        " start it with `dask scheduler`, or check the address"
    )


@contextlib.contextmanager
def connect(
    workers: int | None,
    scheduler: str | None,
    progress: Progress = SILENT,
    *,
    cluster: ClusterConfig | None = None,
    folder: Path | None = None,
) -> Iterator[Client]:
    """A client of a running scheduler, of jobs, or of a new local cluster of one-thread processes.

    At least one worker has joined, however long that takes.

    workers
        Number of local processes; one for each CPU core where None.
    progress
        Shows when tasks wait for workers.
    folder
        Private folder that all nodes see, for the keys and the output of jobs.
    """
    with contextlib.ExitStack() as stack:
        jobs = None
        if scheduler is not None:
            client = stack.enter_context(_connect_to(scheduler))
            hint = (
                f"start some with `dask worker {scheduler} --nworkers N --nthreads 1` where semgen"
                " is installed"
            )
        elif cluster is not None:
            assert folder is not None
            jobs = stack.enter_context(_open_jobs(cluster, folder))
            client = stack.enter_context(Client(jobs.cluster, set_as_default=False))
            hint = f"their output is in {jobs.log_folder}"
        else:
            client = stack.enter_context(_start_local(workers or count_cores()))
            hint = "they are started again"
        stack.enter_context(_watched(client, progress, hint, jobs))
        if scheduler is not None or cluster is not None:
            _check_software(client, progress)
        if importlib.util.find_spec("bokeh") is not None:
            port = client.scheduler_info()["services"].get("dashboard")
            host = "127.0.0.1" if scheduler is None else urlsplit(scheduler).hostname
            if port is not None:  # a given scheduler may have none
                show_note(progress, f"dashboard: http://{host}:{port}/status")
        yield client


@contextlib.contextmanager
def _connect_to(scheduler: str) -> Iterator[Client]:
    for name in ("distributed", "distributed.client", "distributed.comm"):  # what matters is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore", category=VersionMismatchWarning):
            client = Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise _not_answering(scheduler, error) from error
    with client:
        yield client


def _check_software(client: Client, progress: Progress) -> None:
    """Wait for a worker; ClusterError unless scheduler and workers run the same semgen as we do."""
    client.submit(exec, "", pure=False).result()  # makes a cluster start workers; needs no module
    results = client.run(exec, _IMPORTS, on_error="return")
    try:
        client.run_on_scheduler(exec, _IMPORTS)  # it unpickles the tasks
    except ImportError as error:
        results["scheduler"] = error
    for address, result in results.items():
        if isinstance(result, ImportError):
            raise ClusterError(
                f"Dask {address} cannot import semgen ({result}); start scheduler and workers in an"
                " environment with the same semgen as this command's"
            )
    refuse_threads(client.nthreads())
    _compare_versions(client, progress)


def _compare_versions(client: Client, progress: Progress) -> None:
    found: Any = client.get_versions(packages=["semgen", *_COMPARED])
    ours = found["client"]["packages"]
    differing = []
    for address, software in {"scheduler": found["scheduler"], **found["workers"]}.items():
        theirs = software["packages"]
        others = [name for name in ("semgen", *_COMPARED) if theirs[name] not in (None, ours[name])]
        text = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in others)
        if "semgen" in others:
            raise ClusterError(f"Dask {address} has {text}; install the same version everywhere")
        if others:
            differing.append(f"{address} has {text}")
    if differing:
        more = f" (and {len(differing) - 1} more)" if differing[1:] else ""
        show_note(progress, f"other versions than in this process: Dask {differing[0]}{more}")


@contextlib.contextmanager
def _open_jobs(config: ClusterConfig, folder: Path) -> Iterator[Jobs]:
    with dask.config.set(_SETTINGS):
        jobs = Jobs(config, folder)
        try:
            with jobs.cluster:
                jobs.cluster.sync(jobs.adapt, 1)  # here, a refused job is an error
                yield jobs
        finally:
            jobs.delete_keys()


@contextlib.contextmanager
def _start_local(workers: int) -> Iterator[Client]:
    with dask.config.set(_SETTINGS), contextlib.ExitStack() as stack:
        with interrupts_delayed(), _start_explained():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                preload=list(WORKER_MODULES),  # imports take a second, while the workers start
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=50,
            )
            stack.enter_context(cluster)
        yield stack.enter_context(Client(cluster, set_as_default=False))


@contextlib.contextmanager
def _watched(client: Client, progress: Progress, hint: str, jobs: Jobs | None) -> Iterator[None]:
    """Until the block ends: say when tasks wait although there are no workers; adapt the jobs."""
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, progress, hint, jobs, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(
    client: Client, progress: Progress, hint: str, jobs: Jobs | None, ended: threading.Event
) -> None:
    joined = warned = False
    known: set[str] = set()
    num_lost = 0
    due = time.monotonic() + _PATIENCE_SECONDS
    while not ended.wait(_WATCH_SECONDS):
        now, problem = time.monotonic(), ""
        num_waiting = sum(future.status == "pending" for future in list(client.futures.values()))
        try:
            workers = set(client.nthreads())
            num_workers, lost, known = len(workers), len(known - workers), workers
            if lost and jobs is None and num_waiting:  # jobs also end because they are not needed
                num_lost += lost
                show_note(progress, f"workers lost: {num_lost}; their tasks are done again")
            if jobs is not None:
                jobs.cluster.sync(jobs.adapt, num_waiting)
        except ClusterError as error:
            problem = f"; {error}"
        except OSError:  # the scheduler is lost, which every task shows
            return
        if num_workers or not num_waiting:
            if warned and num_workers:
                show_note(progress, f"workers joined: {num_workers}")
            joined, warned, due = joined or num_workers > 0, False, now + _PATIENCE_SECONDS
        elif now >= due:
            state = "all were lost" if joined else "none has joined yet"
            show_note(progress, f"waiting for workers: {state}; {hint}{problem}")
            warned, due = True, now + _REPEAT_SECONDS


@contextlib.contextmanager
def _start_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClusterError("a worker died as it started; run the same command again") from error


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
