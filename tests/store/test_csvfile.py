"""CSV that people open in a spreadsheet: no text of theirs is computed there."""

import csv
import io
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
from click.testing import CliRunner

from cli import main
from store.csvfile import write_csv
from tests.support.finetuning import draw_case, write_manifest
from tests.support.synthetic_store import make_store
from trainer.finetuning import FinetuneConfig, finetune, predict


def read_back(*cells: object) -> list[str]:
    stream = io.StringIO()
    write_csv(stream, ["cell"], ([cell] for cell in cells))
    return [row["cell"] for row in csv.DictReader(io.StringIO(stream.getvalue()))]


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "\t=1", "-", "--1"])
def test_text_that_looks_like_a_formula_is_marked_as_text(text: str) -> None:
    assert read_back(text) == ["'" + text]


@pytest.mark.parametrize("value", [-0.5, -1, "-0.5", "+1e3", "1-2", "a=b", "", None, Path("x")])
def test_numbers_and_other_text_stay_as_they_are(value: object) -> None:
    assert read_back(value) == ["" if value is None else str(value)]


def test_headers_are_text_too() -> None:
    stream = io.StringIO()
    write_csv(stream, ["=cmd()", "score"], [])
    assert stream.getvalue() == "'=cmd(),score\n"


def test_names_and_notes_of_classes_are_text(tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "a.store", num_classes=2))
    said = ["--name", '0==HYPERLINK("x")', "--note", "0=@note"]
    assert CliRunner().invoke(main, ["classes", store, *said]).exit_code == 0
    table = CliRunner().invoke(main, ["classes", store, "--csv"]).stdout
    row = next(csv.DictReader(io.StringIO(table)))
    assert (row["class"], row["name"], row["note"]) == ("0", '\'=HYPERLINK("x")', "'@note")


def test_cases_files_and_labels_are_text(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for number in range(6):
        sitk.WriteImage(draw_case(number)[0], str(tmp_path / f"-{number}x.nii"))
        rows.append({"image": f"-{number}x.nii", "label": "no" if number % 2 else "=yes()"})
    config = FinetuneConfig(width=2, shape=(8, 16, 16), batch_size=4, steps=1, device="cpu")
    finetune(write_manifest(tmp_path / "task.csv", rows), tmp_path / "run", config)
    predict(tmp_path / "run", tmp_path / "-0x.nii", tmp_path / "answers.csv")
    for file, column in (
        (tmp_path / "run" / "cases.csv", "case"),
        (tmp_path / "answers.csv", "image"),
    ):
        with file.open() as stream:
            table = list(csv.DictReader(stream))
        assert all(row[column].startswith("'-") for row in table)
        assert all(0 <= float(row["'=yes()"]) <= 1 for row in table)
