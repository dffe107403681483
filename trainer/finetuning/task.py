"""A task of the user's own: which images, which labels, whose they are.

Two layouts are read: the folder that nnU-Net and the Medical Segmentation Decathlon share
(`dataset.json`, `imagesTr`, `labelsTr`), and a CSV manifest.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.images import ENDINGS, find_stem
from trainer.plan import derive_seeds, draw_persons

SPLITS = ("train", "validation", "test")
_DATASET = "dataset.json"
_CENTRE = ("x_mm", "y_mm", "z_mm")
_COLUMNS = {"name", "image", "mask", "label", "split", "patient", "channel", "intensity", *_CENTRE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One image with its label."""

    name: str
    """Tells it from the task's other cases."""
    patient: str
    """Cases of one patient stay in one split."""
    image: Path
    """A file, or a folder that holds one DICOM series."""
    channel: int = 0
    """Of a 4-D image."""
    mask: Path | None = None
    """To segment: whole numbers on the image's grid."""
    label: int = -1
    """To classify."""
    centre_mm: tuple[float, float, float] | None = None
    """x, y, z in the image's own frame (LPS): a crop around it is classified, not all."""
    split: str | None = None
    """"train", "validation", "test", or None where that is left to the settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be learned."""

    name: str
    classes: tuple[str, ...]
    """Names by number; to segment, the first is the background."""
    segments: bool
    """Whether voxels are named, or images."""
    is_ct: bool
    cases: tuple[Case, ...]

    @property
    def num_outputs(self) -> int:
        return count_outputs(self.classes)


def count_outputs(classes: Sequence[str]) -> int:
    """Channels of the net's answer: one where there are two classes."""
    return 1 if len(classes) == 2 else len(classes)


