"""Dask: a cluster to work on, and tasks with few in flight."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, as_completed

from store.errors import SemgenError

_TASK_SECONDS = 0.2
_MOST_SHARING = 16
"""Items share a task until it takes so long, or holds so many."""


class ClusterError(SemgenError):
    """The Dask cluster cannot be used as asked."""


def run_bounded(
    client: Client, function: Callable[..., Any], items: Iterable[Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item, *arguments)) as they finish, few in flight, so memory stays flat.

    Items that take little time share tasks, since a task costs the scheduler milliseconds. A task
    that kills its worker time and again yields a KilledWorker instead of a result. Dask blames
    every task that a dead worker held; the items of those that it gave up are tried again, each
    alone.
    """
    blamed = []
    limit = 2 * num_threads(client) + 2
    for item, result in _run(client, function, items, arguments, limit, _MOST_SHARING):
        if isinstance(result, KilledWorker):
            blamed.append(item)
        else:
            yield item, result
    yield from _run(client, function, blamed, arguments, 1, 1)


def run_items(
    items: Sequence[Any], function: Callable[..., Any], *arguments: Any
) -> tuple[list[Any], float]:
    """In a worker: the results, and the seconds that they took."""
    began = time.perf_counter()
    return [function(item, *arguments) for item in items], time.perf_counter() - began


def _run(
    client: Client,
    function: Callable[..., Any],
    items: Iterable[Any],
    arguments: tuple[Any, ...],
    limit: int,
    most_sharing: int,
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
            sharing = max(1, min(wanted, 2 * sharing, most_sharing))
        future.release()
        submit_next()
        yield from zip(shared, results, strict=True)


def raise_if_failed(result: object) -> None:
    """For work of which no part can be done without."""
    if isinstance(result, BaseException):
        raise result


def num_threads(client: Client) -> int:
    """Tasks that the cluster runs at once."""
    return max(1, sum(int(n) for n in client.nthreads().values()))


@contextlib.contextmanager
def connect(workers: int, scheduler: str | None) -> Iterator[Client]:
    """A client of a running scheduler, or of a local cluster of one-thread processes."""
    if scheduler is not None:
        for name in ("distributed", "distributed.client"):  # what matters is raised, too
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with Client(scheduler, timeout=30, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            yield client
        return
    quiet = {
        "distributed.worker.memory.terminate": False,
        "distributed.admin.log-format": "%(name)s - %(levelname)s",
        "distributed.comm.timeouts.connect": "60s",
        # a series that hangs costs its time limit at each try
        "distributed.scheduler.allowed-failures": 1,
        # Dask's own value makes every crop's buffers fresh pages: cutting took twice as long.
        # Whole scans still go back to the system at once.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 2**24,
        "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 2**22,
    }
    with dask.config.set(quiet), contextlib.ExitStack() as stack:
        with _interrupts_ignored(), _start_explained():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                preload="pipeline.tasks",  # imports take a second, while the workers start
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
    """Ignore Ctrl-C, and let the processes begun meanwhile ignore it for good.

    It reaches the whole process group; the command itself must end its workers in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def default_workers() -> int:
    """One worker for each core that this process may use."""
    return len(os.sched_getaffinity(0))
