"""Decisions on classes as files: exported, edited in a spreadsheet, imported again."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from store import ClassNote, PatchStore, StoreError, annotate, read_annotation
from store.decisions import (
    decisions_csv,
    decisions_json,
    export_decisions,
    import_decisions,
    read_decisions,
)
from tests.support.synthetic_store import make_store

NOTES = {
    0: {"name": '=HYPERLINK("x")', "note": "two\nlines, \"quoted\"", "tags": ["left", "vessel"]},
    2: {"excluded": True, "excluded_members": [1, 3]},
    3: {"kept": True, "name": "'tis"},
    4: {"name": "1e5", "note": "'=1", "tags": ["-1"]},
    5: {"name": "Leber – rechts"},
}  # fmt: skip


@pytest.fixture
def decided(annotated: Path) -> PatchStore:
    annotate(annotated, NOTES)
    return PatchStore(annotated)


@pytest.fixture
def line() -> dict[str, object]:
    """An entry that can be imported."""
    return {"class": 1, "reference": "0000000000000000"}


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", ["decisions.csv", "decisions.json", "DECISIONS.CSV"])
def test_exported_decisions_are_the_same_after_an_import(
    decided: PatchStore, tmp_path: Path, name: str
) -> None:
    before = read_annotation(decided.path)
    assert export_decisions(decided, tmp_path / name) == 5
    assert import_decisions(decided, tmp_path / name) == 0
    empty = {"name": "", "note": "", "tags": [], "excluded": False, "kept": False}
    annotate(decided.path, {label: {**empty, "excluded_members": []} for label in range(6)})
    assert import_decisions(decided, tmp_path / name) == 5
    assert read_annotation(decided.path) == before


def test_a_row_names_members_by_scan_id_and_separates_lists(decided: PatchStore) -> None:
    rows = rows_of(decisions_csv(decided))
    assert [row["class"] for row in rows] == ["0", "2", "3", "4", "5"]
    assert rows[0]["tags"] == "left,vessel"
    assert (rows[1]["excluded"], rows[1]["kept"]) == ("true", "false")
    assert rows[1]["excluded_members"] == "0000000000000001,0000000000000003"
    assert json.loads(decisions_json(decided))[1]["excluded_members"] == [
        "0000000000000001", "0000000000000003"
    ]  # fmt: skip


def test_a_spreadsheet_neither_computes_a_text_nor_reads_it_as_a_number(
    decided: PatchStore,
) -> None:
    rows = rows_of(decisions_csv(decided))
    assert [row["name"] for row in rows] == [
        '\'=HYPERLINK("x")', "", "''tis", "'1e5", "Leber – rechts"
    ]  # fmt: skip
    assert {row["reference"] for row in rows} == {"'0000000000000000"}


def test_a_table_saved_by_a_spreadsheet_is_read(decided: PatchStore) -> None:
    text = "\ufeffclass;reference;excluded;tags\r\n1;0000000000000000;TRUE;b, a\r\n;;;\r\n"
    assert read_decisions(decided, text) == {1: {"excluded": True, "tags": ("a", "b")}}


def test_classes_and_fields_that_are_not_in_the_file_stay_as_they_are(
    decided: PatchStore, tmp_path: Path, line: dict[str, object]
) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps([{**line, "class": 2, "name": "junk"}]))
    assert import_decisions(decided, file) == 1
    annotation = read_annotation(decided.path)
    assert annotation[2] == ClassNote(name="junk", excluded=True, excluded_members=(1, 3))
    assert annotation.notes.keys() == NOTES.keys()


def test_decisions_of_another_store_are_refused_and_nothing_is_written(
    decided: PatchStore, tmp_path: Path
) -> None:
    export_decisions(decided, tmp_path / "d.csv")
    other = make_store(tmp_path / "other.store", references=(0, 0, 0, 1, 0, 0))
    with pytest.raises(
        StoreError, match=r"line 5: class 3 has reference 0+, but 0+1 .* of another"
    ):
        import_decisions(PatchStore(other), tmp_path / "d.csv")
    assert read_annotation(other).notes == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": 6}, "entry 1: .*: no class 6; classes are 0 to 5"),
        ({"class": True}, "no class True"),
        ({"names": "x"}, "unknown column names; columns are class, reference, name"),
        ({"excluded": "yes"}, "excluded must be true or false, got 'yes'"),
        ({"tags": "left"}, "tags must be a list of texts, got 'left'"),
        ({"tags": ["a,b"]}, "class 1: a tag has"),
        ({"name": "bell \x07"}, "contains control characters"),
        ({"excluded_members": ["00000000000000ff"]}, "entry 1: .* class 1 has no member with scan"),
        ({"excluded_members": [1]}, "excluded_members must be a list of texts"),
        ({"excluded": True, "kept": True}, "class 1 is either kept or excluded"),
    ],
)
def test_a_wrong_entry_is_named_and_nothing_is_written(
    decided: PatchStore,
    tmp_path: Path,
    line: dict[str, object],
    entry: dict[str, object],
    message: str,
) -> None:
    before = read_annotation(decided.path)
    file = tmp_path / "wrong.json"
    good = {**line, "class": 3, "name": "liver"}
    file.write_text(json.dumps([{**line, **entry}, good]))
    with pytest.raises(StoreError, match=message):
        import_decisions(decided, file)
    assert read_annotation(decided.path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,name\n1,liver\n", "line 2: column reference is missing"),
        ("class,reference\n1,0000000000000000,x\n", "line 2: has more or fewer cells"),
        ("class,reference\n1\n", "line 2: has more or fewer cells"),
        ("class,reference,kept\n1,0000000000000000,maybe\n", "kept must be true or false"),
        ("class,reference\none,0000000000000000\n", "no class one"),
        ("class,reference\n1,0000000000000000\n1,0000000000000000\n", "class 1 was already named"),
        ("[1]", "must be a list of objects"),
        ('{"class": 1}', "must be a list of objects"),
        ("[{]", "is broken JSON"),
        ("[" * 100_000, "is broken JSON"),
    ],
)
def test_a_broken_text_is_refused(decided: PatchStore, text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        read_decisions(decided, text)


def test_a_file_of_another_kind_is_refused(decided: PatchStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"must end in .csv or .json"):
        export_decisions(decided, tmp_path / "decisions.xlsx")
    (tmp_path / "a.csv").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(StoreError, match="is not UTF-8 text"):
        import_decisions(decided, tmp_path / "a.csv")
