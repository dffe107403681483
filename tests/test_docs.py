"""Python examples of README and docs run, on files of the names they use; commands parse."""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from cli import main
from store.options import LocalPath
from tests.support.command import ROOT, Semgen, run_code
from tests.support.settings import SETTINGS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
]


@pytest.fixture(scope="module")
def folder(
    prepared: Path, phantoms: Path, semgen: Semgen, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(prepared, folder / "chest.store")
    (folder / "scans").symlink_to(phantoms)
    (folder / "settings.toml").write_text(SETTINGS)
    options = ("--width", 2, "--steps", 2, "--batch-size", 4)
    done = semgen("pretrain", "chest.store", "run", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert semgen("export", "run", "weights.safetensors", cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs(code: str, folder: Path) -> None:
    if "pretrain(" in code:
        code = code.replace("width=16", "width=2, steps=1, batch_size=4").replace("(7, 12)", "(1,)")
        code = code.replace("epochs=100", "epochs=1").replace("20_000", "1, batch_size=4")
    others = re.search("pytorch_lightning|torchdata", code)  # they warn about each other and torch
    done = run_code(code, cwd=folder, warn=bool(others))
    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


def command_lines(page: Path) -> list[str]:
    """The `semgen` commands in the indented blocks of a page, each joined to one line."""
    text = re.sub(r"\\\n\s+", "", page.read_text("utf-8"))
    return re.findall(r"^ {4,}(?:[$] )?(semgen [a-z].*)$", text, re.MULTILINE)


COMMANDS = [
    pytest.param(line, id=f"{page.name}-{number}")
    for page in PAGES
    for number, line in enumerate(command_lines(page))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_the_docs_has_known_options_and_allowed_values(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = main.commands[name]
    context = click.Context(command)
    given, rest, order = command.make_parser(context).parse_args(arguments)
    assert rest == []
    for parameter in order:
        if not isinstance(parameter.type, LocalPath):  # the files do not exist
            parameter.type_cast_value(context, given[parameter.name])


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 60
