"""Ctrl-C and SIGTERM during training: stop between two steps, after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training stopped because of a signal; the run can be resumed."""


@dataclass(slots=True)
class Interruption:
    """Whether this process has received a signal to stop."""

    requested: bool = False


@contextmanager
def watch_signals(*, ignore_second: bool = False) -> Iterator[Interruption]:
    """Record the first Ctrl-C or SIGTERM instead of ending the process at once.

    A second signal has its usual effect. If nothing inside has raised Interrupted after a signal,
    it is raised at the end of the block. Outside the main thread, where Python handles no signals,
    nothing changes; a signal that the process ignores stays ignored.

    ignore_second
        Ignore further signals: torchrun sends Ctrl-C a second time to processes that already have
        it, and kills them after its own grace period (30 s).
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]

    def restore() -> None:
        for number in ours:
            signal.signal(number, before[number])

    def record(number: int, frame: FrameType | None) -> None:
        interruption.requested = True
        if not ignore_second:
            restore()

    for number in ours:
        signal.signal(number, record)
    try:
        yield interruption
    finally:
        restore()
    if interruption.requested:
        raise Interrupted
