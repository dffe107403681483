"""Help that can be read, verbosity, the log file, completion in a shell."""

import io
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main
from pipeline.config import PrepareConfig
from store.command_line.console import Group, has_colour
from store.settings import describe
from tests.support.command import ENVIRONMENT, assert_refused, run, run_semgen
from tests.support.synthetic_store import make_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store. Not to be changed."""
    return make_store(tmp_path_factory.mktemp("stores") / "chest.store")


# Help --------------------------------------------------------------------------------------------


def test_each_command_is_listed_with_its_whole_first_sentence() -> None:
    shown = " ".join(run("--help").stdout.split())
    assert "..." not in shown.replace("[ARGS]...", "")
    for name, command in main.commands.items():
        sentence, stop, _ = " ".join(str(command.help).split()).partition(". ")
        assert f" {name} {sentence}{stop and '.'}" in shown


def test_every_command_belongs_to_a_section() -> None:
    assert isinstance(main, Group)
    listed = [name for names in main.sections.values() for name in names]
    assert set(main.commands) - set(listed) == set()
    assert len(listed) == len(set(listed))


def test_settings_are_listed_below_headings_and_none_is_lost() -> None:
    shown = run("prepare", "--help").stdout
    sections = dict(re.findall(r"^(\S[^\n:]+):\n(.*?)(?=^\S|\Z)", shown, re.MULTILINE | re.DOTALL))
    assert "--workers" in sections["Options"]
    assert "--classes" in sections["Classes and their members"]
    assert "--spacing " in sections["Crops"]
    assert "--all-series" in sections["Which series are used"]
    options = {max(p.opts, key=len) for p in main.commands["prepare"].params if p.name in names()}
    assert [name for name in options if shown.count(f"  {name} ") != 1] == []


def names() -> set[str]:
    return {setting.name for setting in describe(PrepareConfig)} - {"autoencoder"}


# Verbosity ---------------------------------------------------------------------------------------


def chatty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `inspect` log one record of each level."""

    def describe(*_: object) -> None:
        log = logging.getLogger("store.inspect")
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log.log(level, "this is %s", logging.getLevelName(level).lower())

    monkeypatch.setattr("store.inspect.describe_store", describe)
    monkeypatch.setattr("store.inspect.format_store", lambda *_: "the result")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["inspect"], ["warning", "error"]),
        (["-q", "inspect"], ["error"]),
        (["inspect", "--quiet"], ["error"]),
        (["-v", "inspect"], ["debug", "info", "warning", "error"]),
        (["inspect", "--verbose"], ["debug", "info", "warning", "error"]),
    ],
    ids=" ".join,
)
def test_verbosity_decides_what_is_printed_beside_the_result(
    options: list[str], words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatty(monkeypatch)
    done = run(*options, made)
    assert done.stdout == "the result\n"
    assert re.findall(r"this is (\w+)", done.stderr) == words
    assert ("store.inspect:" in done.stderr) == ("debug" in words), "details name their module"


def test_quiet_and_verbose_exclude_each_other(made: Path) -> None:
    done = run("-q", "inspect", made, "-v")
    assert done.exit_code == 2
    assert "give either --verbose or --quiet" in done.stderr


def test_a_quiet_command_shows_no_progress_and_no_next_command(tmp_path: Path) -> None:
    options = ("--patients", 1, "--matrix", 64)
    loud, quiet = (run("phantom", tmp_path / name, *options, f"-{name}") for name in "vq")
    assert "phantoms: 1 patients (" in loud.stderr
    assert "Next: " in loud.stdout
    assert (quiet.stdout, quiet.stderr) == (f"1 patients in {tmp_path / 'q'}\n", "")


def test_the_next_command_can_be_typed_whatever_the_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--patients", 1, "--matrix", 64)
    for name in ("my scans; rm $HOME", "-p"):
        done = run("phantom", *options, "--", name)
        _, *words = shlex.split(done.stdout.splitlines()[-1].removeprefix("Next:"))
        assert words[0] == "prepare"
        assert Path(words[1]) == Path(name)
        assert not words[1].startswith("-")


def test_a_log_file_on_a_full_disk_is_reported_once_and_the_command_goes_on(made: Path) -> None:
    done = run_semgen("--log-file", "/dev/full", "classes", made)
    assert done.returncode == 0
    assert done.stderr == "/dev/full: No space left on device; lines are missing\n"


def test_closed_streams_lead_nowhere(made: Path) -> None:
    """Otherwise the first file that is opened gets their number, and what is printed."""
    program = """
import os, subprocess, sys
os.close(2)
sys.stderr = None
from cli import main
main(["classes", sys.argv[1]], prog_name="semgen", standalone_mode=False)
print(os.readlink("/proc/self/fd/2"), sys.stderr.name, flush=True)
subprocess.run(["readlink", "/proc/self/fd/2"], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, made], env=ENVIRONMENT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["/dev/null 2", "/dev/null"]


def test_the_log_file_gets_details_with_the_time_whatever_is_printed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatty(monkeypatch)
    file = tmp_path / "log.txt"
    for option in ("--quiet", "--json"):
        assert run("inspect", made, option, "--log-file", file).exit_code == 0
    lines = file.read_text().splitlines()
    head = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [A-Z]+ store\.[\w.]+: "
    assert [line for line in lines if not re.match(head, line)] == []
    told = [re.sub(head, "", line) for line in lines]
    once = ["semgen inspect begins", *(f"this is {w}" for w in ("debug", "info", "warning"))]
    assert told[: len(lines) // 2 - 1] == [*once, "this is error"]
    assert told[-1].startswith("ends after ")


def test_the_loggers_are_as_before_after_a_command(made: Path, tmp_path: Path) -> None:
    def state() -> list[object]:
        loggers = [logging.getLogger(name) for name in ("pipeline", "store", "trainer")]
        return [(one.level, one.propagate, list(one.handlers)) for one in loggers]

    before = state()
    run("-v", "--log-file", tmp_path / "log.txt", "inspect", made)
    assert state() == before


def test_a_log_file_that_cannot_be_written_is_refused(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "none" / "log.txt"
    assert_refused(run("inspect", made, "--log-file", file), str(file), "No such file")


def test_the_log_file_gets_the_traceback_of_a_bug_but_not_its_message(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages may quote files and headers."""

    def stumble(*_: object) -> None:
        try:
            open("/archive/Anna Smith 1950.nii.gz").close()
        except OSError as error:
            raise ValueError("cannot use Anna Smith") from error

    monkeypatch.setattr("store.inspect.describe_store", stumble)
    done = run("inspect", made, "--log-file", tmp_path / "log.txt")
    assert isinstance(done.exception, ValueError)
    log = (tmp_path / "log.txt").read_text()
    assert f'File "{__file__}", line ' in log
    assert "in stumble\n" in log
    assert re.findall(r"^\w*Error$", log, re.MULTILINE) == ["ValueError", "FileNotFoundError"]
    told = "".join(line for line in log.splitlines() if not line.startswith("    "))  # not code
    assert "Smith" not in told


def test_the_log_file_tells_where_an_error_was_found_but_not_its_message(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "smith", "--log-file", tmp_path / "log.txt")
    assert_refused(done, "smith", "no such store")
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"StoreError in \w+\.py, line \d+; standard error says more\n$", log)
    assert "smith" not in log


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour(Screen())
    assert not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Screen())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colour(Screen())


# Completion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_is_printed(shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert f"_SEMGEN_COMPLETE={shell}_complete" in done.stdout


def test_bash_completes_commands_options_and_files(tmp_path: Path) -> None:
    """Typed into a real shell: each tab completes a word."""
    tool = tmp_path / "bin" / "semgen"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m cli \"$@\"\n")
    tool.chmod(0o755)
    (tmp_path / "chest.store").mkdir()
    (tmp_path / "profile").write_text('eval "$(semgen completion bash)"\n')
    path = f"{tool.parent}:{os.environ['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path, "TERM": "dumb", "HISTFILE": ""}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "--noprofile", "--rcfile", "profile", "-i"],
        cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    ) as shell:  # fmt: skip
        os.close(theirs)
        os.write(ours, b"semgen insp\t che\t --cla\t\x01echo \nexit\n")  # ^A: to the beginning
        shown = b""
        while piece := _read(ours):
            shown += piece
        shell.wait()
    os.close(ours)
    assert "\nsemgen inspect chest.store/ --class" in shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the last writer is gone
        return b""
