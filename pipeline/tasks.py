"""Run tasks on a Dask cluster: few in flight, done again as often as workers are lost.

Dask fails a task after several workers died that held it. Whether the task killed them or they
were preempted, Dask cannot tell. So such a task is done again in a process of its own, which a
worker starts and watches (docs/design/0017-clusters.md).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
from distributed import Client, KilledWorker, as_completed, get_worker
from distributed.client import futures_of
from distributed.system import MEMORY_LIMIT

from pipeline.errors import ClusterError
from pipeline.isolation import ProcessEnded, ProcessKilled, call_isolated

_TASK_SECONDS = 0.2
"""Items share a task as long as it takes at most about this long."""
_MAX_SHARING = 16
"""Maximum number of items that share a task."""
_LIMIT_SECONDS = 5.0
"""How often the number of tasks in flight is adapted to the size of the cluster."""
_MAX_KILLS = 3
"""How often the process of an item may be killed while its worker lives."""


def run_bounded(
    client: Client, function: Callable[..., Any], items: Iterable[Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item, *arguments)) as they finish, few in flight, so memory stays flat.

    Items that take little time share tasks, since a task costs the scheduler milliseconds. An item
    that ends its process also when it is alone yields ProcessCrashed or ProcessKilled instead of a
    result. A lost worker costs only time.
    """
    suspected = []
    for item, result in _run(client, run_items, function, items, arguments, _MAX_SHARING):
        if isinstance(result, KilledWorker):
            suspected.append(item)
        else:
            yield item, result
    yield from run_alone(client, function, suspected, *arguments)


def run_alone(
    client: Client, function: Callable[..., Any], items: Iterable[Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    """As `run_bounded`, each item in a process of its own from the start."""
    suspects = [(item, 0) for item in items]
    while suspects:
        lost = [future for future in futures_of(arguments) if future.status == "error"]
        if lost:
            client.retry(lost)  # else what they failed with is the result of every task
        remaining = []
        for (item, kills), result in _run(client, run_isolated, function, suspects, arguments):
            killed = kills + isinstance(result, ProcessKilled)
            if isinstance(result, KilledWorker) or kills < killed < _MAX_KILLS:
                remaining.append((item, killed))
            else:
                yield item, result
        suspects = remaining


def run_items(
    items: Sequence[Any], function: Callable[..., Any], *arguments: Any
) -> tuple[list[Any], float]:
    """In a worker: the results, and the seconds that all took together."""
    worker = get_worker()
    refuse_threads({worker.address: worker.state.nthreads})  # it may have joined just now
    began = time.perf_counter()
    return [function(item, *arguments) for item in items], time.perf_counter() - began


def run_isolated(
    suspects: Sequence[tuple[Any, int]], function: Callable[..., Any], *arguments: Any
) -> tuple[list[Any], float]:
    """As `run_items`, each item in a process of its own; how often it was killed is ignored."""
    own = psutil.Process().memory_info().rss
    max_bytes = (get_worker().memory_manager.memory_limit or MEMORY_LIMIT) - own
    began = time.perf_counter()
    results: list[Any] = []
    for item, _ in suspects:
        try:
            results.append(call_isolated(function, item, *arguments, max_bytes=max_bytes))
        except ProcessEnded as error:
            results.append(error)
    return results, time.perf_counter() - began


def _run(
    client: Client,
    runner: Callable[..., tuple[list[Any], float]],
    function: Callable[..., Any],
    items: Iterable[Any],
    arguments: tuple[Any, ...],
    max_sharing: int = 1,
) -> Iterator[tuple[Any, Any]]:
    items = iter(items)
    waiting: dict[Any, tuple[Any, ...]] = {}  # items by future
    finished = as_completed(loop=client.loop)
    sharing, limit, measured = 1, 0, -_LIMIT_SECONDS
    while True:
        if time.monotonic() - measured >= _LIMIT_SECONDS:
            limit, measured = 2 * num_threads(client) + 2, time.monotonic()
        while len(waiting) < limit:
            shared = tuple(itertools.islice(items, sharing))
            if not shared:
                break
            future = client.submit(runner, shared, function, *arguments, pure=False)
            waiting[future] = shared
            finished.add(future)
        if not waiting:
            return
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
        yield from zip(shared, results, strict=True)


def raise_if_failed(result: object) -> None:
    """Raise a result of `run_bounded` that is an exception."""
    if isinstance(result, BaseException):
        raise result


def num_threads(client: Client) -> int:
    """Tasks that the cluster runs at once, or will when all requested workers have joined."""
    requested = getattr(client.cluster, "plan", ())
    return max(1, sum(int(n) for n in client.nthreads().values()), len(requested))


def refuse_threads(num_threads: dict[str, int]) -> None:
    """ClusterError for a worker that runs several tasks at once: a time limit ends all of them."""
    for address, number in num_threads.items():
        if number > 1:
            raise ClusterError(
                f"the Dask worker {address} has {number} threads; one is required, because semgen"
                " stops a read that takes too long by ending the worker process. Start workers with"
                " `--nthreads 1` and a larger --nworkers"
            )
