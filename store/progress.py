"""How long work shows its progress: named stages that count in increments."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeAlias

LINE_SECONDS: Final = 10.0
"""Minimum seconds between two lines about the same stage."""
Advance: TypeAlias = Callable[[int], None]
"""Called with the number of units just done."""


class Progress(Protocol):
    """Shows stages, one after the other; pass one to any function that takes `progress`."""

    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Enter a stage of `total` units (None: unknown), `done` of them by an earlier run."""
        ...

    def note(self, text: str) -> None:
        """Show one line at once, also within a stage; may be called from any thread."""
        ...


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Ignore a line."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """Ignore a stage."""
        yield lambda count: None


SILENT: Final = Silent()


class Terminal:
    """Shows stages on standard error: a bar on a terminal, elsewhere a line every 10 seconds."""

    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Show one stage. What an earlier run did does not count for the rate."""
        show = _show_bar if sys.stderr.isatty() else _show_lines
        return show(name, total, unit, done)

    def note(self, text: str) -> None:
        """Print one line, above the bar of the stage."""
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _show_bar(name: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:10s}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[rate]}/s"),
        TimeRemainingColumn(),
    )
    began = time.perf_counter()
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done, unit=unit, rate="-")

        def advance(count: int) -> None:
            bar.advance(task, count)
            new = bar.tasks[0].completed - done
            bar.update(task, rate=f"{new / (time.perf_counter() - began):.3g}")

        yield advance


@contextlib.contextmanager
def _show_lines(name: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    began = printed = time.perf_counter()
    before = done

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        now = time.perf_counter()
        if now - printed >= LINE_SECONDS:
            printed = now
            rate = (done - before) / (now - began)
            left = f", {format_duration((total - done) / rate)} left" if total and rate else ""
            of = f" of {total}" if total else ""
            print(f"{name}: {done}{of} {unit}, {rate:.3g}/s{left}", file=sys.stderr, flush=True)

    yield advance
    new = f", {done - before} in this run" if before else ""
    seconds = format_duration(time.perf_counter() - began)
    print(f"{name}: {done} {unit}{new} ({seconds})", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Seconds as people read them: `3.2 s`, `5 min 07 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
