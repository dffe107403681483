"""Events of runs as lines of text, for a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from store.progress import LineSchedule, format_duration
from trainer.events import Event, Noticed, Started, Stepped, Validated, format_metrics

_log = logging.getLogger(__name__)


def show_events(command: str, *, quiet: bool = False) -> Callable[[Event], None]:
    """A callback that prints the events of a run as lines on standard error, and logs them.

    quiet
        Log only.
    """
    began, schedule = time.perf_counter(), LineSchedule(first_seconds=0.0)

    def on_event(event: Event) -> None:
        text = format_event(event)
        if not text:
            return
        _log.info("%s: %s", command, text)
        if quiet:
            return
        # there may be many steps in a second
        if not isinstance(event, Stepped) or schedule.is_due(time.perf_counter() - began):
            print(f"{command}: {text}", file=sys.stderr, flush=True)

    return on_event


def format_event(event: Event) -> str:
    """One line; empty for an event that need not be shown."""
    match event:
        case Started():
            resumed = f", resumed at {event.resumed_at}" if event.resumed_at else ""
            return (
                f"{event.num_train} train and {event.num_validation} validation examples of"
                f" {event.num_classes} classes; {event.num_parameters / 1e6:.3g} M parameters on"
                f" {event.device}; up to {event.total_steps} steps{resumed}"
            )
        case Stepped():
            return (
                f"step {event.step} of {event.total_steps}: {format_metrics(event.metrics)};"
                f" {event.examples_per_s:.3g} examples/s, {event.wait_share:.0%} waiting for data,"
                f" {format_duration(event.remaining_s)} left"
            )
        case Validated():
            best = " (best)" if event.best else ""
            return f"epoch {event.epoch}: {format_metrics(event.metrics)}{best}"
        case Noticed():
            return event.text
    return ""
