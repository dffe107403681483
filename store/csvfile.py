"""CSV files that people open in a spreadsheet: text stays text there, and is never computed."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import TextIO

_COMPUTED = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that a spreadsheet takes for a formula."""


def write_csv(stream: TextIO, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a header and rows; text that a spreadsheet would compute gets an apostrophe before it.

    Numbers stay numbers, those that are given as text too.

    >>> import sys
    >>> write_csv(sys.stdout, ["name", "score"], [["=1+1", -0.5], ["-0.5", 2]])
    name,score
    '=1+1,-0.5
    -0.5,2
    """
    writer = csv.writer(stream, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([_as_text(cell) for cell in row])


def _as_text(cell: object) -> object:
    if isinstance(cell, str) and cell.startswith(_COMPUTED) and not _is_number(cell):
        return "'" + cell
    return cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
