"""Decisions on classes as CSV or JSON: exported, and imported into the same store again.

Classes and members are identified by scan ids, so decisions of another store are refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from store.atomic import replace_file
from store.classes import ClassNote, annotate, check_class, check_note, read_annotation
from store.csvfile import hold_text, release_text, write_csv
from store.format import StoreError
from store.reader import PatchStore
from store.scans import scan_name

Changes = dict[int, dict[str, Any]]
_LISTS, _FLAGS = ("tags", "excluded_members"), ("excluded", "kept")
_COLUMNS: Final = (
    "class", "reference", "name", "note", "tags", "excluded", "kept", "excluded_members"
)  # fmt: skip
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")


# Members by scan id


def find_member(store: PatchStore, label: int, scan: str) -> int:
    """Row in `scans` of a member of a class, in either split.

    scan
        Its scan id, or the first digits of it.

    Raises StoreError if no member or several members have such an id, and for an unknown class.
    """
    check_class(label, store.num_classes, where=store.location)
    tables = (store.classes.neighbour[label], store.classes.validation_neighbour[label])
    members = sorted({int(row) for table in tables for row in table} - {-1})
    found = [row for row in members if scan_name(store.scans.id[row]).startswith(scan.lower())]
    if len(found) != 1 or not scan:
        what = f"{len(found)} members" if found else "no member"
        raise StoreError(
            f"{store.location}: class {label} has {what} with scan id {scan}; `semgen inspect"
            f" {store.location} --class {label}` lists them"
        )
    return found[0]


def parse_member(store: PatchStore, text: str) -> tuple[int, int]:
    """Class and row in `scans` of a member that is written as CLASS=SCAN, such as 3=91ab...

    Raises StoreError if there is no such member.
    """
    label, _, scan = text.partition("=")
    if not label.isdecimal():
        raise StoreError(f"{text!r}: give class and scan id, such as 3=0123456789abcdef")
    return int(label), find_member(store, int(label), scan)


def change_classes(
    store: PatchStore,
    changes: Mapping[int, Mapping[str, Any]],
    members: Iterable[tuple[int, str, bool]],
) -> None:
    """Change the annotation as `annotate` does, and exclude or re-include single members.

    members
        Class, scan id or its first digits, and whether to exclude the member.
    """
    annotation, was = read_annotation(store.location), {}
    changed = {label: dict(change) for label, change in changes.items()}
    for label, scan, excluded in members:
        row, before = find_member(store, label, scan), annotation[label].excluded_members
        was[label] = {"excluded_members": before}
        change = changed.setdefault(label, {})
        others = {*change.get("excluded_members", before)} - {row}
        change["excluded_members"] = others | {row} if excluded else others
    annotate(str(store.location), changed, was=was)


def list_excluded_members(store: PatchStore) -> tuple[str, ...]:
    """The excluded members of all classes, each as CLASS=SCAN."""
    notes = read_annotation(store.location).notes
    return tuple(
        f"{label}={scan_name(store.scans.id[row])}"
        for label, note in sorted(notes.items())
        for row in note.excluded_members
    )


# Export


def decisions_csv(store: PatchStore) -> str:
    """Every annotated class of a store as CSV; lists are separated by commas."""
    stream = io.StringIO()
    rows = [
        [_as_cell(",".join(value) if name in _LISTS else value) for name, value in line.items()]
        for line in _describe(store)
    ]
    write_csv(stream, _COLUMNS, rows)
    return stream.getvalue()


def decisions_json(store: PatchStore) -> str:
    """The same as JSON: a list with one object for each annotated class."""
    return json.dumps(_describe(store), indent=1) + "\n"


def export_decisions(store: PatchStore, file: Path) -> int:
    """Write the decisions to a .csv or .json file; returns the number of classes in it."""
    formats = {".csv": decisions_csv, ".json": decisions_json}
    if file.suffix.lower() not in formats:
        raise StoreError(f"{file}: the name must end in .csv or .json")
    with replace_file(file) as partial:
        partial.write_text(formats[file.suffix.lower()](store), "utf-8", newline="")
    return len(read_annotation(store.location).notes)


def _describe(store: PatchStore) -> list[dict[str, Any]]:
    """One entry for each annotated class, by column."""
    return [
        {"class": label, "reference": _reference(store, label), **_portable(store, note)}
        for label, note in sorted(read_annotation(store.location).notes.items())
    ]


def _portable(store: PatchStore, note: ClassNote) -> dict[str, Any]:
    """The fields of a note, with scan ids for rows, and lists for tuples."""
    members = [scan_name(store.scans.id[row]) for row in note.excluded_members]
    return {**asdict(note), "tags": list(note.tags), "excluded_members": members}


def _reference(store: PatchStore, label: int) -> str:
    return scan_name(store.scans.id[store.classes.reference[label]])


def _as_cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return hold_text(value) if isinstance(value, str) else value


# Import


def import_decisions(store: PatchStore, file: Path) -> int:
    """Apply a file of `export_decisions`; returns the number of classes that changed.

    Everything is checked before anything is written. Classes that the file does not name, and
    fields that it does not have, stay as they are.
    """
    return apply_decisions(store, file.read_bytes(), where=str(file))


def apply_decisions(store: PatchStore, content: bytes, *, where: str) -> int:
    """Like `import_decisions`, with the content of a file; `where` names it in messages."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoreError(f"{where}: is not UTF-8 text; save it as CSV UTF-8 or JSON") from error
    changes = read_decisions(store, text, where=where)
    if changes:
        annotate(str(store.location), changes)
    return len(changes)


