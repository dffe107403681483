"""Annotation of classes: names, notes, tags, and decisions on classes and members."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zarr

from store import AnnotationChanged, ClassNote, PatchStore, StoreError, annotate, read_annotation
from store.group import compute_fingerprint
from store.verification import verify
from tests.support.crops import change_attribute


def test_annotations_are_kept_and_changed_class_by_class(annotated: Path) -> None:
    annotate(annotated, {3: {"name": "Leber – rechts <b>", "excluded": True}, 1: {"note": "two"}})
    annotate(annotated, {3: {"note": "junk"}})
    said = read_annotation(annotated)
    assert said[3] == ClassNote(name="Leber – rechts <b>", note="junk", excluded=True)
    assert (said[1], said[0]) == (ClassNote(note="two"), ClassNote())
    assert said.excluded == (3,)
    annotate(annotated, {3: {"excluded": False, "name": "", "note": ""}})
    assert 3 not in read_annotation(annotated).notes


def test_an_annotation_changes_neither_content_nor_fingerprint(annotated: Path) -> None:
    before = PatchStore(annotated).fingerprint
    annotate(annotated, {2: {"excluded": True}})
    assert compute_fingerprint(annotated) == before
    assert [problem for problem in verify(annotated) if "classes" in problem.where] == []


def test_an_unknown_class_cannot_be_annotated(annotated: Path) -> None:
    with pytest.raises(StoreError, match="no class 6; classes are 0 to 5"):
        annotate(annotated, {6: {"excluded": True}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name must be a text, got 3"),
        ({"tags": "vessel"}, "tags must be a list of texts, got 'vessel'"),
        ({"tags": [1]}, "tags must be a list of texts"),
        ({"excluded": "no"}, "excluded must be true or false, got 'no'"),
        ({"excluded_members": [0.5]}, "excluded_members must be a list of rows of scans"),
        ({"colour": "red"}, "a class has no 'colour'; give one of name, note"),
    ],
)
def test_values_of_another_type_are_refused(
    annotated: Path, change: dict[str, object], message: str
) -> None:
    before = read_annotation(annotated)
    with pytest.raises(StoreError, match=message):
        annotate(annotated, {1: change})
    assert read_annotation(annotated) == before


@pytest.mark.parametrize("text", ["half \ud800", "two\nlines", "bell \x07"])
def test_control_characters_in_a_name_are_refused_and_old_ones_replaced(
    annotated: Path, text: str
) -> None:
    with pytest.raises(StoreError, match="contains control characters"):
        annotate(annotated, {1: {"name": text}})
    group = zarr.open_group(str(annotated / "classes"), mode="r+")
    group.attrs["annotation"] = {"1": {"name": text}}
    assert read_annotation(annotated)[1].name == re.sub("[\ud800\n\x07]", "?", text)


def test_a_note_may_have_several_lines(annotated: Path) -> None:
    annotate(annotated, {1: {"note": "two\nlines"}})
    assert read_annotation(annotated)[1].note == "two\nlines"


def test_an_unfinished_store_is_not_annotated(copy: Path) -> None:
    change_attribute(copy, "state", "building")
    with pytest.raises(StoreError, match="still building"):
        annotate(copy, {0: {"name": "liver"}})
    assert read_annotation(copy).notes == {}


def test_the_error_for_a_file_says_that_a_store_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        PatchStore(tmp_path / "s")


def test_a_broken_annotation_is_reported(annotated: Path) -> None:
    group = zarr.open_group(annotated, mode="r+")["classes"]
    group.attrs["annotation"] = {"three": {"name": "x"}}
    with pytest.raises(StoreError, match='attribute "annotation" of group classes is broken'):
        read_annotation(annotated)


def test_a_kept_class_that_becomes_excluded_is_no_longer_kept_and_the_reverse(
    annotated: Path,
) -> None:
    assert not read_annotation(annotated)[1].decided
    for change, kept in (("kept", True), ("excluded", False), ("kept", True)):
        note = annotate(annotated, {1: {change: True}})[1]
        assert (note.kept, note.excluded, note.decided) == (kept, not kept, True)
    with pytest.raises(StoreError, match="class 1: is either kept or excluded"):
        annotate(annotated, {1: {"kept": True, "excluded": True}})


def test_tags_are_sorted_and_each_is_there_once(annotated: Path) -> None:
    annotate(annotated, {1: {"tags": ["vessel", " left ", "vessel", ""]}})
    assert read_annotation(annotated)[1].tags == ("left", "vessel")


@pytest.mark.parametrize("tag", ["left,right", "bell \x07", "x" * 41])
def test_a_tag_with_a_comma_a_control_character_or_too_many_letters_is_refused(
    annotated: Path, tag: str
) -> None:
    with pytest.raises(StoreError, match="class 1"):
        annotate(annotated, {1: {"tags": [tag]}})


def test_only_members_of_a_class_can_be_excluded_from_it(annotated: Path) -> None:
    group = zarr.open_group(annotated, mode="r+")["classes"]
    group["neighbour"][1] = [0, -1]  # type: ignore[index]
    annotate(annotated, {1: {"excluded_members": [3, 0, 3]}, 2: {"excluded_members": {1}}})
    assert read_annotation(annotated)[1].excluded_members == (0, 3)
    for row in (1, -1, 9):
        with pytest.raises(StoreError, match=f"class 1: row {row} of scans is not a member"):
            annotate(annotated, {1: {"excluded_members": [row]}})


def test_nothing_is_written_if_one_of_several_changes_is_refused(annotated: Path) -> None:
    with pytest.raises(StoreError):
        annotate(annotated, {1: {"name": "liver"}, 2: {"excluded_members": [9]}})
    assert read_annotation(annotated).notes == {}


def test_a_change_of_somebody_else_is_not_overwritten(annotated: Path) -> None:
    annotate(annotated, {1: {"name": "liver", "tags": ["left"]}})
    with pytest.raises(AnnotationChanged, match=r"class 1 .* its name is now 'liver'"):
        annotate(annotated, {1: {"name": "spleen"}, 2: {"kept": True}}, was={1: {"name": ""}})
    assert read_annotation(annotated).notes.keys() == {1}
    was = {1: {"name": "liver", "tags": ["left", "left"]}, 2: {"kept": False}}
    annotate(annotated, {1: {"name": "spleen"}}, was=was)
    assert read_annotation(annotated)[1].name == "spleen"


def test_an_annotation_of_an_earlier_version_is_read(annotated: Path) -> None:
    group = zarr.open_group(annotated, mode="r+")["classes"]
    group.attrs["annotation"] = {"1": {"name": "liver", "note": "", "excluded": True}}
    assert read_annotation(annotated)[1] == ClassNote(name="liver", excluded=True)


def test_an_earlier_version_can_read_what_it_knows_of(annotated: Path) -> None:
    annotate(annotated, {1: {"name": "liver", "kept": True}, 2: {"excluded": True}})
    written = zarr.open_group(annotated, mode="r")["classes"].attrs["annotation"]
    assert written["2"] == {"name": "", "note": "", "excluded": True}  # type: ignore[index, call-overload]


def test_concurrent_annotations_are_all_kept(annotated: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda c: annotate(annotated, {c: {"name": f"class {c}"}}), range(6)))
    assert [read_annotation(annotated)[c].name for c in range(6)] == [
        f"class {c}" for c in range(6)
    ]