def load_task(path: Path) -> Task:
    """Read a task from a folder or a manifest.

    Raises TrainError that says what is missing or contradicts itself, and where.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_manifest(path)
    raise TrainError(f"{path}: no such task; give a folder with {_DATASET}, or a CSV manifest")


def deal_splits(task: Task, config: FinetuneConfig) -> Task:
    """The task with a split for every case, by patients, and with the wanted share of labels.

    Patients that the task itself deals out stay there. Of the others, `split_seed` decides.
    """
    open_patients = sorted({case.patient for case in task.cases if case.split is None})
    order = np.random.default_rng(derive_seeds(config.split_seed, "split")).permutation(
        len(open_patients)
    )
    shuffled = [open_patients[i] for i in order]
    given = {case.split for case in task.cases}
    test: set[str] = set()
    if config.folds is not None:
        if config.folds > len(shuffled):
            raise TrainError(
                f"{task.name}: {len(shuffled)} patients make no {config.folds} folds; give fewer"
            )
        test = set(shuffled[config.fold :: config.folds])
    elif "test" not in given:
        test = set(shuffled[: _share(config.test_fraction, len(shuffled))])
    rest = [patient for patient in shuffled if patient not in test]
    validation: set[str] = set()
    if "validation" not in given:
        validation = set(rest[: _share(config.validation_fraction, len(rest))])
    drawn = {
        patient: "test" if patient in test else "validation" if patient in validation else "train"
        for patient in open_patients
    }
    cases = [
        dataclasses.replace(case, split=case.split or drawn[case.patient]) for case in task.cases
    ]
    patients = sorted({case.patient for case in cases if case.split == "train"})
    if not patients:
        raise TrainError(f"{task.name}: no patient is left to train on; lower the other splits")
    numbers = draw_persons(np.arange(len(patients)), config.label_fraction, config.split_seed)
    kept = {patients[number] for number in numbers.tolist()}
    cases = [case for case in cases if case.split != "train" or case.patient in kept]
    return dataclasses.replace(task, cases=tuple(cases))


def _share(fraction: float, total: int) -> int:
    """A share of the patients: one at least, where any is wanted and one is left for others."""
    return min(max(1, round(fraction * total)), total - 1) if fraction and total > 1 else 0


def check_cases(name: str, cases: Sequence[Case]) -> None:
    """Raise TrainError where cases contradict each other or there are none."""
    if not cases:
        raise TrainError(f"{name}: has no cases")
    twice = [case for case, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise TrainError(f"{name}: {twice[0]!r} is there twice; give every case a name of its own")
    strange = {case.split for case in cases} - {*SPLITS, None}
    if strange:
        raise TrainError(f"{name}: split must be one of {', '.join(SPLITS)}; got {strange.pop()!r}")
    splits: dict[str, str | None] = {}
    for case in cases:
        if splits.setdefault(case.patient, case.split) != case.split:
            raise TrainError(f"{name}: patient {case.patient!r} is in two splits; keep each in one")
        for file in (case.image, case.mask):
            if file is not None and not file.exists():
                raise TrainError(f"{name}: {file} is missing; put it there or drop the case")


# A folder --------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Task:
    described = folder / _DATASET
    if not described.is_file():
        raise TrainError(f"{folder}: has no {_DATASET}, so it is no task; give a folder that has")
    try:
        about = json.loads(described.read_text("utf-8"))
        names = _read_names(about["labels"])
        channels = about.get("channel_names") or about.get("modality") or {}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainError(
            f"{described}: cannot be read ({type(error).__name__}: {error});"
            ' it needs "labels" with a name and a number for each class'
        ) from error
    cases = _list_cases(folder, about, "Tr", None) + _list_cases(folder, about, "Ts", "test")
    if not cases:
        raise TrainError(f"{folder}: no images with labels in imagesTr and labelsTr")
    check_cases(str(folder), cases)
    return Task(
        name=folder.name,
        classes=names,
        segments=True,
        is_ct=str(channels.get("0", "CT")).upper() == "CT",
        cases=tuple(cases),
    )


def _read_names(labels: dict[str, Any]) -> tuple[str, ...]:
    """Names by number, from nnU-Net's {name: number} or the Decathlon's {number: name}."""
    if all(str(key).isdecimal() for key in labels):
        labels = {str(name): int(number) for number, name in labels.items()}
    if not all(isinstance(number, int) for number in labels.values()):
        raise ValueError("regions of several labels are not supported")
    named = {number: name for name, number in labels.items()}
    if sorted(named) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError("classes must be numbered 0, 1, ... without a gap")
    return tuple(named[number] for number in range(len(named)))


def _list_cases(folder: Path, about: dict[str, Any], which: str, split: str | None) -> list[Case]:
    """Cases that have a label, from imagesTr and labelsTr or imagesTs and labelsTs."""
    ending = about.get("file_ending")
    cases = []
    labels = folder / f"labels{which}"
    for mask in sorted(labels.iterdir()) if labels.is_dir() else []:
        name = find_stem(mask, (ending,) if ending else ENDINGS)
        if name is None or name.startswith("."):
            continue
        suffix = mask.name[len(name) :]
        places = [folder / f"images{which}" / f"{name}{end}" for end in ("_0000" + suffix, suffix)]
        image = next((place for place in places if place.exists()), None)
        if image is None:
            raise TrainError(
                f"{folder}: {mask.name} has a label but no image {places[0].name} or"
                f" {places[1].name} in images{which}"
            )
        cases.append(Case(name=name, patient=name, image=image, mask=mask, split=split))
    return cases


# A manifest ------------------------------------------------------------------------------------


def _read_manifest(file: Path) -> Task:
    """`image` and `mask` or `label`; the other columns may be missing, or empty."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
            columns = set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainError(f"{file}: cannot be read as CSV ({type(error).__name__})") from error
    if "image" not in columns or len(columns & {"mask", "label"}) != 1 or columns - _COLUMNS:
        raise TrainError(
            f"{file}: needs columns image and one of mask and label, and may have"
            f" {', '.join(sorted(_COLUMNS - {'image', 'mask', 'label'}))};"
            f" got {', '.join(sorted(columns)) or 'none'}"
        )
    segments = "mask" in columns
    known: list[str] = []
    if not segments:
        known = sorted({row["label"] for row in rows}, key=_by_number)
        if len(known) < 2:
            raise TrainError(f"{file}: labels must differ; got {known}")
    cases = []
    for number, row in enumerate(rows, 2):
        if not row["image"] or not row["mask" if segments else "label"]:
            raise TrainError(f"{file}: line {number} lacks an image or its label")
        image = file.parent / row["image"]
        name = row.get("name") or find_stem(image) or image.name
        name = re.sub(r"[^\w.-]", "_", name)
        cases.append(
            Case(
                name=name,
                patient=row.get("patient") or name,
                image=image,
                channel=int(row.get("channel") or 0),
                mask=file.parent / row["mask"] if segments else None,
                label=-1 if segments else known.index(row["label"]),
                centre_mm=_read_centre(file, number, row),
                split=row.get("split") or None,
            )
        )
    check_cases(str(file), cases)
    classes = ("background", "foreground") if segments else tuple(known)
    return Task(name=file.stem, classes=classes, segments=segments, is_ct=True, cases=tuple(cases))


def _read_centre(file: Path, line: int, row: dict[str, str]) -> tuple[float, float, float] | None:
    given = [row.get(name, "") for name in _CENTRE]
    if not any(given):
        return None
    try:
        x, y, z = (float(text) for text in given)
    except ValueError as error:
        raise TrainError(f"{file}: line {line}: {', '.join(_CENTRE)} must be numbers") from error
    return (x, y, z)


def _by_number(text: str) -> tuple[float, str]:
    return (int(text), "") if text.isdecimal() else (float("inf"), text)
