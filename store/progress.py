"""How long work shows its progress: named stages that count in increments."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol, TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of units just done."""
_FIRST_SECONDS, _LEAST_SECONDS, _MOST_SECONDS = 2.0, 10.0, 600.0
"""When the first line about a stage is due; limits of the time between later ones."""
_WINDOW_SECONDS = 60.0
"""The rate is that of the last minute, or of the last tenth of the stage if that is longer."""
_SAMPLE_SECONDS = 1.0
_BAR_WIDTH, _NARROW_BAR, _NARROW = 16, 8, 100
"""Columns of a bar, also on a terminal of fewer columns than the last number."""
_log = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows stages, one after the other; pass one to any function that takes `progress`.

    It may also have the methods `note` and `tally`; see `Silent`.
    """

    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Enter a stage of `total` units (None: unknown), `done` of them by an earlier run."""
        ...


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Show one line at once, also within a stage; may be called from any thread."""

    def tally(self, text: str) -> None:
        """Show running counts beside the stage, in place of those that were shown before."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """Ignore a stage."""
        yield lambda count: None


SILENT: Final = Silent()


def show_note(progress: Progress, text: str) -> None:
    """Call `note` where the progress has it."""
    getattr(progress, "note", SILENT.note)(text)


def show_tally(progress: Progress, text: str) -> None:
    """Call `tally` where the progress has it."""
    getattr(progress, "tally", SILENT.tally)(text)


class Pace:
    """How fast the units of a stage are done; times are seconds on any one clock."""

    def __init__(self, total: int | None, done: int, now: float) -> None:
        """`done` units were done before `now`; they do not count for the rate."""
        self.total, self.before, self.done, self.began = total, done, done, now
        self._samples = deque([(now, done)])

    def advance(self, count: int, now: float) -> None:
        """Count units that are done now."""
        self.done += count
        if now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.done))
        since = now - max(_WINDOW_SECONDS, (now - self.began) / 10)
        while len(self._samples) > 1 and self._samples[1][0] <= since:
            self._samples.popleft()

    def rate(self, now: float) -> float:
        """Units per second in the recent past."""
        then, done = self._samples[0]
        return (self.done - done) / (now - then) if now > then else 0.0

    def remaining_seconds(self, now: float) -> float | None:
        """Time left at this rate; None where it is unknown."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if self.total and rate else None

    def describe(self, unit: str, now: float) -> str:
        """Units done, rate, time left."""
        of = f" of {self.total}" if self.total else ""
        text, rate, left = f"{self.done}{of} {unit}", self.rate(now), self.remaining_seconds(now)
        if rate:
            text += f", {format_rate(rate)}"
        return text if left is None else f"{text}, {format_duration(left)} left"

    def describe_end(self, unit: str, now: float) -> str:
        """Units done, and how long they took in this run."""
        new = f", {self.done - self.before} in this run" if self.before else ""
        return f"{self.done} {unit}{new} ({format_duration(now - self.began)})"


class LineSchedule:
    """When a line is due: the first one soon, later ones ever more seldom."""

    def __init__(self, first_seconds: float = _FIRST_SECONDS) -> None:
        self._next = first_seconds

    def is_due(self, elapsed: float) -> bool:
        """Whether to print a line after so many seconds; it then counts as printed."""
        if elapsed < self._next:
            return False
        self._next = elapsed + min(max(_LEAST_SECONDS, elapsed / 10), _MOST_SECONDS)
        return True


class Terminal:
    """Shows stages on standard error: a bar on a terminal, elsewhere a line now and then.

    Logs the lines, too (`logging`, logger store.progress).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet`: log only."""
        self.quiet = quiet
        self._tally = ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """Show one stage. What an earlier run did does not count for the rate."""
        pace, schedule = Pace(total, done, time.perf_counter()), LineSchedule()
        self._tally, ended = "", False
        has_bar = not self.quiet and can_draw(sys.stderr)

        def text() -> str:
            describe = pace.describe_end if ended else pace.describe
            tally = f"; {self._tally}" if self._tally else ""
            return f"{describe(unit, time.perf_counter())}{tally}"

        _log.debug("%s: begins, %s", name, pace.describe(unit, pace.began))
        with _open_bar(name, total, done, text) if has_bar else contextlib.nullcontext() as bar:

            def advance(count: int) -> None:
                now = time.perf_counter()
                pace.advance(count, now)
                if bar is not None:
                    bar(count)
                if pace.done != total and schedule.is_due(now - pace.began):
                    self._write(f"{name}: {text()}", printed=bar is None)

            yield advance
            ended = True
        self._write(f"{name}: {text()}", printed=not has_bar)

    def note(self, text: str) -> None:
        """Print one line, above the bar of the stage."""
        self._write(text, printed=True)

    def tally(self, text: str) -> None:
        """Show counts at the end of the bar, or of the next line."""
        self._tally = text

    def _write(self, text: str, *, printed: bool) -> None:
        _log.info(text)
        if printed and not self.quiet:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _open_bar(
    name: str, total: int | None, done: int, text: Callable[[], str]
) -> Iterator[Advance]:
    """A bar with a text that is made anew whenever the bar is drawn."""
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Described(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(text())

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_NARROW_BAR if console.width < _NARROW else _BAR_WIDTH),
        Described(Column(no_wrap=True, overflow="ellipsis")),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def can_draw(stream: Any) -> bool:
    """Whether a stream is a terminal that can do more than print lines."""
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def format_rate(per_second: float) -> str:
    """A rate as people read it: `31/s`, `2.5/min`, `1.2/h`."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{_round(per_second * seconds)}/{unit}"
    return f"{_round(per_second * 3600)}/h"


def _round(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}"


def format_duration(seconds: float) -> str:
    """Seconds as people read them: `3.2 s`, `5 min 07 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
