"""The command line in tests, in this process or in its own, and where the checkout is."""

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

from click.testing import CliRunner, Result

from cli import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
"""For processes that import this checkout."""
Semgen: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]

_FORKS = multiprocessing.get_context("forkserver")


def run(*arguments: object) -> Result:
    """Run the command line in this process, for what ends before any worker starts."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def run_semgen(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own to its end.

    The process and its workers are forked from a server that has imported everything, because most
    commands import for longer than they work. Where start, imports or signals of a new interpreter
    matter, run `[sys.executable, "-m", "cli"]`.
    """
    return _run(_run_main, list(map(str, arguments)), {}, cwd=cwd)


def run_code(
    code: str, *, cwd: Path | None = None, warn: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run Python code like `run_semgen`.

    warn
        False to raise warnings as errors.
    """
    return _run(_run_code, code, warn, cwd=cwd)


def _run(
    function: Callable[..., None],
    *arguments: Any,
    cwd: Path | None,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "errors")]
        for file in files:
            file.touch()
        with _forked(function, *arguments, cwd=cwd, files=files) as job:
            job.join()
        assert job.exitcode is not None
        return subprocess.CompletedProcess(
            arguments, job.exitcode, *(file.read_text() for file in files)
        )


@contextlib.contextmanager
def running_semgen(
    *arguments: object, errors: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[ForkServerProcess]:
    """The command line in a process like that of `run_semgen`; it is killed in the end.

    errors
        An existing file for the error output.
    environment
        Variables besides those of this process.
    """
    nowhere = Path(os.devnull)
    files, words = [nowhere, errors or nowhere], list(map(str, arguments))
    with _forked(_run_main, words, dict(environment or {}), cwd=None, files=files) as job:
        yield job


@functools.cache
def start_server() -> None:
    """Start the server that processes are forked from, once."""
    _FORKS.set_forkserver_preload(["tests.support.preloaded"])
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


@contextlib.contextmanager
def _forked(
    function: Callable[..., None],
    *arguments: Any,
    cwd: Path | None,
    files: list[Path],
) -> Iterator[ForkServerProcess]:
    start_server()
    names = [str(file) for file in files]
    job = _FORKS.Process(target=_enter, args=(names, str(cwd or Path.cwd()), function, arguments))
    job.start()
    try:
        yield job
    finally:
        job.kill()
        job.join()


def _enter(
    files: list[str],
    cwd: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What the new process does; Ctrl-C ends it, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # its own processes, such as workers of Dask, are forked from the same server
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    multiprocessing.get_context = lambda _=None: _FORKS  # type: ignore[assignment,misc]
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    function(*arguments)


def _run_main(arguments: list[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    main(arguments, prog_name="semgen")


def _run_code(code: str, warn: bool) -> None:
    import __main__

    if not warn:
        warnings.simplefilter("error")
    exec(code, __main__.__dict__)


def assert_refused(done: Result, *words: str, status: int = 1) -> None:
    """One line that has all these words and the exit status, 2 for wrong settings."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert [word for word in words if word not in line] == []
