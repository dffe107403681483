"""Run a function in a process of its own, and tell how that process ended.

A reading library that crashes or hangs takes its process with it. In a process of its own, the
worker survives and knows the cause; a worker that dies may have been preempted as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from distributed.protocol.pickle import dumps

from store.errors import SemgenError

_CRASHES: Final = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)
"""Signals of a process's own mistakes. All others come from outside."""
_SETTLE_SECONDS = 5.0
"""What kills all processes of a machine or a job has killed this one by then, too."""
_BEGUN: Final = b"begun"
_PR_SET_PDEATHSIG: Final = 1


class ProcessEnded(SemgenError):
    """The function has no result, because its process ended."""


class ProcessCrashed(ProcessEnded):
    """The function ended its own process, by a crash or by its time limit."""


class ProcessKilled(ProcessEnded):
    """The function's process was killed from outside, most likely for lack of memory."""


def call_isolated(function: Callable[..., Any], *arguments: Any, max_bytes: int) -> Any:
    """function(*arguments), computed in a new process, which takes about a second to start.

    max_bytes
        Memory that the process may allocate. Beyond it, an allocation fails in the function, before
        the system would kill the process, and perhaps all others of its job.

    Raises what the function raises, ProcessCrashed or ProcessKilled. The process ends with the
    thread that calls this.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.isolation import main; main()"],
        input=dumps((max_bytes, function, arguments)),  # as Dask does it
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    if not done.stdout.startswith(_BEGUN):
        raise RuntimeError(f"no process could be started: {done.stderr.decode(errors='replace')}")
    if done.returncode == 0:
        result, error = pickle.loads(done.stdout[len(_BEGUN) :])
        if error is not None:
            raise error
        return result
    if done.returncode > 0:
        raise ProcessCrashed(f"its process ended with status {done.returncode}")
    ended_by = signal.Signals(-done.returncode)
    if ended_by in _CRASHES:
        raise ProcessCrashed(f"its process ended by {ended_by.name}")
    time.sleep(_SETTLE_SECONDS)
    raise ProcessKilled(f"its process was killed by {ended_by.name}")


def main() -> None:
    """The new process: read the function from standard input, write its result to standard output.

    What the function prints is lost.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(os.dup(1), "wb") as results, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        max_bytes, function, arguments = pickle.loads(sys.stdin.buffer.read())
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would contain a scan
        results.write(_BEGUN)
        results.flush()
        try:
            result, error = function(*arguments), None
        except Exception as raised:
            result, error = None, raised
        results.write(pickle.dumps((result, error)))


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End this process after `seconds`: nothing else stops a reading library that hangs.

    For workers of one thread. Dask then sees a lost worker; `call_isolated`, a crash.
    """
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
