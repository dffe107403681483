"""Annotation of classes by users: names, notes, tags, and which classes and members to use.

Stored as the attribute `annotation` of the group `classes`, by class number. It is not part of the
content, so the fingerprint does not change.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr

from store.atomic import locked
from store.errors import is_url
from store.format import StoreError
from store.group import open_group, read_attribute, read_errors
from store.location import Where, locate

_ATTRIBUTE = "annotation"
_ALWAYS_WRITTEN: Final = ("name", "note", "excluded")
_TAG_CHARACTERS: Final = 40
_MOST_CHARACTERS: Final = {"name": 200, "note": 2000}
_TYPES: Final = {
    "name": (str, "a text"),
    "note": (str, "a text"),
    "tags": (str, "a list of texts"),
    "excluded": (bool | np.bool_, "true or false"),
    "kept": (bool | np.bool_, "true or false"),
    "excluded_members": (int | np.integer, "a list of rows of scans"),
}
"""Type of a value, or of each of a list, and how to call it."""
_LISTS: Final = frozenset({"tags", "excluded_members"})


class AnnotationChanged(StoreError):
    """Somebody else changed the same field of a class; nothing was written."""


@dataclass(frozen=True, slots=True)
class ClassNote:
    """Annotation of one class."""

    name: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
    """Short texts without commas, sorted."""
    excluded: bool = False
    """Whether training leaves the class out by default."""
    kept: bool = False
    """Whether somebody decided to keep the class."""
    excluded_members: tuple[int, ...] = ()
    """Members that training leaves out by default: rows of `scans`, sorted."""

    @property
    def decided(self) -> bool:
        """Whether somebody decided to keep or to exclude the class."""
        return self.kept or self.excluded


@dataclass(frozen=True, slots=True)
class Annotation:
    """Annotated classes, by class number; other classes have an empty note."""

    notes: Mapping[int, ClassNote] = field(default_factory=dict)

    def __getitem__(self, label: int) -> ClassNote:
        return self.notes.get(label, ClassNote())

    @property
    def excluded(self) -> tuple[int, ...]:
        """Excluded classes, in order."""
        return tuple(sorted(label for label, note in self.notes.items() if note.excluded))


def read_annotation(store: Where) -> Annotation:
    """The annotation of a store; StoreError when it is not as `annotate` writes it."""
    content = _classes(store).attrs.get(_ATTRIBUTE, {})
    try:
        assert isinstance(content, dict)
        return Annotation({int(label): _read_note(note) for label, note in content.items()})
    except (AssertionError, TypeError, ValueError) as error:
        raise StoreError(
            f'{store}: attribute "{_ATTRIBUTE}" of group classes is broken; delete it'
        ) from error


def annotate(
    store: str | Path,
    changes: Mapping[int, Mapping[str, Any]],
    *,
    was: Mapping[int, Mapping[str, Any]] | None = None,
) -> Annotation:
    """Change the annotation of some classes: new values by field, by class number.

    A class that becomes excluded is no longer kept, and the reverse. All changes are checked before
    any is written.

    was
        Values by field, by class number, that the caller believes to be present. If any differs,
        nothing is written and AnnotationChanged is raised. So two programs never overwrite each
        other's changes unnoticed. Give both `excluded` and `kept` if either changes.

    Raises StoreError for a class that the store does not have, for a scan that is no member of the
    class, for a value of another type, for a text with control characters, for a store that is not
    complete yet, and for a URL.
    """
    if is_url(store):
        raise StoreError(
            f"{store}: classes cannot be annotated through a URL; annotate the original store, then"
            " run the same `semgen push` again"
        )
    if read_attribute(open_group(Path(store)))["state"] != "complete":
        raise StoreError(
            f"{store}: still building; run the same `semgen prepare` to finish it first"
        )
    with locked(Path(store)):  # one writer at a time
        group: Any = _classes(Path(store), mode="r+")
        num_classes = group["reference"].shape[0]
        notes = dict(read_annotation(store).notes)
        for label in {*changes, *(was or ())}:
            check_class(label, num_classes, where=store)
        for label, believed in (was or {}).items():
            check_note(believed, where=f"{store}: class {label}")
            _refuse_changed(store, label, notes.get(label, ClassNote()), believed)
        for label, change in changes.items():
            checked = _check_change(store, label, change)
            _check_members(store, label, group, checked.get("excluded_members", ()))
            notes[label] = replace(notes.get(label, ClassNote()), **checked)
        kept = {label: note for label, note in sorted(notes.items()) if note != ClassNote()}
        group.attrs[_ATTRIBUTE] = {str(label): _write_note(note) for label, note in kept.items()}
    return Annotation(kept)


def check_class(label: Any, num_classes: int, *, where: object) -> None:
    """StoreError, which begins with `where`, if `label` is no class of a store."""
    is_number = isinstance(label, int | np.integer) and not isinstance(label, bool)
    if not (is_number and 0 <= label < num_classes):
        raise StoreError(f"{where}: no class {label}; classes are 0 to {num_classes - 1}")


def check_note(change: Mapping[str, Any], *, where: object) -> None:
    """StoreError, which begins with `where`, for an unknown field or a value of another type."""
    for name, value in change.items():
        if name not in _TYPES:
            raise StoreError(f"{where}: a class has no {name!r}; give one of {', '.join(_TYPES)}")
        if not _is_allowed(name, value):
            raise StoreError(f"{where}: {name} must be {_TYPES[name][1]}, got {value!r}")


def clean(text: str, field: str) -> str:
    """A text with "?" in place of control characters and unpaired surrogates.

    Only the field "note" may have several lines.
    """
    lines = "\n" if field == "note" else ""
    return "".join(
        c if c in lines or unicodedata.category(c) not in {"Cc", "Cs"} else "?" for c in text
    )


def _refuse_changed(
    store: str | Path, label: int, note: ClassNote, believed: Mapping[str, Any]
) -> None:
    for name, value in believed.items():
        present = getattr(note, name)
        if present != _in_order(name, value):
            raise AnnotationChanged(
                f"{store}: class {label} was changed by somebody else meanwhile: its {name} is now"
                f" {present!r}; look at the class again, then repeat the change"
            )


def _check_change(store: str | Path, label: int, change: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to change; StoreError if a value is not allowed."""
    check_note(change, where=f"{store}: class {label}")
    checked = {name: _in_order(name, value) for name, value in change.items()}
    for name, value in checked.items():
        for text in value if name == "tags" else [value]:
            if isinstance(text, str) and clean(text, name) != text:
                raise StoreError(
                    f"{store}: the {name} of class {label} contains control"
                    f" characters: {text!a}; type it again without them"
                )
            if len(str(text)) > _MOST_CHARACTERS.get(name, math.inf):
                raise StoreError(
                    f"{store}: the {name} of class {label} has {len(text)} characters; at most"
                    f" {_MOST_CHARACTERS[name]} are allowed"
                )
            if name == "tags" and ("," in text or len(text) > _TAG_CHARACTERS):
                raise StoreError(
                    f"{store}: class {label}: a tag has at most {_TAG_CHARACTERS} characters and no"
                    f" comma, got {text!r}; use the note for longer texts"
                )
    if checked.get("excluded") and checked.get("kept"):
        raise StoreError(f"{store}: class {label}: is either kept or excluded; choose one")
    if checked.get("excluded"):
        checked["kept"] = False
    elif checked.get("kept"):
        checked["excluded"] = False
    return checked


