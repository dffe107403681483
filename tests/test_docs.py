"""Code blocks of README and docs: Python runs, commands parse, or a comment says why not.

A block that does not run has a comment before it: <!-- not run: the reason -->. Its `semgen`
commands are parsed all the same.
"""

import re
import shlex
import shutil
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from cli import main
from store.command_line.options import LocalPath
from tests.support.command import ROOT
from tests.support.settings import SETTINGS

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


class Block(NamedTuple):
    """A fenced block of code of a page."""

    name: str
    language: str
    code: str
    reason: str | None
    """Why it does not run."""


def read_blocks() -> Iterator[Block]:
    """All fenced blocks of the pages."""
    comment = r"(?:<!-- not run: (.+?) -->\n\n?)?"
    fenced = re.compile(rf"{comment}^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for number, found in enumerate(fenced.finditer(page.read_text("utf-8"))):
            reason, indent, language, code = found.groups()
            code = re.sub(rf"^{indent}", "", code, flags=re.M)
            yield Block(f"{page.name}-{number}", language, code, reason)


BLOCKS = list(read_blocks())
OUTPUT = {"text", "{eval-rst}"}
"""Languages of what is not code: output, layouts of folders; and what Sphinx makes."""


def those_in(*languages: str) -> list[object]:
    return [pytest.param(b, id=b.name) for b in BLOCKS if b.language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_in_fenced_blocks(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    assert re.findall(r"\n\n    \S.*", text) == []


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_is_checked_here_or_says_why_not(block: Block) -> None:
    assert block.language in {"sh", "python", "toml"} | OUTPUT or block.reason


# Python ------------------------------------------------------------------------------------------

PYTHON = [b for b in BLOCKS if b.language == "python" and not b.reason]
SMALLER = {
    '"seed": 7': '"seed": 0',  # the settings of new.store, which is complete
    "width=16": "width=2, steps=1, batch_size=4",
    "(7, 12)": "(1,)",
    "epochs=100": "epochs=1",
    "20_000": "1, width=2, batch_size=4",
    "num_workers=2": "num_workers=1",
}


@pytest.fixture(scope="module")
def folder(prepared: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    from trainer import TrainConfig, export_weights, pretrain

    folder = tmp_path_factory.mktemp("examples")
    for name in ("chest.store", "new.store"):
        shutil.copytree(prepared, folder / name)
    catalogue = prepared.with_name(f"{prepared.name}.catalogue")
    shutil.copytree(catalogue, folder / "new.store.catalogue")
    (folder / "scans").symlink_to(phantoms)
    (folder / "settings.toml").write_text(SETTINGS)
    run = folder / "run"
    pretrain(folder / "chest.store", run, TrainConfig(width=2, steps=2, batch_size=4))
    export_weights(run, folder / "weights.safetensors")
    return folder


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in PYTHON])
def test_an_example_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = block.code
    for ours, small in SMALLER.items():
        code = code.replace(ours, small)
    with warnings.catch_warnings():
        if re.search("pytorch_lightning|torchdata", code):  # they warn about each other and torch
            warnings.simplefilter("ignore")
        exec(compile(code, block.name, "exec"), {"__name__": "__main__"})


# Commands ----------------------------------------------------------------------------------------


def command_lines(block: Block) -> list[str]:
    """The commands of a block, each joined to one line."""
    return [line for line in re.sub(r"\\\n\s+", "", block.code).splitlines() if line.strip()]


def check_semgen(line: str) -> None:
    """A `semgen` command has known options and allowed values."""
    command: click.Command = main
    arguments = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    while isinstance(command, click.Group):
        context = click.Context(command, allow_interspersed_args=False)
        _, arguments, _ = command.make_parser(context).parse_args(arguments)
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None, line
        command = found
    context = click.Context(command)
    given, rest, order = command.make_parser(context).parse_args(arguments)
    assert rest == [], line
    for parameter in order:
        if not isinstance(parameter.type, LocalPath):  # the files do not exist
            parameter.type_cast_value(context, given[parameter.name])


def check_python(line: str) -> None:
    """The code of `python -c` compiles; the file or module of `python` exists here."""
    _, first, *rest = shlex.split(line, comments=True)
    if first == "-c":
        compile(rest[0], "command", "exec")
        return
    path = rest[0].replace(".", "/") if first == "-m" else first.removesuffix(".py")
    assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists(), line


def check_make(line: str) -> None:
    """The target exists."""
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M), line


CHECKS = {"semgen": check_semgen, "python": check_python, "make": check_make}
COMMANDS = those_in("sh")


@pytest.mark.parametrize("block", COMMANDS)
def test_a_command_in_the_docs_is_right_or_says_why_it_cannot_be_checked(block: Block) -> None:
    for line in command_lines(block):
        check = CHECKS.get(line.split()[0])
        if check and not (block.reason and check is not check_semgen):
            check(line)
        else:
            assert block.reason, line


def test_there_are_commands_and_examples() -> None:
    assert len(COMMANDS) >= 50
    assert len(PYTHON) >= 25


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", those_in("toml"))
def test_a_file_of_settings_is_toml(block: Block) -> None:
    assert tomllib.loads(block.code)
