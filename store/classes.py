"""Annotation of classes by users: names, notes, exclusions.

Stored as the attribute `annotation` of the group `classes`, by class number. It is not part of the
content, so the fingerprint does not change.
"""

from __future__ import annotations

import fcntl
import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import zarr

from store.errors import is_url
from store.format import StoreError
from store.group import open_group, read_attribute, read_errors
from store.location import Where, locate

_ATTRIBUTE = "annotation"


@dataclass(frozen=True, slots=True)
class ClassNote:
    """Annotation of one class."""

    name: str = ""
    note: str = ""
    excluded: bool = False
    """Whether training leaves the class out by default."""


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


def annotate(store: str | Path, changes: Mapping[int, Mapping[str, Any]]) -> Annotation:
    """Change the annotation of some classes: new values by field, by class number.

    Raises StoreError for a class that the store does not have, for text with control characters,
    for a store that is not complete yet, and for a URL.
    """
    if is_url(store):
        raise StoreError(
            f"{store}: classes cannot be annotated through a URL; annotate the original store, then"
            " run the same `semgen push` again"
        )
    with _locked(Path(store)):
        if read_attribute(open_group(Path(store)))["state"] != "complete":
            raise StoreError(
                f"{store}: still building; run the same `semgen prepare` to finish it first"
            )
        group = _classes(Path(store), mode="r+")
        num_classes = group["reference"].shape[0]  # type: ignore[union-attr]
        notes = dict(read_annotation(store).notes)
        for label, change in changes.items():
            if not 0 <= label < num_classes:
                raise StoreError(f"{store}: no class {label}; classes are 0 to {num_classes - 1}")
            for name, value in change.items():
                if isinstance(value, str) and clean(value, name) != value:
                    raise StoreError(
                        f"{store}: the {name} of class {label} contains control"
                        f" characters: {value!a}; type it again without them"
                    )
            notes[label] = replace(notes.get(label, ClassNote()), **change)
        kept = {label: note for label, note in sorted(notes.items()) if note != ClassNote()}
        group.attrs[_ATTRIBUTE] = {str(label): asdict(note) for label, note in kept.items()}
    return Annotation(kept)


def clean(text: str, field: str) -> str:
    """A text with "?" in place of control characters and unpaired surrogates.

    Only the field "note" may have several lines.
    """
    lines = "\n" if field == "note" else ""
    return "".join(
        c if c in lines or unicodedata.category(c) not in {"Cc", "Cs"} else "?" for c in text
    )


def _read_note(note: dict[str, Any]) -> ClassNote:
    """A note from the attribute; older versions accepted any text."""
    shown: dict[str, Any] = {
        name: clean(value, name) if isinstance(value, str) else value
        for name, value in note.items()
    }
    return ClassNote(**shown)


def _classes(store: Where, mode: str = "r") -> zarr.Group:
    where = locate(store)
    opened = open_group(where, mode)
    with read_errors(where, f"{where}: has no classes yet"):
        group = opened["classes"]
    assert isinstance(group, zarr.Group)
    return group


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Lock the annotation: one writer at a time."""
    folder = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
