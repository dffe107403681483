"""A task of the user's own: which images, which labels, whose they are.

Two layouts are read: the folder that nnU-Net and the Medical Segmentation Decathlon share
(`dataset.json`, `imagesTr`, `labelsTr`), and a CSV manifest.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from trainer.data.plan import draw_patients
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig, Intensity
from trainer.finetuning.images import ENDINGS, find_stem
from trainer.seeds import derive_seeds

SPLITS = ("train", "validation", "test")
_DATASET = "dataset.json"
_IGNORE = "ignore"
_CENTRE = ("x_mm", "y_mm", "z_mm")
_FIRST = "_0000"
"""Ending of nnU-Net's names for the first channel's files."""
_NO_PLAIN_NAME = "a case's name must be a plain file name that does not begin with a dot"
_COLUMNS = {"name", "image", "mask", "label", "split", "patient", "channel", "intensity", *_CENTRE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One image with its label."""

    name: str
    """Tells it from the task's other cases; a plain file name."""
    patient: str
    """Cases of one patient stay in one split."""
    image: Path
    """A file, or a folder that holds one DICOM series."""
    channel: int | None = None
    """Of an image that has several."""
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
    cases: tuple[Case, ...]
    intensity: str = "ct"
    """How values become 0 to 1 (see `FinetuneConfig.intensity`)."""
    channels: tuple[str, ...] = ()
    """What the images' channels show, where there are several and none is picked yet."""
    has_ignore: bool = False
    """Whether masks mark voxels that are neither learned from nor scored."""

    @property
    def num_outputs(self) -> int:
        return count_outputs(self.classes)

    @property
    def ignored(self) -> int | None:
        """The number of those voxels in masks: the one after the classes."""
        return len(self.classes) if self.has_ignore else None

    @property
    def num_labels(self) -> int:
        """Numbers that masks may hold."""
        return len(self.classes) + self.has_ignore

    @property
    def has_places(self) -> bool:
        """Whether crops around places are classified, not whole images."""
        return any(case.centre_mm is not None for case in self.cases)

    @property
    def channel(self) -> int | None:
        """The channel that is taken of every image, where it is the same."""
        found = {case.channel for case in self.cases}
        return found.pop() if len(found) == 1 else None


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


def fit_task(task: Task, config: FinetuneConfig) -> Task:
    """The task as the settings want it: one channel, and cases dealt out (see `deal_splits`).

    Raises TrainError for settings that this kind of task does not have.
    """
    if not task.segments:
        if "dice" in config.loss:
            raise TrainError(
                f"{task.name}: loss {config.loss!r} is for masks; to classify, leave loss out or"
                " give cross-entropy"
            )
        if config.spacing_mm is not None and not task.has_places:
            raise TrainError(
                f"{task.name}: whole images are classified, each resized to the shape of the net's"
                " input, so spacing has no meaning; leave it out"
            )
    return deal_splits(_pick_channel(task, config.channel), config)


def _pick_channel(task: Task, channel: int | None) -> Task:
    """The task with this channel of its images, where they have several."""
    names = task.channels
    if channel is None:
        if names:
            known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
            raise TrainError(
                f"{task.name}: images have {len(names)} channels ({known}) and the net takes one;"
                " give --channel"
            )
        return task
    if names and channel >= len(names):
        raise TrainError(f"{task.name}: channel must be below {len(names)}, got {channel}")
    cases = [
        dataclasses.replace(case, image=_channel_file(case, channel), channel=channel)
        if case.channel is None
        else case
        for case in task.cases
    ]
    intensity = _intensity_of(names[channel]) if names else task.intensity
    task = dataclasses.replace(task, cases=tuple(cases), intensity=intensity, channels=())
    check_cases(task.name, task.cases)
    return task


def _channel_file(case: Case, channel: int) -> Path:
    """nnU-Net's file of a channel, `NAME_0002.nii.gz`, from that of the first; or the file."""
    first = f"{case.name}{_FIRST}"
    if not case.image.name.startswith(first):
        return case.image
    return case.image.with_name(f"{case.name}_{channel:04d}{case.image.name[len(first) :]}")


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
    numbers = draw_patients(np.arange(len(patients)), config.label_fraction, config.split_seed)
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
    for case in cases:
        if not is_plain_name(case.name):
            raise TrainError(f"{name}: case {case.name!r}: {_NO_PLAIN_NAME}")
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


