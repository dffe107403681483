"""`semgen config`: resolved settings and where each comes from; settings files."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cli import _KINDS, main
from pipeline.config import PRESETS, PrepareConfig, load_config
from store.command_line.resolved import format_value
from store.reader import PatchStore
from store.settings import build, describe, to_json
from tests.support.command import run
from tests.support.synthetic_store import make_store
from trainer.config import TrainConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "settings.toml"
    file.write_text("classes = 6\nneighbours = 5\n[autoencoder]\nwidth = 4\n")
    return file


def shown(*arguments: object) -> dict[str, Any]:
    done = run("config", "show", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_each_setting_is_shown_with_where_it_comes_from(file: Path) -> None:
    found = shown(
        *("prepare", "--preset", "demo", "--config", file, "--classes", 9, "--spacing", "2,2,2"),
        "--all-series",
    )
    origins = {name: entry["from"] for name, entry in found.items()}
    assert origins["seed"] == "default"
    assert origins["shape"] == origins["autoencoder.max_steps"] == "preset demo"
    assert origins["neighbours"] == origins["autoencoder.width"] == "settings.toml"
    assert origins["classes"] == "option --classes"
    assert origins["spacing_mm"] == "option --spacing"
    assert origins["one_per_study"] == "option --all-series"
    assert origins["side_steps"] == "derived from other settings"
    assert found["classes"]["value"] == 9
    assert found["spacing_mm"]["value"] == [2, 2, 2]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_shown_is_a_settings_file_with_the_same_settings(
    preset: str, file: Path, tmp_path: Path
) -> None:
    done = run("config", "show", "prepare", "--preset", preset, "--config", file)
    (tmp_path / "shown.toml").write_text(done.stdout)
    assert load_config(tmp_path / "shown.toml") == load_config(file, preset=preset)


@pytest.mark.parametrize("command", _KINDS)
def test_the_settings_of_each_command_are_shown(command: str) -> None:
    done = run("config", "show", command)
    assert build(_KINDS[command], tomllib.loads(done.stdout)) == _KINDS[command]()
    names = [setting.name for setting in describe(_KINDS[command])]
    told = [
        line.removeprefix("# ").partition(" ")[0].rstrip(":") for line in done.stdout.split("\n")
    ]
    assert [name for name in names if told.count(name) != 1 and name != "autoencoder"] == []


def test_show_takes_the_settings_of_its_command_as_options() -> None:
    show = main.commands["config"].commands["show"]  # type: ignore[attr-defined]
    assert list(show.commands) == list(_KINDS)
    for name, command in show.commands.items():
        ours, theirs = (
            {param.name for param in one.params}
            & {s.name for s in describe(_KINDS[name])}
            - {"autoencoder"}  # a table in the file; `prepare` has an option of this name
            for one in (command, main.commands[name])
        )
        assert ours == theirs


def test_a_wrong_setting_is_refused_as_by_the_command(tmp_path: Path) -> None:
    done = run("config", "show", "prepare", "--classes", 0)
    assert (done.exit_code, done.stderr) == (2, "Error: classes must be >= 1, got 0\n")


def test_the_settings_recorded_in_a_store_and_in_a_run_are_shown(tmp_path: Path) -> None:
    store = make_store(tmp_path / "chest.store")
    found = shown(store)
    assert {name: entry["value"] for name, entry in found.items()} == PatchStore(store).config
    assert {entry["from"] for entry in found.values()} == {"recorded"}
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    settings = to_json(TrainConfig(width=8, init='Müller "B".pt'))
    (run_folder / "config.json").write_text(json.dumps({"config": settings}))
    done = run("config", "show", run_folder)
    assert build(TrainConfig, tomllib.loads(done.stdout)) == build(TrainConfig, settings)
    assert "width = 8 " in done.stdout


def test_something_else_is_refused(tmp_path: Path) -> None:
    done = run("config", "show", tmp_path / "none")
    assert done.exit_code == 2
    assert "give a store, a run, or one of prepare, pretrain, finetune" in done.stderr


@pytest.mark.parametrize("command", _KINDS)
def test_a_template_has_every_setting_as_a_comment(command: str) -> None:
    text = run("config", "template", command).stdout
    assert build(_KINDS[command], tomllib.loads(text)) == _KINDS[command]()
    chosen = "".join(
        f"{line.removeprefix('#')}\n"
        for line in text.splitlines()
        if line.startswith("[") or (line.startswith("#") and line[1] != " " and "..." not in line)
    )
    assert build(_KINDS[command], tomllib.loads(chosen)) == _KINDS[command]()
    assert text.count("\n#classes = ") == (command != "finetune")


def test_a_template_describes_each_setting() -> None:
    words = " ".join(run("config", "template", "prepare").stdout.replace("\n#", " ").split())
    for setting in describe(PrepareConfig):
        assert setting.description in words


@pytest.mark.parametrize("value", [True, 3, 1e-6, 0.5, 'a "b" \\ \x7f ü', [1, 2], ["x"], []])
def test_a_value_survives_toml(value: object) -> None:
    assert tomllib.loads(f"value = {format_value(value)}") == {"value": value}
