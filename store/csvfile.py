"""CSV files that are safe to open in a spreadsheet: text is never computed as a formula."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from store.atomic import replace_file

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that a spreadsheet computes as a formula."""


def write_csv(stream: TextIO, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a header and rows; text that looks like a formula gets an apostrophe before it.

    Numbers stay numbers, also numbers given as text; lists are joined with commas.

    >>> import sys
    >>> write_csv(sys.stdout, ["name", "score"], [["=1+1", -0.5], ["-0.5", 2]])
    name,score
    '=1+1,-0.5
    -0.5,2
    """
    writer = csv.writer(stream, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([_as_text(cell) for cell in row])


def write_csv_file(
    file: Path, header: Iterable[str], rows: Iterable[Iterable[object]], *, shared: bool = False
) -> None:
    """Replace a CSV file; see `write_csv`, and `replace_file` for `shared`."""
    with (
        replace_file(file, shared=shared) as partial,
        partial.open("w", newline="", encoding="utf-8") as stream,
    ):
        write_csv(stream, header, rows)


def hold_text(text: str) -> str:
    """A text with an apostrophe before it if a spreadsheet would change it: a formula or a number.

    `release_text` gives the text again.

    >>> hold_text("=1+1"), hold_text("00e12"), hold_text("left lung")
    ("'=1+1", "'00e12", 'left lung')
    """
    return "'" + text if text.startswith((*_FORMULA, "'")) or _is_number(text) else text


def release_text(cell: str) -> str:
    """The text of a cell that `hold_text` made; other cells stay as they are."""
    return cell[1:] if cell.startswith("'") and hold_text(cell[1:]) == cell else cell


def _as_text(cell: object) -> object:
    if isinstance(cell, list):
        cell = ",".join(map(str, cell))
    if isinstance(cell, str) and cell.startswith(_FORMULA) and not _is_number(cell):
        return "'" + cell
    return cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
