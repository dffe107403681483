"""The command line: exit statuses, errors in one line, stable JSON, nothing undocumented."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import safe_open

from cli import main
from pipeline.config import AutoencoderConfig, PrepareConfig
from store import PatchStore, StoreError
from store.settings import describe
from tests.support.command import ROOT, Semgen, assert_refused, run, run_code
from tests.support.listing import list_series
from tests.support.settings_tables import PAGE, fill
from trainer import TrainConfig
from trainer.finetuning import FinetuneConfig


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store, to be changed."""
    return shutil.copytree(prepared, tmp_path / "copy.store")


# Exit statuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in main.commands)])
def test_help_is_printed_with_status_0(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")


def test_the_commands_are_listed_in_the_order_of_their_use() -> None:
    listed = re.findall(r"^  ([a-z]\S+) {2,}\w", run("--help").stdout, re.MULTILINE)
    wanted = ["demo", "phantom", "prepare", "inspect", "verify", "pretrain", "export"]
    assert [name for name in listed if name in wanted] == wanted
    assert sorted(listed) == sorted(main.commands), "each is listed once"


def test_the_version_is_printed_from_any_directory(semgen: Semgen, tmp_path: Path) -> None:
    done = semgen("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"semgen, version \d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepared"],
        ["prepare"],
        ["prepare", "archive"],
        ["prepare", "archive", "store", "--classes", "many"],
        ["prepare", "archive", "store", "--workers", "0"],
        ["prepare", "archive", "store", "--frame", "head"],
        ["prepare", "archive", "store", "--spacing", "1,2"],
        ["prepare", "archive", "store", "--config", "no-such-file.toml"],
        ["phantom", "folder", "--patients", "0"],
        ["phantom", "folder", "--format", "png"],
        ["inspect"],
        ["inspect", "store", "--class", "-1"],
        ["pretrain", "store"],
        ["pretrain", "store", "run", "--pretext", "jigsaw"],
        ["export", "run", "file", "--format", "onnx"],
        ["inspect", ""],
        ["prepare", "", "store"],
        ["classes", "store", "--exclude", "0-9999999999"],
        ["classes", "store", "--exclude", "3,4", "--include", "4-5"],
        ["classes", "store", "--csv", "--json"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_names_the_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "{here}/none", "{here}/s"], ["none", "no such file or folder"]),
        (["prepare", "{here}/none", "{here}/s", "--dry-run"], ["none", "no such file or folder"]),
        (
            ["prepare", "{here}", "{here}/s", "--dry-run", "--extend", "{here}/none"],
            ["none", "no such store"],
        ),
        (["inspect", "{here}/none"], ["none", "no such store"]),
        (["inspect", "{here}"], ["not a semgen store"]),
        (["verify", "{here}/none"], ["none", "no such store"]),
        (["pretrain", "{here}/none", "{here}/run"], ["none", "no such store"]),
        (["export", "{here}/none", "{here}/w"], ["none"]),
    ],
    ids=" ".join,
)
def test_an_error_is_one_line_and_status_1(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = run(*(argument.format(here=tmp_path) for argument in arguments))
    assert_refused(result, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "{here}", "{here}/s", "--classes", "0"], ["classes must be >= 1, got 0"]),
        (["prepare", "{here}", "{here}/s", "--seed", "-1"], ["seed must be >= 0, got -1"]),
        (
            ["prepare", "{here}", "{here}/s", "--spacing", "0,1,1"],
            ["spacing_mm", "(0.0, 1.0, 1.0)"],
        ),
        (["pretrain", "{here}", "{here}/run", "--epochs", "0"], ["epochs must be >= 1, got 0"]),
    ],
    ids=" ".join,
)
def test_a_wrong_value_of_a_setting_is_one_line_and_status_2(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = run(*(argument.format(here=tmp_path) for argument in arguments))
    assert_refused(result, *words, status=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clases = 7", ["unknown setting clases", "did you mean classes?"]),
        ("[autoencoder]\nwitdh = 4", ["unknown setting autoencoder.witdh", "autoencoder.width?"]),
        ("classes = [", ["settings.toml", "cannot be read as TOML"]),
        ("autoencoder = 5", ["autoencoder must be a table"]),
        ("[autoencoder]\nlatent = 0", ["latent must be >= 1, got 0"]),
        ('frame = "head"', ["frame must be one of body, scan, voxel, got 'head'"]),
        ("shape = [32, 64]", ["shape must be a list of 3 whole numbers, got [32, 64]"]),
        ("shape = 32", ["shape"]),
        ('classes = "many"', ["classes must be a whole number, got 'many'"]),
        ("classes = 7.5", ["classes", "7.5"]),
        ('window_hu = ["a", 3]', ["window_hu"]),
        ("side_steps = [80, 50]", ["side_steps"]),
        ("side_steps = [0, 80]", ["side_steps"]),
        ("shift_steps = [10, -10]", ["shift_steps"]),
        ("border = [1, 2]", ["border"]),
        ("index = 5", ["index"]),
        ("validation_fraction = 1.5", ["validation_fraction must be >= 0 and <= 0.9, got 1.5"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_in_a_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    result = run("prepare", tmp_path, tmp_path / "s", "--config", file, "--dry-run")
    assert_refused(result, *words, status=2)


def test_options_take_precedence_over_the_file_and_the_file_over_the_preset(
    prepared: Path, phantoms: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("classes = 6\nneighbours = 5")
    result = run(
        "prepare", phantoms, prepared, "--preset", "paper", "--config", file, "--classes", 9
    )
    # it is another store's settings, so that all of them are told
    assert_refused(result, "classes: 4 -> 9", "neighbours: 3 -> 5", "frame: body -> voxel")


# Commands ----------------------------------------------------------------------------------------


def test_a_dry_run_lists_the_series_and_makes_nothing(
    phantoms: Path, semgen: Semgen, tmp_path: Path
) -> None:
    result = semgen("prepare", phantoms, tmp_path / "s", "--dry-run", "--workers", 1)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "7 series: 6 to read, 1 unreadable" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["scans", "crops", "store", "time"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_names_that_are_not_utf_8(semgen: Semgen, tmp_path: Path) -> None:
    archive = tmp_path / "a"
    archive.mkdir()
    Path(os.fsdecode(bytes(archive) + b"/m\xfcller.nii")).write_bytes(b"")
    result = semgen("prepare", archive, tmp_path / "s", "--dry-run", "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert r"m\udcfcller.nii (1 files): rejected" in result.stdout


def test_a_dry_run_prints_json(phantoms: Path, semgen: Semgen, tmp_path: Path) -> None:
    result = semgen("prepare", phantoms, tmp_path / "s", "--dry-run", "--workers", 1, "--json")
    found = json.loads(result.stdout)
    assert len(found["series"]) == 7
    columns = ("file", "files", "reason", "detail", "size", "spacing_mm")
    assert {tuple(row) for row in found["series"]} == {columns}
    assert found["estimate"]["scans"] == 6


def test_preparing_a_complete_store_prints_its_summary_as_json(
    prepared: Path, patches: PatchStore, phantoms: Path, config_file: Path
) -> None:
    result = run("prepare", phantoms, prepared, "--config", config_file, "--json")
    summary = json.loads(result.stdout)
    assert summary["already_complete"] is True
    assert summary["fingerprint"] == patches.fingerprint
    assert summary["rejected"] == {"duplicate": 1, "unreadable": 1}
    assert summary["crops"] == {"train": len(patches.train), "validation": len(patches.validation)}


def test_the_summary_ends_with_the_next_command(
    prepared: Path, phantoms: Path, config_file: Path, tmp_path: Path
) -> None:
    lines = run("prepare", phantoms, prepared, "--config", config_file).stdout.splitlines()
    first, second = (line.removeprefix("Next:").split() for line in lines[-2:])
    assert first[1:] == ["report", str(prepared), "classes.html"]
    assert second[1:] == ["pretrain", str(prepared), "RUN"]
    first[-1] = str(tmp_path / "classes.html")
    assert subprocess.run(first, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "classes.html").exists()


def test_inspect_prints_the_store_as_json(prepared: Path, patches: PatchStore) -> None:
    facts = json.loads(run("inspect", prepared, "--json").stdout)
    assert {name: facts[name] for name in ("format", "state", "scans", "patients", "frame")} == {
        "format": 2,
        "state": "complete",
        "scans": 5,
        "patients": 5,
        "frame": "body",
    }
    assert facts["fingerprint"] == patches.fingerprint
    assert [row["class"] for row in facts["classes"]] == list(range(patches.num_classes))


def test_inspect_prints_a_class_and_its_members_as_json(
    prepared: Path, patches: PatchStore
) -> None:
    facts = json.loads(run("inspect", prepared, "--class", 2, "--json").stdout)
    names = [f"{int(patches.scans.id[scan]):016x}" for scan in patches.members(2).scans]
    assert [row["scan"] for row in facts["members"] if row["split"] == "train"] == names
    assert facts["reference"] == names[0]
    for row in facts["members"]:
        assert patches.split(row["split"]).label[row["row"]] == 2


def test_classes_are_named_excluded_and_included_again(prepared: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(prepared, tmp_path / "mine.store")
    done = run("classes", mine, "--name", "3=left = right", "--exclude", "0-1", "--note", "0=junk")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1].endswith("(excluded)  - junk")
    assert lines[4].endswith("left = right")
    found = json.loads(run("classes", mine, "--include", 1, "--json").stdout)
    assert [row["excluded"] for row in found] == [True, False, False, False]
    assert found[3]["name"] == "left = right"


def test_classes_are_kept_and_tagged_and_single_members_excluded(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    mine = shutil.copytree(prepared, tmp_path / "mine.store")
    members = [f"{int(patches.scans.id[scan]):016x}" for scan in patches.members(3).scans]
    options = ["--exclude-member", f"3={members[0][:6]}", "--exclude-member", f"3={members[1]}"]
    done = run("classes", mine, "--keep", "2-3", "--tags", "3=vessel,left", *options)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[3].endswith("(kept)")
    assert lines[4].endswith("[left] [vessel] (kept, 2 members excluded)")
    row = json.loads(run("classes", mine, "--include-member", f"3={members[1]}", "--json").stdout)[
        3
    ]
    assert (row["tags"], row["kept"]) == (["left", "vessel"], True)
    assert row["excluded_members"] == [members[0]]
    table = list(csv.DictReader(run("classes", mine, "--csv").stdout.splitlines()))
    assert (table[3]["tags"], table[3]["excluded_members"]) == ("left,vessel", members[0])
    unknown = run("classes", mine, "--exclude-member", "3=xyz", "--name", "3=x")
    assert unknown.exit_code == 1
    assert "class 3 has no member with scan id xyz" in unknown.stderr


def test_decisions_are_exported_and_imported(prepared: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(prepared, tmp_path / "mine.store")
    file = tmp_path / "decisions.csv"
    done = run("classes", mine, "--name", "1=liver", "--exclude", 2, "--export", file)
    assert done.stderr == f"{file}: 2 classes\n"
    run("classes", mine, "--name", "1=", "--include", 2)
    assert run("classes", mine, "--import", file).stderr == f"{file}: 2 classes changed\n"
    found = json.loads(run("classes", mine, "--json").stdout)
    assert [(row["name"], row["excluded"]) for row in found][1:3] == [("liver", False), ("", True)]


def test_a_class_is_exported_as_files(prepared: Path, tmp_path: Path) -> None:
    done = run("export-class", prepared, 2, tmp_path / "out", "--members", 1, "--json")
    assert json.loads(done.stdout) == {
        "folder": str(tmp_path / "out"), "members": 1, "files": 1, "relative": 0
    }  # fmt: skip
    done = run("export-class", prepared, 2, tmp_path / "all", "--members", "all")
    assert done.stdout.startswith(f"{tmp_path / 'all'}: 5 crops of 5 members, and members.csv")
    assert run("export-class", prepared, 2, tmp_path / "x", "--members", "few").exit_code == 2


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--exclude", "2-x"], "numbers"), (["--name", "liver"], "a class and a text")],
)
def test_a_wrong_class_is_wrong_usage(prepared: Path, options: list[str], word: str) -> None:
    done = run("classes", prepared, *options)
    assert done.exit_code == 2
    assert word in done.stderr


def test_inspect_shows_why_series_were_rejected(prepared: Path) -> None:
    result = run("inspect", prepared)
    assert "rejected: 1 duplicate, 1 unreadable" in result.stdout
    assert "broken" not in result.stdout


def test_inspect_names_files_when_asked_to(prepared: Path) -> None:
    result = run("inspect", prepared, "--paths")
    assert re.search(r"broken\.nii\.gz: unreadable", result.stdout)
    assert re.search(r"phantom-0002\.nii\.gz: scan [0-9a-f]{16}", result.stdout)
    members = json.loads(run("inspect", prepared, "--class", 0, "--paths", "--json").stdout)
    assert all(Path(row["file"]).exists() for row in members["members"])


def test_inspect_names_a_file_of_every_scan(prepared: Path, patches: PatchStore) -> None:
    facts = json.loads(run("inspect", prepared, "--paths", "--json").stdout)
    assert [row["scan"] for row in facts["scan_files"]] == [f"{i:016x}" for i in patches.scans.id]
    files = {row["file"] for row in facts["scan_files"]}
    assert len(files) == len(patches.scans.id)
    assert all(Path(file).is_file() for file in files)


def test_inspect_works_without_the_private_catalogue(copy: Path) -> None:
    result = run("inspect", copy)
    assert result.exit_code == 0
    assert "rejected: 1 duplicate, 1 unreadable" in result.stdout
    named = run("inspect", copy, "--paths")
    assert named.exit_code == 1
    assert "copy.store.catalogue" in named.stderr


def test_a_missing_class_is_an_error(prepared: Path) -> None:
    assert_refused(run("inspect", prepared, "--class", 99), "no class 99; classes are 0 to 3")


def test_verify_exits_with_0_for_a_valid_store(prepared: Path) -> None:
    result = run("verify", prepared)
    assert (result.exit_code, result.stdout) == (0, f"{prepared}: valid\n")


def remove_shard(store: Path) -> None:
    (store / "train/patch/c/1/0/0/0").unlink()


def test_a_damaged_store_verifies_with_status_1_and_names_the_rows(copy: Path) -> None:
    remove_shard(copy)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert result.stdout == "train/patch rows 8-15: checksum failed or data missing\n"


def test_damage_is_reported_as_json(copy: Path) -> None:
    remove_shard(copy)
    (problem,) = json.loads(run("verify", copy, "--json").stdout)
    assert (problem["where"], problem["rows"]) == ("train/patch", list(range(8, 16)))


def test_verify_prints_an_empty_list_for_a_valid_store(prepared: Path) -> None:
    assert json.loads(run("verify", prepared, "--json").stdout) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: shutil.rmtree(store / "train/label"),
        lambda store: (store / "train/label/c/0").write_bytes(b"x" * 40),
        lambda store: (store / "train/label/zarr.json").write_text("{"),
        lambda store: shutil.rmtree(store / "validation"),
        lambda store: shutil.rmtree(store / "scans/thumbnail"),
    ],
    ids=["table gone", "table broken", "table's metadata broken", "split gone", "thumbnails gone"],
)
def test_verify_reports_any_damage_without_failing(
    copy: Path, damage: Callable[[Path], Any]
) -> None:
    damage(copy)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert re.search(r"train/label|validation|scans/thumbnail", result.stdout)


def test_phantom_writes_one_scan_per_patient(tmp_path: Path) -> None:
    result = run("phantom", tmp_path / "p", "--patients", 2, "--format", "mixed", "--matrix", 64)
    assert result.exit_code == 0
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == ["landmarks.json", "phantom-0000.nii.gz", "phantom-0001"]


def test_phantom_refuses_a_folder_that_has_phantoms(tmp_path: Path) -> None:
    arguments = ("phantom", tmp_path / "p", "--patients", 1, "--format", "dicom", "--matrix", 64)
    assert run(*arguments).exit_code == 0
    assert_refused(run(*arguments), "is not an empty folder; give another one")


def test_a_store_is_called_by_a_dot(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("classes", copy, "--quality")
    monkeypatch.chdir(copy)
    assert (run("classes", ".", "--quality").stdout, expected.exit_code) == (expected.stdout, 0)


def test_masks_of_phantoms_are_not_taken_for_scans(tmp_path: Path) -> None:
    options = ("--patients", 2, "--matrix", 64, "--varied", "--masks")
    result = run("phantom", tmp_path / "p", *options)
    assert f"organ masks in {tmp_path / 'p.masks'}" in result.stdout
    assert len(list((tmp_path / "p.masks").iterdir())) == 3
    assert [one.reason for one in list_series(tmp_path / "p", PrepareConfig())] == [None, None]


def test_a_prepared_store_trains_and_its_weights_are_exported(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    trained = run(
        "pretrain", prepared, tmp_path / "run", "--width", 2, "--batch-size", 6, "--steps", 3,
        "--device", "cpu", "--threads", 1, "--warmup-epochs", 0, "--json",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 3
    exported = run("export", tmp_path / "run", tmp_path / "weights.safetensors")
    assert exported.exit_code == 0, exported.stderr
    with safe_open(tmp_path / "weights.safetensors", "pt") as weights:
        assert len(weights.keys()) > 10


DEMO = """
from dataclasses import replace
import cli

cli._DEMO_PATIENTS = 6
autoencoder = {"width": 4, "max_steps": 4, "threads": 1}
cli.PRESETS["demo"] |= {"classes": 3, "neighbours": 4, "autoencoder": autoencoder}
cli._DEMO_TRAINING = replace(cli._DEMO_TRAINING, epochs=2, warmup_epochs=1, threads=1)
cli.main(["demo"])
"""


def test_the_demo_makes_what_it_names_and_can_be_run_again(tmp_path: Path) -> None:
    def demo() -> list[str]:
        done = run_code(DEMO, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    told = demo()
    assert "scans    6 accepted, 1 rejected (1 unreadable)" in told
    (made,) = (line for line in told if line.startswith("Made: "))
    assert "(7 series, one broken on purpose)" in made
    folder = tmp_path / "semgen-demo"
    assert {path.name for path in folder.iterdir()} > {"archive", "store", "run", "report.html"}
    assert (folder / "run.html").is_file()
    assert str(Path("semgen-demo/report.html")) in "\n".join(told)
    assert demo()[0] == "semgen-demo/store is complete; nothing to do."


# Documentation -----------------------------------------------------------------------------------


def documentation() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(file.read_text("utf-8") for file in files)


@pytest.mark.parametrize("name", main.commands)
def test_a_command_is_documented(name: str) -> None:
    assert f"semgen {name}" in documentation()


SETTINGS = {"prepare": PrepareConfig, "pretrain": TrainConfig, "finetune": FinetuneConfig}


def options(command: str) -> dict[str, str]:
    """The longest spelling of each option of a command, by the name of its parameter."""
    return {
        str(parameter.name): max(parameter.opts, key=len)
        for parameter in main.commands[command].params
        if isinstance(parameter, click.Option)
    }


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (command, option)
        for command in main.commands
        for name, option in options(command).items()
        if name not in {s.name for s in describe(SETTINGS.get(command, AutoencoderConfig))}
    ],
)
def test_an_option_is_documented(command: str, option: str) -> None:
    assert re.search(rf"{option}(?![\w-])", documentation())


@pytest.mark.parametrize(("command", "kind"), SETTINGS.items())
def test_every_setting_has_an_option(command: str, kind: type) -> None:
    names = {setting.name for setting in describe(kind)} - {"autoencoder"}  # a table in the file
    assert names - set(options(command)) == set()


def test_the_tables_of_settings_are_up_to_date() -> None:
    page = PAGE.read_text("utf-8")
    assert fill(page) == page, "run: make settings"


@pytest.mark.parametrize("kind", [*SETTINGS.values(), AutoencoderConfig])
def test_every_setting_is_described(kind: type) -> None:
    assert [s.name for s in describe(kind) if not s.description.endswith(".")] == []


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("pretrain", "widht = 8", ["unknown setting widht; did you mean width?"]),
        ("pretrain", "width = 0", ["width must be >= 1, got 0"]),
        ("finetune", 'loss = "mse"', ["loss must be one of auto, dice", "got 'mse'"]),
    ],
)
def test_training_reads_settings_from_a_file(
    command: str, text: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    done = run(command, tmp_path, tmp_path / "r", "--config", file)
    assert_refused(done, *words, status=2)


def test_options_of_training_take_precedence_over_the_file(prepared: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("width = 2\nsteps = 1\nbatch_size = 4\nlr_gamma = 0.25")
    done = run("pretrain", prepared, tmp_path / "run", "--config", file, "--batch-size", 6)
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["width"], config["batch_size"], config["lr_gamma"]) == (2, 6, 0.25)


def test_ctrl_c_while_a_lock_is_released_is_an_interrupt(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr("store.PatchStore.num_classes", property(interrupted))
    done = run("inspect", prepared)
    assert done.exit_code == 1
    assert done.stderr == "Error: interrupted; run the same command again to resume\n"


def test_a_runtime_error_is_not_an_interrupt(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("store.PatchStore.num_classes", property(broken))
    assert isinstance(run("inspect", prepared).exception, RuntimeError)


def test_repeated_lists_of_classes_add_up(prepared: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(prepared, tmp_path / "mine")
    assert run("classes", mine, "--exclude", "1", "--exclude", "2-3").exit_code == 0
    assert run("classes", mine, "--include", "2").exit_code == 0
    found = json.loads(run("classes", mine, "--json").stdout)
    assert [row["class"] for row in found if row["excluded"]] == [1, 3]


def test_a_range_that_runs_backwards_is_refused(prepared: Path) -> None:
    result = run("classes", prepared, "--exclude", "9-7")
    assert result.exit_code == 2
    assert "'9-7': the first number of a range must be smaller" in result.stderr


def test_waiting_threads_do_not_spin_by_default() -> None:
    """Set before torch is loaded; the user's own choice is kept."""
    script = "import cli, os; print(os.environ['OMP_WAIT_POLICY'])"
    for chosen, found in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == found


def test_a_bug_keeps_its_traceback(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that raises ValueError, as numpy does for anything."""

    def stumble(*_: object) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr("store.inspect.describe_store", stumble)
    result = run("inspect", prepared)
    assert isinstance(result.exception, ValueError)
    assert "Error:" not in result.stderr


def test_debug_shows_the_traceback_of_an_error_of_the_user(tmp_path: Path) -> None:
    assert_refused(run("inspect", tmp_path / "no"), "no such store")
    assert isinstance(run("--debug", "inspect", tmp_path / "no").exception, StoreError)
