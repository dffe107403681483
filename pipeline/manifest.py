"""A table that says which series to use, whose they are, and for which split."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from pipeline.archive import Series, person_key
from pipeline.catalogue import NOT_LISTED
from store.errors import SemgenError

_COLUMNS: Final = ("path", "patient", "split")
_SPLITS: Final = {"": None, "train": 0, "validation": 1}


class ManifestError(SemgenError):
    """The manifest cannot be used; the message names the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    patient: str
    split: int | None


class Manifest:
    """A CSV file with a header line and any of the columns `path`, `patient`, `split`.

    path
        A file, or a folder with all series below it; absolute, or relative to the manifest, to an
        archive or to the working folder. With this column only listed series are used, and all of
        them, however many a study has.
    patient
        Tells persons apart, instead of the DICOM PatientID. Without `path`, it is the PatientID
        of the scans that the line is about.
    split
        "train", "validation", or empty for a draw. A person's scans must agree.
    """

    def __init__(self, file: Path, archive: Sequence[Path]) -> None:
        """Read it; ManifestError names the first line that cannot be right."""
        self._by_path: dict[Path, _Entry] = {}
        self._by_patient: dict[str, _Entry] = {}
        places = [file.absolute().parent, *(path.absolute() for path in archive), Path.cwd()]
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines, skipinitialspace=True, strict=True)
                self.columns = tuple(reader.fieldnames or ())
                if not {"path", "patient"} & set(self.columns) or set(self.columns) - {*_COLUMNS}:
                    raise ManifestError(
                        f"{file}: the first line must name columns among path, patient and split,"
                        " path or patient at least"
                    )
                for row in reader:
                    self._add(row, places, f"{file}, line {reader.line_num}")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ManifestError(f"{file}: not a CSV file in UTF-8 ({error})") from error

    def _add(self, row: dict[str, str | None], places: Sequence[Path], where: str) -> None:
        path, patient, split = ((row.get(name) or "").strip() for name in _COLUMNS)
        if split not in _SPLITS:
            raise ManifestError(f"{where}: split must be train, validation or empty, got {split!r}")
        entry = _Entry(patient, _SPLITS[split])
        if patient:
            known = self._by_patient.setdefault(person_key(patient), entry)
            if known.split != entry.split:
                raise ManifestError(f"{where}: a person's scans must all have the same split")
        if "path" in self.columns:
            found = next(
                (place / path for place in places if path and (place / path).exists()), None
            )
            if found is None:
                raise ManifestError(f"{where}: no such file or folder: {path or '(empty)'}")
            self._by_path[found.resolve()] = entry
        elif not patient:
            raise ManifestError(f"{where}: patient is empty")

    def apply(self, found: Iterable[Series]) -> list[Series]:
        """The series with what the manifest says of them; those it leaves out are rejected."""
        return [self._apply(series) for series in found]

    def _apply(self, series: Series) -> Series:
        if "path" not in self.columns:
            known = self._by_patient.get(series.patient)
            return dataclasses.replace(series, split=known.split) if known else series
        file = Path(series.files[0]).resolve()
        entry = next(
            (self._by_path[place] for place in (file, *file.parents) if place in self._by_path),
            None,
        )
        if entry is None:
            return dataclasses.replace(series, reason=NOT_LISTED, detail="")
        return dataclasses.replace(
            series,
            study=series.key,  # a study of its own: what is listed is taken
            patient=person_key(entry.patient) if entry.patient else series.patient,
            split=entry.split,
        )
