"""What a task is: its classes, its cases, and the split of each case."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from trainer.errors import TrainError

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
_MOST_BYTES: Final = 200
"""Of a case's name: a file system allows 255, suffixes included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One image with its label."""

    name: str
    """A plain file name, different for every case of the task."""
    patient: str
    """Cases of one patient are always in one split."""
    image: Path
    """A file, or a folder that holds one DICOM series."""
    channel: int | None = None
    """Channel to use of an image with several channels, from 0."""
    mask: Path | None = None
    """Segmentation: the class of each voxel, as a whole number, on the image's grid."""
    label: int = -1
    """Classification: the number of the class."""
    centre_mm: tuple[float, float, float] | None = None
    """Classification of a crop: its centre (x, y, z) in mm in the image's own frame (LPS). None
    classifies the whole image."""
    split: Split | None = None
    """None where the settings decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be learned."""

    name: str
    classes: tuple[str, ...]
    """Names by number; in segmentation, number 0 is the background."""
    segments: bool
    """True: segmentation, a class for each voxel. False: classification, a class for each case."""
    cases: tuple[Case, ...]
    intensity: str = "ct"
    """How values are mapped to 0..1 (see `FinetuneConfig.intensity`)."""
    channels: tuple[str, ...] = ()
    """Names of the images' channels, where there are several and none is chosen yet."""
    has_ignore: bool = False
    """Whether masks mark voxels to ignore: these count neither in the loss nor in any score."""

    @property
    def num_outputs(self) -> int:
        return count_outputs(self.classes)

    @property
    def ignored(self) -> int | None:
        """Label value of ignored voxels in masks, the first one after the classes; None for none.

        See `has_ignore`.
        """
        return len(self.classes) if self.has_ignore else None

    @property
    def num_labels(self) -> int:
        """How many different numbers a mask may hold."""
        return len(self.classes) + self.has_ignore

    @property
    def has_centres(self) -> bool:
        """Whether crops around given centres are classified, not whole images."""
        return any(case.centre_mm is not None for case in self.cases)

    @property
    def channel(self) -> int | None:
        """The channel used of every image; None where images differ in it or have only one."""
        found = {case.channel for case in self.cases}
        return found.pop() if len(found) == 1 else None


def count_outputs(classes: Sequence[str]) -> int:
    """Output channels of the net: one for two classes, else one for each class."""
    return 1 if len(classes) == 2 else len(classes)


def check_cases(name: str, cases: Sequence[Case]) -> None:
    """Check that cases have different names, one split for each patient, and existing files.

    Raises TrainError, which begins with `name`, where they have not, or where there are no cases.
    """
    if not cases:
        raise TrainError(f"{name}: has no cases; add at least one image with a mask or label")
    for case in cases:
        check_name(name, case.name)
    repeated = [case for case, count in Counter(case.name for case in cases).items() if count > 1]
    if repeated:
        raise TrainError(f"{name}: two cases are named {repeated[0]!r}; give each its own name")
    splits: dict[str, Split | None] = {}
    for case in cases:
        if splits.setdefault(case.patient, case.split) != case.split:
            raise TrainError(
                f"{name}: patient {case.patient!r} is in two splits; put all of a patient's cases"
                " in one"
            )
        for file in (case.image, case.mask):
            if file is not None and not file.exists():
                raise TrainError(f"{name}: {file} is missing; add the file or remove the case")


def check_name(where: str, name: str) -> None:
    """Raise TrainError unless a case's name is safe as a file name: it must not leave a folder."""
    plain = name.isprintable() and name[:1] not in {"", "."} and not {"/", "\\"} & set(name)
    if not plain or len(os.fsencode(name)) > _MOST_BYTES:
        raise TrainError(
            f"{where}: case {name!r}: the name of a case must be a plain file name of at most"
            f" {_MOST_BYTES} bytes that does not begin with a dot; give another one (in a manifest:"
            " column name)"
        )
