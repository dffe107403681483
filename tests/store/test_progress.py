"""Progress: rate and time left, lines when they are useful, a bar on terminals only."""

import io
import itertools
import logging
from types import SimpleNamespace

import pytest

from store import progress
from store.progress import LineSchedule, Pace, Terminal, format_rate


class Stream(io.StringIO):
    """Standard error that is a terminal, or is not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of stages, which only the test moves."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


def show(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, quiet: bool = False) -> str:
    """What a resumed stage writes to standard error."""
    stream = Stream(terminal=terminal)
    monkeypatch.setattr("sys.stderr", stream)
    shown = Terminal(quiet=quiet)
    with shown.stage("2 of 9: survey", 20, "scans", done=8) as advance:
        shown.tally("rejected: 1 unreadable")
        advance(12)
    return stream.getvalue()


# Rate and time left


def test_what_an_earlier_run_did_is_done_but_does_not_count_for_the_rate() -> None:
    pace = Pace(1000, 900, now=0.0)
    for second in range(1, 11):
        pace.advance(2, float(second))
    assert (pace.done, pace.rate(10.0), pace.remaining_seconds(10.0)) == (920, 2.0, 40.0)
    assert pace.describe_end("scans", 10.0) == "920 scans, 20 in this run (10.0 s)"


def test_the_rate_is_that_of_the_recent_past() -> None:
    """The first scans were small; the last minutes tell how long the large ones take."""
    pace = Pace(2000, 0, now=0.0)
    for second in range(1, 101):
        pace.advance(10, float(second))
    assert pace.rate(100.0) == 10
    for second in range(101, 201):
        pace.advance(1, float(second))
    assert pace.rate(200.0) == 1
    assert pace.remaining_seconds(200.0) == 900


def test_the_time_left_grows_while_nothing_is_done() -> None:
    pace = Pace(20, 0, now=0.0)
    pace.advance(10, 10.0)
    assert pace.remaining_seconds(10.0) == 10
    assert pace.remaining_seconds(40.0) == 40


def test_units_that_take_longer_than_the_window_have_a_rate() -> None:
    pace = Pace(10, 0, now=0.0)
    for hour in (1, 2, 3):
        pace.advance(1, hour * 3600.0)
    assert pace.describe("scans", 3 * 3600.0) == "3 of 10 scans, 1/h, 7 h 00 min left"


def test_without_a_total_or_before_the_first_unit_no_time_is_left() -> None:
    assert Pace(None, 0, now=0.0).describe("cases", 5.0) == "0 cases"
    assert Pace(9, 0, now=0.0).describe("cases", 5.0) == "0 of 9 cases"


@pytest.mark.parametrize(
    ("rate", "text"), [(1234.5, "1234/s"), (31.4, "31/s"), (0.5, "30/min"), (0.001, "3.6/h")]
)
def test_a_rate_has_a_unit_in_which_it_is_at_least_one(rate: float, text: str) -> None:
    assert format_rate(rate) == text


# Lines


def test_the_first_line_comes_soon_and_later_ones_ever_more_seldom() -> None:
    schedule = LineSchedule()
    day = [second for second in range(24 * 3600) if schedule.is_due(float(second))]
    assert day[:3] == [2, 12, 22]
    gaps = [after - before for before, after in itertools.pairwise(day)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 600
    assert len(day) < 250


def test_a_pipe_gets_whole_lines_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    stream = Stream(terminal=False)
    monkeypatch.setattr("sys.stderr", stream)
    shown = Terminal()
    with shown.stage("2 of 9: survey", 8, "scans", done=2) as advance:
        for _ in range(6):
            clock.now += 2.0
            shown.tally("rejected: 1 unreadable")
            advance(1)
        shown.note("workers lost: 1")
    assert stream.getvalue().splitlines() == [
        "2 of 9: survey: 3 of 8 scans, 30/min, 10.0 s left; rejected: 1 unreadable",
        "workers lost: 1",
        "2 of 9: survey: 8 scans, 6 in this run (12.0 s); rejected: 1 unreadable",
    ]


def test_counts_of_a_stage_are_not_shown_beside_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False)
    monkeypatch.setattr("sys.stderr", stream)
    shown = Terminal()
    for name in ("survey", "embed"):
        with shown.stage(name, 0, "scans"):
            if name == "survey":
                shown.tally("rejected: 1 unreadable")
    assert stream.getvalue().splitlines()[1].startswith("embed: 0 scans (")
    assert stream.getvalue().count("rejected") == 1


# Terminals


def test_a_terminal_gets_a_bar_with_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = show(monkeypatch, terminal=True)
    assert "\x1b[" in shown
    assert "2 of 9: survey" in shown
    assert "8 of 20 scans" in shown
    assert "20 scans, 12 in this run (" in shown
    assert "rejected: 1 unreadable" in shown


def test_no_color_leaves_out_the_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    colours = ("\x1b[3", "\x1b[38;")
    assert any(code in show(monkeypatch, terminal=True) for code in colours)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = show(monkeypatch, terminal=True)
    assert "survey" in shown
    assert not any(code in shown for code in colours)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = show(monkeypatch, terminal=True)
    assert shown.startswith("2 of 9: survey: 20 scans, 12 in this run (")
    assert "\x1b" not in shown
    assert "\r" not in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_quiet_stage_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.DEBUG, "store.progress"):
        assert show(monkeypatch, terminal=terminal, quiet=True) == ""
    begins, ended = (record.getMessage() for record in caplog.records)
    assert begins == "2 of 9: survey: begins, 8 of 20 scans"
    assert ended.startswith("2 of 9: survey: 20 scans, 12 in this run (")
