"""The command line in tests, in this process or in its own, and where the checkout is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from click.testing import CliRunner, Result

from cli import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
"""For processes that import this checkout."""
Semgen: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


def run(*arguments: object) -> Result:
    """Run the command line in this process, for what ends before any worker starts."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def run_semgen(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(done: Result, *words: str) -> None:
    """Exit status 1 and one line that has all these words."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert [word for word in words if word not in line] == []