def read_decisions(store: PatchStore, text: str, *, where: str = "decisions") -> Changes:
    """Decisions in CSV or JSON, as changes for `annotate`: the fields that differ at present.

    where
        Name of the text in messages.

    Raises StoreError with the line or entry that is wrong, also where a class has another reference
    than in this store.
    """
    annotation, changes, seen = read_annotation(store.location), Changes(), set()
    for entry, line in _read_json(text, where) if _is_json(text) else _read_csv(text, where):
        label, wanted = _check_line(store, line, entry)
        if label in seen:
            raise StoreError(f"{entry}: class {label} was already named above; keep one of them")
        seen.add(label)
        present = asdict(annotation[label])
        change = {name: value for name, value in wanted.items() if present[name] != value}
        if change:
            changes[label] = change
    return changes


def _is_json(text: str) -> bool:
    return text.lstrip("\ufeff \t\r\n")[:1] in {"[", "{"}


def _read_json(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects, with the name of each entry for messages."""
    try:
        content = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: is broken JSON ({error}); export it again") from error
    if not isinstance(content, list) or not all(isinstance(line, dict) for line in content):
        raise StoreError(f"{where}: must be a list of objects, as `semgen classes --export` writes")
    for number, line in enumerate(content, 1):
        yield f"{where}, entry {number}", line


def _read_csv(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines as objects, with names for messages; also with semicolons, as Excel writes."""
    head = text.lstrip("\ufeff").partition("\n")[0]
    delimiter = ";" if ";" in head and "," not in head else ","
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff"), newline=""), delimiter=delimiter)
    try:
        for line in reader:
            entry = f"{where}, line {reader.line_num}"
            if None in line or None in line.values():
                raise StoreError(f"{entry}: has more or fewer cells than the first line")
            if any(line.values()):
                yield entry, {name: _read_cell(name, line[name], entry) for name in line}
    except csv.Error as error:
        raise StoreError(f"{where}: is broken CSV ({error}); export it again") from error


def _read_cell(name: str, cell: str, entry: str) -> Any:
    """The value of a cell, as JSON would have it."""
    text = release_text(cell).replace("\r\n", "\n")
    if name in _LISTS:
        return [part.strip() for part in text.split(",") if part.strip()]
    if name in _FLAGS:
        if text.strip().lower() not in _TRUE + _FALSE:
            raise StoreError(f"{entry}: {name} must be true or false, got {text!r}")
        return text.strip().lower() in _TRUE
    if name == "class":
        return int(text) if text.strip().isdecimal() else text
    return text


def _check_line(store: PatchStore, line: dict[str, Any], entry: str) -> tuple[int, dict[str, Any]]:
    """Class and fields of one line, with rows for scan ids and tuples for lists."""
    unknown = [str(name) for name in line if name not in _COLUMNS]
    missing = [name for name in ("class", "reference") if name not in line]
    if unknown or missing:
        problem = f"unknown column {unknown[0]}" if unknown else f"column {missing[0]} is missing"
        raise StoreError(f"{entry}: {problem}; columns are {', '.join(_COLUMNS)}")
    label, reference = line["class"], line["reference"]
    check_class(label, store.num_classes, where=f"{entry}: {store.location}")
    if reference != _reference(store, label):
        raise StoreError(
            f"{entry}: class {label} has reference {reference}, but {_reference(store, label)} in"
            f" {store.location}: decisions of another store. Import them there"
        )
    fields = {name: line[name] for name in line if name not in ("class", "reference")}
    scans = fields.pop("excluded_members", [])
    check_note(fields, where=entry)
    if not isinstance(scans, list) or not all(isinstance(scan, str) for scan in scans):
        raise StoreError(f"{entry}: excluded_members must be a list of texts, got {scans!r}")
    if "tags" in fields:
        fields["tags"] = tuple(sorted(set(fields["tags"])))
    if "excluded_members" in line:
        fields["excluded_members"] = _find_members(store, label, scans, entry)
    if fields.get("excluded") and fields.get("kept"):
        raise StoreError(f"{entry}: class {label} is either kept or excluded; choose one")
    return label, fields


def _find_members(
    store: PatchStore, label: int, scans: Iterable[str], entry: str
) -> tuple[int, ...]:
    try:
        return tuple(sorted({find_member(store, label, scan) for scan in scans}))
    except StoreError as error:
        raise StoreError(f"{entry}: {error}") from error