def is_plain_name(name: str) -> bool:
    """Whether files and folders may be called so: a name from outside never leads elsewhere."""
    return name.isprintable() and name[:1] not in {"", "."} and not {"/", "\\"} & set(name)


# A folder --------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Task:
    described = folder / _DATASET
    if not described.is_file():
        raise TrainError(f"{folder}: has no {_DATASET}, so it is no task; give a folder that has")
    try:
        about = json.loads(described.read_text("utf-8"))
        names, has_ignore = _read_names(about["labels"])
        channels = _read_channels(about)
        ending = str(about.get("file_ending") or "")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainError(
            f"{described}: cannot be read ({type(error).__name__}: {error});"
            ' it needs "labels" with a name and a number for each class, and channels numbered'
            " from 0"
        ) from error
    endings = (ending,) if ending else ENDINGS
    cases = [
        *_list_cases(folder, endings, len(channels), "Tr", None),
        *_list_cases(folder, endings, len(channels), "Ts", "test"),
    ]
    if not cases:
        raise TrainError(f"{folder}: no images with labels in imagesTr and labelsTr")
    check_cases(str(folder), cases)
    return Task(
        name=folder.name,
        classes=names,
        segments=True,
        cases=tuple(cases),
        intensity=_intensity_of(channels[0]),
        channels=channels if len(channels) > 1 else (),
        has_ignore=has_ignore,
    )


def _read_channels(about: dict[str, Any]) -> tuple[str, ...]:
    """What each channel shows, in order, from {number: name}."""
    named = about.get("channel_names") or about.get("modality") or {"0": "CT"}
    return tuple(str(named[str(number)]) for number in range(len(named)))


def _intensity_of(channel: str) -> str:
    return "ct" if channel.upper() == "CT" else "per-image"


def _read_names(labels: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Names by number, from nnU-Net's {name: number} or the Decathlon's {number: name}.

    And whether a label "ignore" comes after them, as nnU-Net has it.
    """
    if all(str(key).isdecimal() for key in labels):
        labels = {str(name): int(number) for number, name in labels.items()}
    if not all(isinstance(number, int) for number in labels.values()):
        raise ValueError("regions of several labels are not supported")
    named = {number: name for name, number in labels.items()}
    if sorted(named) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError("classes must be numbered 0, 1, ... without a gap")
    names = [named[number] for number in range(len(named))]
    has_ignore = _IGNORE in names
    if has_ignore and (names.pop() != _IGNORE or len(names) < 2):
        raise ValueError(f"{_IGNORE!r} must have the highest number, after two classes at least")
    return tuple(names), has_ignore


def _list_cases(
    folder: Path, endings: Sequence[str], num_channels: int, which: str, split: str | None
) -> list[Case]:
    """Cases that have a label, from imagesTr and labelsTr or imagesTs and labelsTs."""
    cases = []
    labels = folder / f"labels{which}"
    for mask in sorted(labels.iterdir()) if labels.is_dir() else []:
        name = find_stem(mask, endings)
        if name is None or mask.name.startswith("."):
            continue
        suffix = mask.name[len(name) :]
        places = [folder / f"images{which}" / f"{name}{end}" for end in (_FIRST + suffix, suffix)]
        image = next((place for place in places if place.exists()), None)
        if image is None:
            raise TrainError(
                f"{folder}: {mask.name} has a label but no image {places[0].name} or"
                f" {places[1].name} in images{which}"
            )
        further = image.with_name(f"{name}_{num_channels:04d}{suffix}")
        if image == places[0] and further.exists():
            raise TrainError(
                f"{folder}: images{which} has {further.name}, but {_DATASET} names"
                f" {num_channels} channels; name all of them in channel_names"
            )
        cases.append(Case(name=name, patient=name, image=image, mask=mask, split=split))
    return cases


# A manifest ------------------------------------------------------------------------------------


def read_places(file: Path) -> list[Case]:
    """Places in images, to classify: a manifest as for training, but labels are not needed."""
    columns, rows = _read_rows(file)
    if not {"image", *_CENTRE} <= columns:
        raise TrainError(
            f"{file}: needs columns image, {', '.join(_CENTRE)}, and may have name and channel;"
            f" got {', '.join(sorted(columns)) or 'none'}"
        )
    if not rows:
        raise TrainError(f"{file}: has no lines")
    cases = []
    for where, row in rows:
        if not row["image"] or not row["x_mm"]:
            raise TrainError(f"{where}: lacks an image or its place")
        cases.append(_read_case(file, where, row))
        if not cases[-1].image.exists():
            raise TrainError(f"{where}: {cases[-1].image} is missing")
    return cases


def _read_manifest(file: Path) -> Task:
    """`image` and `mask` or `label`; the other columns may be missing, or empty."""
    columns, rows = _read_rows(file)
    if "image" not in columns or len(columns & {"mask", "label"}) != 1 or columns - _COLUMNS:
        raise TrainError(
            f"{file}: needs columns image and one of mask and label, and may have"
            f" {', '.join(sorted(_COLUMNS - {'image', 'mask', 'label'}))};"
            f" got {', '.join(sorted(columns)) or 'none'}"
        )
    segments = "mask" in columns
    for where, row in rows:
        if not row["image"] or not row["mask" if segments else "label"]:
            raise TrainError(f"{where}: lacks an image or its label")
    known: list[str] = []
    if not segments:
        known = sorted({row["label"] for _, row in rows}, key=_by_number)
        if len(known) < 2:
            raise TrainError(f"{file}: labels must differ; got {known}")
    cases = [
        dataclasses.replace(
            _read_case(file, where, row),
            mask=file.parent / row["mask"] if segments else None,
            label=-1 if segments else known.index(row["label"]),
        )
        for where, row in rows
    ]
    check_cases(str(file), cases)
    placed = [case.centre_mm is not None for case in cases]
    if any(placed) and (segments or not all(placed)):
        raise TrainError(
            f"{file}: {', '.join(_CENTRE)} are places to classify: give all lines of a manifest of"
            " labels one, or none"
        )
    return Task(
        name=file.stem,
        classes=("background", "foreground") if segments else tuple(known),
        segments=segments,
        cases=tuple(cases),
        intensity=_read_intensity(file, rows),
    )


def _read_rows(file: Path) -> tuple[set[str], list[tuple[str, dict[str, str]]]]:
    """Columns, and lines with where they stand."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [
                (
                    f"{file}: line {reader.line_num}",
                    {k: (v or "").strip() for k, v in row.items() if k},
                )
                for row in reader
            ]
            return set(reader.fieldnames or ()), rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainError(f"{file}: cannot be read as CSV ({type(error).__name__})") from error


