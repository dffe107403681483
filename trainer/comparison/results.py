"""The results of a comparison: results.jsonl, one line for each trial that is done."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import TrainError

RESULTS = "results.jsonl"


class Key(NamedTuple):
    """What identifies a trial in a comparison."""

    task: str
    start: str
    label_fraction: float
    trial: int
    fold: int


_FIELDS = frozenset({*Key._fields, "order", "score"})


def read_results(out: str | Path) -> list[dict[str, Any]]:
    """The lines of the trials that are done.

    Ordered by task, share of labels, and starting point; these in the plan's order.

    Raises TrainError for a line that `append_result` did not write.
    """
    file = Path(out) / RESULTS
    if not file.exists():
        return []
    found = {}
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue  # an incomplete line of a killed process: that trial is run again
        if not isinstance(result, dict) or not result.keys() >= _FIELDS:
            raise TrainError(f"{file}: line {number} is not the result of a trial; delete the line")
        found[_key(result)] = result
    order = ("task", "label_fraction", "order", "trial", "fold")
    return sorted(found.values(), key=lambda result: [result[name] for name in order])


def read_done(out: str | Path) -> set[Key]:
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
