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
    """Training stopped because a signal asked for it; the run can be resumed."""


@dataclass(slots=True)
class Interruption:
    """Whether a signal has asked this process to stop."""

    requested: bool = False


@contextmanager
def watch_signals(*, forgive_second: bool = False) -> Iterator[Interruption]:
    """Note the first Ctrl-C or SIGTERM instead of ending at once.

    A second one does what it would do without us. Where nobody raised Interrupted meanwhile,
    leaving does. Outside the main thread, where Python handles no signals, nothing changes; a
    signal that the process ignores stays ignored.

    forgive_second
        Ignore further signals: torchrun sends Ctrl-C once more to processes that have it already,
        and kills them after a grace period of its own (30 s).
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

    def note(number: int, frame: FrameType | None) -> None:
        interruption.requested = True
        if not forgive_second:
            restore()

    for number in ours:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        restore()
    if interruption.requested:
        raise Interrupted
