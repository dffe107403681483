"""Read a task from a folder in the layout of nnU-Net and the Medical Segmentation Decathlon.

That is `dataset.json`, `imagesTr`, `labelsTr`, and maybe `imagesTs`, `labelsTs`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.errors import TrainError
from trainer.finetuning.images import find_stem
from trainer.finetuning.task import Case, Split, Task, check_cases

DATASET = "dataset.json"
_IGNORE = "ignore"
_FIRST = "_0000"
"""Suffix of the files of the first channel, in nnU-Net."""


def read_folder(folder: Path) -> Task:
    """The segmentation task of a folder.

    Raises TrainError where `dataset.json` or images are missing or contradict each other.
    """
    described = folder / DATASET
    if not described.is_file():
        raise TrainError(
            f"{folder}: has no {DATASET}; give a folder in the layout of nnU-Net or of the"
            " Decathlon, or a CSV manifest"
        )
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
    cases = [
        *_list_cases(folder, ending, len(channels), "Tr", None),
        *_list_cases(folder, ending, len(channels), "Ts", "test"),
    ]
    if not cases:
        raise TrainError(f"{folder}: no images with labels in imagesTr and labelsTr")
    check_cases(str(folder), cases)
    return Task(
        name=folder.name,
        classes=names,
        segments=True,
        cases=tuple(cases),
        intensity=channel_intensity(channels[0]),
        channels=channels if len(channels) > 1 else (),
        has_ignore=has_ignore,
    )


def channel_intensity(channel: str) -> str:
    """How values of a channel of that name are mapped to 0..1."""
    return "ct" if channel.upper() == "CT" else "per-image"


def channel_file(case: Case, channel: int) -> Path:
    """The file of a channel, `NAME_0002.nii.gz`; the case's own file if it holds all channels."""
    first = f"{case.name}{_FIRST}"
    if not case.image.name.startswith(first):
        return case.image
    return case.image.with_name(f"{case.name}_{channel:04d}{case.image.name[len(first) :]}")


def _read_channels(about: dict[str, Any]) -> tuple[str, ...]:
    """The name of each channel in order, from {number: name}."""
    named = about.get("channel_names") or about.get("modality") or {"0": "CT"}
    return tuple(str(named[str(number)]) for number in range(len(named)))


def _read_names(labels: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Class names by number, from nnU-Net's {name: number} or the Decathlon's {number: name}.

    Also whether nnU-Net's label "ignore" comes after them.
    """
    if all(str(key).isdecimal() for key in labels):
        labels = {str(name): int(number) for number, name in labels.items()}
    if not all(isinstance(number, int) for number in labels.values()):
        raise ValueError("region-based labels (several numbers for one class) are not supported")
    named = {number: name for name, number in labels.items()}
    if sorted(named) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError("classes must be numbered 0, 1, ... without a gap")
    names = [named[number] for number in range(len(named))]
    has_ignore = _IGNORE in names
    if has_ignore and (names.pop() != _IGNORE or len(names) < 2):
        raise ValueError(f"{_IGNORE!r} must have the highest number, after at least two classes")
    return tuple(names), has_ignore


def _list_cases(
    folder: Path, ending: str, num_channels: int, which: str, split: Split | None
) -> list[Case]:
    """Cases that have a label, from imagesTr and labelsTr or imagesTs and labelsTs.

    ending
        Suffix of all files, as `dataset.json` gives it; "" where it gives none.
    """
    cases = []
    labels = folder / f"labels{which}"
    for mask in sorted(labels.iterdir()) if labels.is_dir() else []:
        name = find_stem(mask, (ending,)) if ending else find_stem(mask)
        if name is None or mask.name.startswith("."):
            continue
        suffix = mask.name[len(name) :]
        wanted = [folder / f"images{which}" / f"{name}{end}" for end in (_FIRST + suffix, suffix)]
        image = next((file for file in wanted if file.exists()), None)
        if image is None:
            raise TrainError(
                f"{folder}: {mask.name} has a label but no image {wanted[0].name} or"
                f" {wanted[1].name} in images{which}"
            )
        further = image.with_name(f"{name}_{num_channels:04d}{suffix}")
        if image == wanted[0] and further.exists():
            raise TrainError(
                f"{folder}: images{which} has {further.name}, but {DATASET} names"
                f" {num_channels} channels; name all of them in channel_names"
            )
        cases.append(Case(name=name, patient=name, image=image, mask=mask, split=split))
    return cases
