"""Ctrl-C, SIGTERM and the clock: what is on the disk when training ends early."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.command import ROOT
from tests.support.finetuning import CONFIG, make_task
from tests.support.runs import TINY, assert_same_run, read_metrics, tiny
from trainer import Event, Interrupted, Saved, Stepped, TrainConfig, pretrain
from trainer.finetuning import finetune
from trainer.interrupt import watch_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]
NEVER = 10**6


def send(number: int, *, after: int) -> Callable[[Event], None]:
    """Send this process a signal at the event of a step."""

    def on_event(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == after:
            os.kill(os.getpid(), number)

    return on_event


def interrupt(store: Path, run: Path, *, after: int, number: int = signal.SIGTERM) -> TrainConfig:
    """Pretrain until a signal; returns the settings, with which only the signal saves."""
    config = tiny(checkpoint_every=NEVER)
    with pytest.raises(Interrupted):
        pretrain(store, run, config, on_event=send(number, after=after))
    return config


def saved_step(run: Path) -> int:
    return int(torch.load(run / "last.pt", weights_only=True)["progress"]["step"])


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Not ignored, as it is where these tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=SIGNALS, ids=["SIGINT", "SIGTERM"])
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_signal_ends_training_at_the_next_step_with_a_checkpoint(
    store: Path, tmp_path: Path, number: int
) -> None:
    interrupt(store, tmp_path / "run", after=8, number=number)
    assert saved_step(tmp_path / "run") == 8


@pytest.mark.parametrize("after", [2, 6, 14])
def test_the_resumed_run_equals_the_uninterrupted_one(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path, after: int
) -> None:
    config = interrupt(store, tmp_path / "run", after=after)
    pretrain(store, tmp_path / "run", config)
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("after", [5, 10, 15])
def test_an_interrupted_validation_is_done_when_resumed(
    whole: tuple[Path, list[Event]], store: Path, tmp_path: Path, after: int
) -> None:
    """After the warm-up, in the middle, and at the end of the run."""
    run = tmp_path / "run"
    config = interrupt(store, run, after=after)
    assert saved_step(run) == after
    assert (after, "validation") not in [(m["step"], m["kind"]) for m in read_metrics(run)]
    summary = pretrain(store, run, config)
    assert not summary.already_complete
    assert_same_run(run, whole[0])


def test_a_run_whose_last_validation_was_interrupted_can_be_made_longer(
    store: Path, tmp_path: Path
) -> None:
    config = tiny(epochs=2)
    with pytest.raises(Interrupted):
        pretrain(store, tmp_path / "run", config, on_event=send(signal.SIGTERM, after=10))
    pretrain(store, tmp_path / "run", TINY)
    pretrain(store, tmp_path / "whole", TINY)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_fine_tuning_is_interrupted_and_resumed_alike(tmp_path: Path) -> None:
    balls = make_task(tmp_path / "balls", range(8))
    short = dataclasses.replace(CONFIG, steps=12, log_every=2, checkpoint_every=NEVER)
    finetune(balls, tmp_path / "whole", short)
    with pytest.raises(Interrupted):
        finetune(balls, tmp_path / "run", short, on_event=send(signal.SIGTERM, after=6))
    assert saved_step(tmp_path / "run") == 6
    finetune(balls, tmp_path / "run", short)
    for name in ("metrics.jsonl", "cases.csv", "result.json", "best.pt", "last.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_command_ends_in_one_line_and_status_1(store: Path, tmp_path: Path) -> None:
    command = ["pretrain", str(store), str(tmp_path / "run"), "--width", "2", "--batch-size", "4"]
    with subprocess.Popen(
        [sys.executable, "-m", "cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stderr is not None
        told = [next(line for line in job.stderr if line.startswith("pretrain: step "))]
        job.send_signal(signal.SIGTERM)
        told += job.stderr.readlines()
    assert job.returncode == 1
    assert told[-1] == "Error: interrupted; run the same command again to resume\n"
    assert "Traceback" not in "".join(told)
    assert saved_step(tmp_path / "run") >= 10


# Handlers


def signal_twice(number: int, *, ignore_second: bool) -> None:
    with watch_signals(ignore_second=ignore_second):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


def test_a_second_signal_ends_at_once(number: int) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt("at once")

    before = signal.signal(number, end)
    try:
        with pytest.raises(KeyboardInterrupt, match="at once"):
            signal_twice(number, ignore_second=False)
    finally:
        signal.signal(number, before)


def test_a_second_signal_is_ignored_under_torchrun(number: int) -> None:
    with pytest.raises(Interrupted):
        signal_twice(number, ignore_second=True)


def test_a_signal_after_the_last_step_still_raises_interrupted(number: int) -> None:
    with pytest.raises(Interrupted), watch_signals():
        os.kill(os.getpid(), number)


def test_signal_handlers_are_restored(store: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupt(store, tmp_path / "run", after=2)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    pretrain(store, tmp_path / "run", TINY)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_ignored(store: Path, tmp_path: Path, number: int) -> None:
    """As nohup and shells want it for jobs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        summary = pretrain(store, tmp_path / "run", TINY, on_event=send(number, after=2))
    finally:
        signal.signal(number, before)
    assert summary.reason == "epochs"


def test_training_runs_outside_the_main_thread(store: Path, tmp_path: Path) -> None:
    reasons = []

    def train() -> None:
        reasons.append(pretrain(store, tmp_path / "run", TINY).reason)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reasons == ["epochs"]


# The clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The loop's clock in seconds, which only the test moves."""
    clock = SimpleNamespace(now=0.0, perf_counter=time.perf_counter)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("trainer.loop.time", clock)
    return clock


def test_checkpoints_are_also_written_by_time_and_change_nothing(
    store: Path, tmp_path: Path, clock: SimpleNamespace
) -> None:
    config = tiny(batch_size=6, epochs=2, checkpoint_every=NEVER)  # 12 steps an epoch
    pretrain(store, tmp_path / "timeless", config)
    saved = []

    def pass_time(event: Event) -> None:
        if isinstance(event, Stepped):  # every second step
            clock.now += 240
        if isinstance(event, Saved) and event.path.name == "last.pt":
            saved.append(event.step)

    pretrain(store, tmp_path / "run", config, on_event=pass_time)
    assert saved == [6, 12, 12, 18, 24]
    assert_same_run(tmp_path / "run", tmp_path / "timeless")