def _read_case(file: Path, where: str, row: dict[str, str]) -> Case:
    """A line without what is to be learned of it."""
    image = file.parent / row["image"]
    name = row.get("name") or find_stem(image) or image.name
    if not is_plain_name(name):
        raise TrainError(f"{where}: {name!r}: {_NO_PLAIN_NAME}; give it one in the column name")
    channel = row.get("channel") or None
    if channel is not None and not channel.isdecimal():
        raise TrainError(f"{where}: channel must be a whole number from 0, got {channel!r}")
    return Case(
        name=name,
        patient=row.get("patient") or name,
        image=image,
        channel=None if channel is None else int(channel),
        centre_mm=_read_centre(where, row),
        split=row.get("split") or None,
    )


def _read_centre(where: str, row: dict[str, str]) -> tuple[float, float, float] | None:
    given = [row.get(name, "") for name in _CENTRE]
    if not any(given):
        return None
    try:
        x, y, z = (float(text) for text in given)
    except ValueError as error:
        raise TrainError(f"{where}: {', '.join(_CENTRE)} must be numbers") from error
    if not all(map(math.isfinite, (x, y, z))):
        raise TrainError(f"{where}: {', '.join(_CENTRE)} must be finite numbers")
    return (x, y, z)


def _read_intensity(file: Path, rows: Iterable[tuple[str, dict[str, str]]]) -> str:
    """What all lines say of it; CT where none does."""
    found = sorted({row.get("intensity", "") for _, row in rows})
    allowed = get_args(Intensity)[1:]
    if len(found) > 1:
        raise TrainError(f"{file}: intensity must be the same on all lines, got {found}")
    if found[0] and found[0] not in allowed:
        raise TrainError(f"{file}: intensity must be one of {', '.join(allowed)}, got {found[0]!r}")
    return found[0] or "ct"


def _by_number(text: str) -> tuple[float, str]:
    return (int(text), "") if text.isdecimal() else (float("inf"), text)
