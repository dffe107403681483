"""The command line in tests: in this process or in its own, and its refusals."""

import os

from click.testing import CliRunner, Result

from cli import main
from tests.conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
"""For processes that import this checkout."""


def run(*arguments: object) -> Result:
    """Run the command line in this process, for what ends before any worker starts."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def assert_refused(done: Result, *words: str) -> None:
    """Exit status 1 and one line that has all these words."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert [word for word in words if word not in line] == []
