"""Ctrl-C while processes are started that must not get it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Raise Ctrl-C at the end of the block; processes that are started meanwhile never get it.

    Also those of threads that are started meanwhile. Ctrl-C reaches the whole process group, but
    this process must end its workers in order. Only the main thread gets it.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (signal.SIG_IGN, None):
        yield
        return
    resource_tracker.ensure_running()  # the thread that starts it would get Ctrl-C again
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            raise KeyboardInterrupt
