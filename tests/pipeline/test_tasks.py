"""Tasks whose process ends: a crash is told from a lost worker, which costs only time."""

import json
import os
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from pipeline import isolation
from pipeline.isolation import ProcessCrashed, ProcessKilled, call_isolated
from pipeline.tasks import run_alone
from tests.support.command import run_code

# Shell commands stand for series. $PPID is the process that reads: a worker, or its isolated child.
KILL = "kill -KILL $PPID"
LOST = """
worker=$PPID
grep -q isolation /proc/$PPID/cmdline && worker=$(cut -d ' ' -f 4 /proc/$PPID/stat)
[ "$(wc -l < {file})" -ge {times} ] || {{ echo >> {file}; kill -KILL $worker; sleep 9; }}
"""


@pytest.mark.parametrize("command", ["kill -SEGV $PPID", "kill -ABRT $PPID"])
def test_a_process_that_crashes_is_told_by_its_signal(command: str) -> None:
    with pytest.raises(ProcessCrashed, match="process ended by SIG"):
        call_isolated(os.system, command, max_bytes=2**32)


def test_a_process_that_ends_itself_has_crashed() -> None:
    """As after the time limit of a read."""
    with pytest.raises(ProcessCrashed, match="status 1"):
        call_isolated(os._exit, 1, max_bytes=2**32)


def test_a_process_returns_what_the_function_returns_or_raises() -> None:
    assert call_isolated(abs, -3, max_bytes=2**32) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        call_isolated(int, "x", max_bytes=2**32)


def test_memory_is_limited_so_that_the_function_fails_first() -> None:
    with pytest.raises(MemoryError):
        call_isolated(bytearray, 2**31, max_bytes=2**30)


def test_a_process_that_is_killed_from_outside_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolation, "_SETTLE_SECONDS", 0)
    command = f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -ge {{}} ] || {KILL}"
    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as running,
        Client(running, set_as_default=False) as client,
    ):
        assert list(run_alone(client, os.system, [command.format(3)])) == [(command.format(3), 0)]
        ((_, killed),) = run_alone(client, os.system, [command.format(99)])
    assert isinstance(killed, ProcessKilled)
    assert len((tmp_path / "tries").read_text()) == 6


SCRIPT = """
import dask, json, os
from distributed import Client, LocalCluster
from pipeline.tasks import run_bounded

dask.config.set({"distributed.scheduler.allowed-failures": 0})
dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day"})  # to restart takes long
one = {"n_workers": 1, "threads_per_worker": 1, "silence_logs": 50}
one["dashboard_address"] = "127.0.0.1:0"
with LocalCluster(**one) as cluster, Client(cluster) as client:
    found = run_bounded(client, os.system, SERIES)
    print(json.dumps([[item, str(result)] for item, result in found]))
"""


def test_a_series_is_read_in_the_end_however_often_its_worker_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "lost"
    file.touch()
    series = ["true", LOST.format(file=file, times=3), "sleep 0.1"]
    done = run_code(SCRIPT.replace("SERIES", repr(series)))
    assert dict(json.loads(done.stdout)) == dict.fromkeys(series, "0")
    assert len(file.read_text()) == 3, "once among others, twice in a process of its own"
