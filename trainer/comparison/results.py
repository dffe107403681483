"""The results of a comparison: results.jsonl, one line for each trial that is done."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = "results.jsonl"


class Key(NamedTuple):
    """What identifies a trial in a comparison."""

    task: str
    start: str
    label_fraction: float
    trial: int
    fold: int


def read_results(out: Path) -> list[dict[str, Any]]:
    """The lines of the trials that are done.

    Ordered by task, share of labels, and starting point; these in the plan's order.
    """
    file = out / RESULTS
    if not file.exists():
        return []
    found = {}
    for line in file.read_text("utf-8").splitlines():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue  # an incomplete line of a killed process: that trial is run again
        found[_key(result)] = result
    order = ("task", "label_fraction", "order", "trial", "fold")
    return sorted(found.values(), key=lambda result: [result[name] for name in order])


def read_done(out: Path) -> set[Key]:
    """The trials that are done."""
    return {_key(result) for result in read_results(out)}


def append_result(out: Path, result: dict[str, Any]) -> None:
    """Add a line, safely where several processes do; ends an incomplete line first."""
    with (out / RESULTS).open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        end = b"" if stream.read(1) in {b"", b"\n"} else b"\n"
        stream.write(end + json.dumps(result).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _key(result: dict[str, Any]) -> Key:
    return Key(*(result[name] for name in Key._fields))
