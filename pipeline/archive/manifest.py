"""A CSV file that lists which series to use, their patients and their splits."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pipeline.archive.series import JOINED, NOT_LISTED, Series, patient_key
from store.errors import SemgenError

_COLUMNS: Final = ("path", "patient", "split")
NO_SERIES: Final = "manifest line without a series"
_SPLITS: Final = {"": None, "train": 0, "validation": 1}


class ManifestError(SemgenError):
    """The manifest cannot be used; the message names the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """One line; two lines with the same patient and split are equal."""

    patient: str
    split: int | None
    line: int = dataclasses.field(compare=False)


class Manifest:
    """A CSV file with a header line and any of the columns `path`, `patient`, `split`.

    path
        A file, or a folder with all series below it; absolute, or relative to the manifest, to an
        archive or to the working folder. With this column only listed series are used, and all of
        them, however many a study has. Any file of a DICOM series stands for all of the series; of
        several lines that match a file, the one with the longest path counts.
    patient
        Replaces the DICOM PatientID. Without `path`, the PatientID of the scans that the line
        applies to.
    split
        "train", "validation", or empty for a random draw. The same for all scans of a patient.
    """

    def __init__(self, file: Path, archive: Sequence[Path]) -> None:
        """Read it; ManifestError names the first wrong line."""
        self.file = file
        self._unused: dict[int, str] = {}  # a path by line, until a series is found for it
        self._by_path: dict[Path, _Entry] = {}
        self._by_patient: dict[str, _Entry] = {}
        roots = [file.absolute().parent, *(path.absolute() for path in archive), Path.cwd()]
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines, skipinitialspace=True, strict=True)
                self.columns = tuple(reader.fieldnames or ())
                if not {"path", "patient"} & set(self.columns) or set(self.columns) - {*_COLUMNS}:
                    raise ManifestError(
                        f"{file}: the header needs path or patient; allowed: path, patient, split"
                    )
                for row in reader:
                    self._add(row, roots, reader.line_num)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"{file}: not a CSV file in UTF-8 ({error})") from error

    def _add(self, row: dict[str, str | None], roots: Sequence[Path], line: int) -> None:
        where = f"{self.file}, line {line}"
        path, patient, split = ((row.get(name) or "").strip() for name in _COLUMNS)
        if split not in _SPLITS:
            raise ManifestError(f"{where}: split must be train, validation or empty, got {split!r}")
        entry = _Entry(patient, _SPLITS[split], line)
        if patient:
            known = self._by_patient.setdefault(patient_key(patient), entry)
            if known.split != entry.split:
                raise ManifestError(
                    f"{where}: all scans of a patient must have the same split; line {known.line}"
                    " has another one"
                )
        if "path" in self.columns:
            target = next((root / path for root in roots if path and (root / path).exists()), None)
            if target is None:
                raise ManifestError(f"{where}: no such file or folder: {path or '(empty)'}")
            known = self._by_path.setdefault(_resolve(target), entry)
            if known != entry:
                raise ManifestError(
                    f"{where}: this path is in line {known.line}, too, with another patient or"
                    " split; keep one of the two"
                )
        elif not patient:
            raise ManifestError(f"{where}: patient is empty")
        if known is entry:
            self._unused[line] = str(target) if "path" in self.columns else str(self.file)

    def apply(self, series: Iterable[Series]) -> list[Series]:
        """The series with their patients and splits; those that are not listed are rejected.

        Raises ManifestError where two lines that match one series disagree.
        """
        return [self._apply(one) for one in series]

    def unused(self) -> list[Series]:
        """After all were applied: a rejected entry for each line without a series."""
        return [
            Series(
                key=f"manifest line {line}",
                kind="file",
                files=(path,),
                patient="",
                reason=NO_SERIES,
                detail=f"line {line}",
            )
            for line, path in self._unused.items()
        ]

    def _apply(self, series: Series) -> Series:
        if "path" not in self.columns:
            known = self._by_patient.get(series.patient)
            if known is None:
                return series
            self._unused.pop(known.line, None)
            return dataclasses.replace(series, split=known.split)
        entry = self._listed(series)
        if entry is None:
            return dataclasses.replace(series, reason=NOT_LISTED, detail="")
        return dataclasses.replace(
            series,
            study=series.key,  # a study of its own: every listed series is used
            patient=patient_key(entry.patient) if entry.patient else series.patient,
            split=entry.split,
        )

    def _listed(self, series: Series) -> _Entry | None:
        """The line that applies: of one of the series' files, else of the closest parent folder."""
        files = [Path(file) for file in series.files]
        resolved = {folder: _resolve(folder) for folder in {file.parent for file in files}}
        paths = {resolved[file.parent] / file.name for file in files}
        paths |= {_resolve(file) for file in files if file.is_symlink()}
        nearest: set[_Entry] = set()
        while paths:
            entries = [self._by_path[path] for path in paths if path in self._by_path]
            for entry in entries:
                self._unused.pop(entry.line, None)
            nearest = nearest or set(entries)
            paths = {path.parent for path in paths if path != path.parent}
        if len(nearest) > 1:
            lines = " and ".join(str(line) for line in sorted(entry.line for entry in nearest))
            raise ManifestError(
                f"{self.file}, lines {lines}: files of one series have different"
                " patients or splits; keep one of the lines"
            )
        return nearest.pop() if nearest else None


def _resolve(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself


def select_parts(parts: Sequence[Series], joined: Sequence[Series]) -> list[Series]:
    """The entries of the catalogue to replace after `join_parts` turned `parts` into `joined`.

    A part that the manifest does not list, but that the listed ones need, gets their patient.
    Raises ManifestError where the parts are listed for both splits.
    """
    if list(parts) == list(joined):
        return []
    if len({part.split for part in parts} - {None}) > 1:
        raise ManifestError(
            "one DICOM series lies in several folders, and the manifest gives them different"
            " splits; give all of them the same split"
        )
    first = joined[0]
    return [
        dataclasses.replace(one, patient=first.patient) if part.reason == NOT_LISTED else one
        for part, one in zip(parts, joined, strict=True)
        if part.reason != NOT_LISTED or one.reason == JOINED
    ]
