"""Dask: connect to a cluster, and run tasks with few of them in flight."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import dask
from distributed import Client, KilledWorker, LocalCluster, as_completed, get_worker
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import get_backend

from store.errors import SemgenError
from store.progress import SILENT, Progress

_TASK_SECONDS = 0.2
"""Items share a task as long as it takes at most about this long."""
_MAX_SHARING = 16
"""Maximum number of items that share a task."""
WORKER_MODULES: Final = (
    "pipeline.stages.survey",
    "pipeline.stages.near_duplicates",
    "pipeline.stages.placing",
    "pipeline.stages.cut",
)
"""Modules of the functions that workers run."""
_CONNECT_SECONDS = 10.0
_WORKER_SECONDS = 300
"""How long to wait for the first worker of a given scheduler."""


class ClusterError(SemgenError):
    """The Dask cluster cannot be used as asked."""


def run_bounded(
    client: Client, function: Callable[..., Any], items: Iterable[Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item, *arguments)) as they finish, few in flight, so memory stays flat.

    Items that take little time share tasks, since a task costs the scheduler milliseconds. An item
    that kills its worker again and again yields a KilledWorker instead of a result. Dask fails
    every task that a dead worker held; the items of these are tried again, one at a time.
    """
    failed = []
    limit = 2 * num_threads(client) + 2
    for item, result in _run(client, function, items, arguments, limit, _MAX_SHARING):
        if isinstance(result, KilledWorker):
            failed.append(item)
        else:
            yield item, result
    yield from _run(client, function, failed, arguments, 1, 1)


def run_items(
    items: Sequence[Any], function: Callable[..., Any], *arguments: Any
) -> tuple[list[Any], float]:
    """In a worker: the results, and the seconds that all took together."""
    worker = get_worker()
    _refuse_threads({worker.address: worker.state.nthreads})  # it may have joined just now
    began = time.perf_counter()
    return [function(item, *arguments) for item in items], time.perf_counter() - began


def _run(
    client: Client,
    function: Callable[..., Any],
    items: Iterable[Any],
    arguments: tuple[Any, ...],
    limit: int,
    max_sharing: int,
) -> Iterator[tuple[Any, Any]]:
    items = iter(items)
    waiting: dict[Any, tuple[Any, ...]] = {}  # items by future
    finished = as_completed(loop=client.loop)
    sharing = 1

    def submit_next() -> None:
        shared = tuple(itertools.islice(items, sharing))
        if shared:
            future = client.submit(run_items, shared, function, *arguments, pure=False)
            waiting[future] = shared
            finished.add(future)

    for _ in range(limit):
        submit_next()
    while waiting:
        future = next(finished)
        shared = waiting.pop(future)
        try:
            results, seconds = future.result()
        except KilledWorker as error:
            results = [error] * len(shared)
        else:
            wanted = int(_TASK_SECONDS / max(seconds / len(shared), 1e-6))
            sharing = max(1, min(wanted, 2 * sharing, max_sharing))
        future.release()
        submit_next()
        yield from zip(shared, results, strict=True)


def raise_if_failed(result: object) -> None:
    """Raise a result of `run_bounded` that is an exception."""
    if isinstance(result, BaseException):
        raise result


def num_threads(client: Client) -> int:
    """Tasks that the cluster runs at once."""
    return max(1, sum(int(n) for n in client.nthreads().values()))


def check_scheduler(address: str) -> None:
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
def _connect_to(scheduler: str, progress: Progress) -> Iterator[Client]:
    for name in ("distributed", "distributed.client", "distributed.comm"):  # what matters is raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise _not_answering(scheduler, error) from error
    with client:
        _wait_for_workers(client, scheduler, progress)
        _refuse_threads(client.nthreads())
        yield client


def _wait_for_workers(client: Client, scheduler: str, progress: Progress) -> None:
    if client.nthreads():
        return
    with progress.stage("waiting for workers", 1, "worker") as advance:
        for _ in range(_WORKER_SECONDS):
            advance(0)
            with contextlib.suppress(TimeoutError):
                client.wait_for_workers(1, timeout=1)
                advance(1)
                return
    raise ClusterError(
        f"--scheduler {scheduler}: no worker joined it within {_WORKER_SECONDS} s; start some with"
        f" `dask worker {scheduler} --nworkers N --nthreads 1`, then run the same command again"
    )


def _refuse_threads(num_threads: dict[str, int]) -> None:
    """ClusterError for a worker that runs several tasks at once: a time limit ends all of them."""
    for address, number in num_threads.items():
        if number > 1:
            raise ClusterError(
                f"the Dask worker {address} has {number} threads; one is required, because semgen"
                " stops a read that takes too long by ending the worker process. Start workers with"
                " `--nthreads 1` and a larger --nworkers"
            )


@contextlib.contextmanager
def connect(
    workers: int | None, scheduler: str | None, progress: Progress = SILENT
) -> Iterator[Client]:
    """A client of a running scheduler, or of a new local cluster of one-thread processes.

    workers
        Number of local processes; one for each CPU core where None.
    """
    if scheduler is not None:
        with _connect_to(scheduler, progress) as client:
            yield client
        return
    settings = {
        "distributed.worker.memory.terminate": False,
        "distributed.admin.log-format": "%(name)s - %(levelname)s",
        "distributed.comm.timeouts.connect": "60s",
        # By default, a worker that does not restart within 15 s, as on a busy machine, is given up
        # for good; without workers, the job would wait for ever.
        "distributed.deploy.lost-worker-timeout": "1 day",
        # a series that hangs takes its time limit at each try
        "distributed.scheduler.allowed-failures": 1,
        # With Dask's default, the memory of each crop goes back to the system and is requested
        # again: cutting took twice as long. The memory of whole scans still goes back at once.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**24,
        "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**22,
    }
    with dask.config.set(settings), contextlib.ExitStack() as stack:
        with _interrupts_ignored(), _start_explained():
            cluster = LocalCluster(
                n_workers=workers or count_cores(),
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
def _start_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClusterError("a worker died as it started; run the same command again") from error


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C here, and for good in processes started meanwhile.

    It reaches the process group; this process must end its workers in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