def _check_members(store: str | Path, label: int, group: Any, rows: Iterable[int]) -> None:
    """StoreError for rows of `scans` that are members of the class in neither split."""
    members = {
        int(row)
        for table in ("neighbour", "validation_neighbour")
        for row in np.asarray(group[table][label])
    }
    unknown = sorted({*rows} - (members - {-1}))
    if unknown:
        raise StoreError(
            f"{store}: class {label}: row {unknown[0]} of scans is not a member; `semgen inspect"
            f" {store} --class {label}` lists the members"
        )


def _is_allowed(name: str, value: Any) -> bool:
    """Whether a value has the type of its field."""
    if name in _LISTS and (isinstance(value, str) or not isinstance(value, Collection)):
        return False
    if name == "excluded_members" and any(isinstance(row, bool) for row in value):
        return False  # which are numbers in Python
    return all(isinstance(v, _TYPES[name][0]) for v in (value if name in _LISTS else [value]))


def _in_order(name: str, value: Any) -> Any:
    """A value as it is stored: tags and members sorted, each once."""
    if name == "tags":
        return tuple(sorted({tag.strip() for tag in value} - {""}))
    if name == "excluded_members":
        return tuple(sorted({int(row) for row in value}))
    return bool(value) if name in ("excluded", "kept") else value


def _read_note(note: dict[str, Any]) -> ClassNote:
    """A note from the attribute; older versions accepted any text."""
    shown: dict[str, Any] = {
        name: clean(value, name) if isinstance(value, str) else value
        for name, value in note.items()
    }
    assert all(_is_allowed(name, value) for name, value in note.items() if name in _TYPES)
    for name in _LISTS & shown.keys():
        shown[name] = tuple(shown[name])
    return ClassNote(**shown)


def _write_note(note: ClassNote) -> dict[str, Any]:
    """A note for the attribute; fields that earlier versions do not know, only if they are set."""
    return {name: value for name, value in asdict(note).items() if value or name in _ALWAYS_WRITTEN}


def _classes(store: Where, mode: str = "r") -> zarr.Group:
    where = locate(store)
    opened = open_group(where, mode)
    with read_errors(where, f"{where}: has no classes yet"):
        group = opened["classes"]
    assert isinstance(group, zarr.Group)
    return group
