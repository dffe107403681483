"""Read a task, or images to predict on, from a CSV manifest with one line for each case."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple, get_args

from trainer.errors import TrainError
from trainer.finetuning.config import Intensity
from trainer.finetuning.images import find_stem
from trainer.finetuning.task import SPLITS, Case, Split, Task, check_cases, check_name

_CENTRE = ("x_mm", "y_mm", "z_mm")
_COLUMNS = {"name", "image", "mask", "label", "split", "patient", "channel", "intensity", *_CENTRE}


class _Line(NamedTuple):
    where: str
    """File and line, for messages."""
    cells: dict[str, str]


def read_manifest(file: Path) -> Task:
    """The task of a manifest: `image` and `mask` or `label`; other columns are optional.

    Raises TrainError naming the line that is wrong.
    """
    columns, lines = _read_lines(file)
    if "image" not in columns or len(columns & {"mask", "label"}) != 1 or columns - _COLUMNS:
        raise TrainError(
            f"{file}: needs columns image and one of mask and label, and may have"
            f" {', '.join(sorted(_COLUMNS - {'image', 'mask', 'label'}))};"
            f" got {', '.join(sorted(columns)) or 'none'}"
        )
    segments = "mask" in columns
    target = "mask" if segments else "label"
    for line in lines:
        if not line.cells["image"] or not line.cells[target]:
            raise TrainError(f"{line.where}: image or {target} is empty; fill in both")
    known: list[str] = []
    if not segments:
        known = sorted({line.cells["label"] for line in lines}, key=_by_number)
        if len(known) < 2:
            raise TrainError(f"{file}: needs at least two different labels; got {known}")
    num_lines = Counter(line.cells["image"] for line in lines)
    cases = [
        dataclasses.replace(
            _read_case(
                file, line, split=_read_split(line), shared=num_lines[line.cells["image"]] > 1
            ),
            mask=file.parent / line.cells["mask"] if segments else None,
            label=-1 if segments else known.index(line.cells["label"]),
        )
        for line in lines
    ]
    check_cases(str(file), cases)
    centred = [case.centre_mm is not None for case in cases]
    if any(centred) and segments:
        raise TrainError(
            f"{file}: {', '.join(_CENTRE)} are for labels, not for masks; remove these columns"
        )
    if any(centred) and not all(centred):
        raise TrainError(f"{file}: give {', '.join(_CENTRE)} on all lines, or on none")
    return Task(
        name=file.stem,
        classes=("background", "foreground") if segments else tuple(known),
        segments=segments,
        cases=tuple(cases),
        intensity=_read_intensity(file, lines),
    )


def read_centres(file: Path) -> list[Case]:
    """Crops to classify, given by their centres: a manifest as for training, without labels."""
    columns, lines = _read_lines(file)
    if not {"image", *_CENTRE} <= columns:
        raise TrainError(
            f"{file}: needs columns image, {', '.join(_CENTRE)}, and may have name and channel;"
            f" got {', '.join(sorted(columns)) or 'none'}"
        )
    if not lines:
        raise TrainError(f"{file}: has no lines after the header")
    cases = []
    for line in lines:
        if not line.cells["image"] or not line.cells["x_mm"]:
            raise TrainError(f"{line.where}: image or {', '.join(_CENTRE)} is empty; fill in all")
        cases.append(_read_case(file, line))
        if not cases[-1].image.exists():
            raise TrainError(f"{line.where}: {cases[-1].image} is missing")
    return cases


def _read_lines(file: Path) -> tuple[set[str], list[_Line]]:
    """The columns, and the lines after the header."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            lines = [
                _Line(
                    f"{file}: line {reader.line_num}",
                    {k: (v or "").strip() for k, v in cells.items() if k},
                )
                for cells in reader
            ]
            return set(reader.fieldnames or ()), lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainError(f"{file}: cannot be read as CSV ({type(error).__name__})") from error


def _read_case(
    file: Path, line: _Line, split: Split | None = None, *, shared: bool = False
) -> Case:
    """The case of a line, without mask and label.

    shared
        Other lines have this image, too: unless they name a patient, it is the image's.
    """
    where, cells = line
    image = file.parent / cells["image"]
    name = cells.get("name") or find_stem(image) or image.name
    check_name(where, name)
    channel = cells.get("channel") or None
    if channel is not None and not channel.isdecimal():
        raise TrainError(f"{where}: channel must be a whole number from 0, got {channel!r}")
    return Case(
        name=name,
        patient=cells.get("patient") or (cells["image"] if shared else name),
        image=image,
        channel=None if channel is None else int(channel),
        centre_mm=_read_centre(line),
        split=split,
    )


def _read_split(line: _Line) -> Split | None:
    text = line.cells.get("split", "")
    split = next((known for known in SPLITS if known == text), None)
    if text and split is None:
        raise TrainError(f"{line.where}: split must be one of {', '.join(SPLITS)}; got {text!r}")
    return split


def _read_centre(line: _Line) -> tuple[float, float, float] | None:
    given = [line.cells.get(name, "") for name in _CENTRE]
    if not any(given):
        return None
    try:
        x, y, z = (float(text) for text in given)
    except ValueError as error:
        raise TrainError(f"{line.where}: {', '.join(_CENTRE)} must be numbers") from error
    if not all(map(math.isfinite, (x, y, z))):
        raise TrainError(f"{line.where}: {', '.join(_CENTRE)} must be finite numbers")
    return (x, y, z)


def _read_intensity(file: Path, lines: list[_Line]) -> str:
    """The intensity given on all lines; "ct" where none is given."""
    found = sorted({line.cells.get("intensity", "") for line in lines})
    allowed = get_args(Intensity)[1:]
    if len(found) > 1:
        raise TrainError(f"{file}: intensity must be the same on all lines, got {found}")
    if found[0] and found[0] not in allowed:
        raise TrainError(f"{file}: intensity must be one of {', '.join(allowed)}, got {found[0]!r}")
    return found[0] or "ct"


def _by_number(text: str) -> tuple[float, str]:
    """Sort key: numbers in their order, then other text."""
    return (int(text), "") if text.isdecimal() else (float("inf"), text)
