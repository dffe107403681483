"""Answers of a fine-tuned run about new images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from store.csvfile import write_csv
from trainer.checkpoint import BEST, load_checkpoint
from trainer.device import autocast, pick_device, set_precision
from trainer.errors import TrainError
from trainer.finetuning.cases import Grid
from trainer.finetuning.images import ENDINGS, find_stem, write_image
from trainer.finetuning.inference import classify, segment
from trainer.finetuning.starts import rebuild
from trainer.finetuning.task import Case, count_outputs, read_places
from trainer.ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What a fine-tuned run's checkpoint says of its task."""

    path: Path
    kind: str
    classes: tuple[str, ...]
    segments: bool
    grid: Grid
    places: bool
    """Whether it classifies places in images."""
    channel: int | None
    overlap: float
    precision: str


def predict(
    run_path: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    overlap: float | None = None,
    channel: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Name the voxels of images, or the images themselves; returns the files written.

    source
        An image, a folder of one DICOM series, or a folder of images. For a run that was trained
        on places a CSV file with columns image, x_mm, y_mm, z_mm, as its manifest.
    out
        Segmenting: a file for one image, a folder for several; masks have the geometry of the
        image. Classifying: a CSV file with the probability of each class.
    overlap
        Of windows that slide over a whole image; None: as the run was tested.
    channel
        Of images that have several, also as files NAME_0000, NAME_0001, ...; None: the run's.

    Raises TrainError when the run is no fine-tuned one, an image cannot be read, or a file would
    be written over an image or another answer.
    """
    source, out = Path(source), Path(out)
    run, weights = _open_run(Path(run_path))
    overlap = run.overlap if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise TrainError(f"overlap must be in [0, 1), got {overlap}")
    cases = _list_cases(run, source, run.channel if channel is None else channel)
    plan = _plan_masks if run.segments else _plan_table
    targets = plan(cases, source, out)

    where = pick_device(device, Ranks())
    set_precision(run.precision)
    net = rebuild(run.kind, weights, outputs=count_outputs(run.classes), segments=run.segments)
    net.to(where)
    context = autocast(run.precision, where)

    @lru_cache(maxsize=1)  # several places of one image
    def read(path: Path, number: int | None) -> sitk.Image:
        return run.grid.read(path, number)

    rows: list[list[object]] = []
    for done, case in enumerate(cases, 1):
        image = read(case.image, case.channel)
        if run.segments:
            mask = segment(net, image, run.grid, overlap=overlap, device=where, autocast=context)
            write_image(mask, targets[done - 1])
        else:
            brought = run.grid.bring(image, centre_mm=case.centre_mm)
            values = torch.from_numpy(np.asarray(run.grid.to_unit(brought)))[None, None]
            found = classify(net, values, device=where, autocast=context)[0]
            rows.append([*_describe(case), *found.tolist()])
        progress(done, len(cases))
    if not run.segments:
        header = ["name", "image", "x_mm", "y_mm", "z_mm"] if run.places else ["image"]
        partial = out.with_name(f".partial-{out.name}")
        with partial.open("w", newline="", encoding="utf-8") as stream:
            write_csv(stream, [*header, *run.classes], rows)
        partial.replace(out)
    return targets


def _open_run(path: Path) -> tuple[_Run, dict[str, torch.Tensor]]:
    """What a run says of its task, and its best weights."""
    if not (path / BEST).exists():
        raise TrainError(f"{path}: no fine-tuned run; make one with `semgen finetune`")
    saved = load_checkpoint(path / BEST)
    if "task" not in saved:
        raise TrainError(f"{path}: pretrained, not fine-tuned; run `semgen finetune` from it")
    task: dict[str, Any] = saved["task"]
    config: dict[str, Any] = saved["config"]
    run = _Run(
        path=path,
        kind=task["kind"],
        classes=tuple(task["classes"]),
        segments=task["segments"],
        grid=Grid.from_dict(task["grid"]),
        places=task.get("places", False),  # older versions do not say
        channel=task.get("channel"),
        overlap=config["overlap"],
        precision=config["precision"],
    )
    return run, saved["model"]


# What is asked ----------------------------------------------------------------------------------


def _list_cases(run: _Run, source: Path, channel: int | None) -> list[Case]:
    """The images, or places in images, with the names of their answers."""
    if not source.exists():
        raise TrainError(f"{source}: no such image or folder")
    is_table = source.is_file() and source.suffix.lower() == ".csv"
    if run.places != is_table:
        raise TrainError(
            f"{run.path}: was trained on places in images; give a CSV file with columns image,"
            f" x_mm, y_mm, z_mm instead of {source}"
            if run.places
            else f"{run.path}: was not trained on places in images; give an image or a folder"
            f" instead of {source}"
        )
    if is_table:
        return [
            Case(name=case.name, patient=case.patient, image=case.image, centre_mm=case.centre_mm,
                 channel=channel if case.channel is None else case.channel)
            for case in read_places(source)
        ]  # fmt: skip
    images = [source]
    if source.is_dir():
        found = sorted(p for p in source.glob("[!.]*") if p.name.endswith(ENDINGS))
        images = _take_channel(found, channel) or [source]  # a DICOM series
    names = [_name_answer(image, channel) for image in images]
    return [
        Case(name=name, patient=name, image=image, channel=channel)
        for name, image in zip(names, images, strict=True)
    ]


def _take_channel(images: Sequence[Path], channel: int | None) -> list[Path]:
    """Of NAME_0000, NAME_0001, ... the files of that channel, where one is asked for."""
    if channel is None:
        return list(images)
    families: dict[str, dict[str, Path]] = defaultdict(dict)
    for image in images:
        stem = find_stem(image) or image.name
        families[re.sub(r"_\d{4}$", "", stem)][stem] = image
    taken: list[Path] = []
    for name, family in families.items():
        mine = f"{name}_{channel:04d}"
        if f"{name}_0000" not in family:
            taken += family.values()
        elif mine in family:
            taken.append(family[mine])
        else:
            raise TrainError(f"{family[f'{name}_0000']}: there is no {mine} beside it")
    return sorted(taken)


def _name_answer(image: Path, channel: int | None) -> str:
    """The image's name, without nnU-Net's mark of the channel."""
    stem = find_stem(image) or image.name
    return stem.removesuffix(f"_{channel or 0:04d}") or stem


def _describe(case: Case) -> list[object]:
    """The first cells of an answer's line."""
    if case.centre_mm is None:
        return [case.image.name]
    return [case.name, case.image.name, *case.centre_mm]


# Where answers go -------------------------------------------------------------------------------


def _plan_masks(cases: Sequence[Case], source: Path, out: Path) -> list[Path]:
    """The mask of each image; TrainError where one would be lost."""
    several = [case.image for case in cases] != [source]
    if not several and not out.name.endswith(ENDINGS):
        raise TrainError(f"{out}: a mask's name must end in {', '.join(ENDINGS)}")
    if several and out.exists() and not out.is_dir():
        raise TrainError(f"{out}: is a file; give a folder for the masks of {len(cases)} images")
    targets = [out / f"{case.name}.nii.gz" for case in cases] if several else [out]
    askers: dict[Path, list[str]] = defaultdict(list)
    for case, target in zip(cases, targets, strict=True):
        askers[target].append(case.image.name)
    for target, names in askers.items():
        if len(names) > 1:
            raise TrainError(
                f"{target.name}: would be the mask of {', '.join(names)}; rename all but one of"
                " them, or give them apart"
            )
    _refuse_inputs(cases, source, targets)
    folder = out if several else out.parent
    if source.is_dir() and folder.resolve() == source.resolve():
        raise TrainError(f"{out}: masks would lie among the images; give another folder")
    return targets


def _plan_table(cases: Sequence[Case], source: Path, out: Path) -> list[Path]:
    """The table, its folder made."""
    if out.suffix.lower() != ".csv" or out.is_dir():
        raise TrainError(f"{out}: probabilities are written as CSV; give a file that ends in .csv")
    _refuse_inputs(cases, source, [out])
    out.parent.mkdir(parents=True, exist_ok=True)
    return [out]


def _refuse_inputs(cases: Sequence[Case], source: Path, targets: Sequence[Path]) -> None:
    """Raise TrainError where a file to be written is one to be read, by whatever name."""
    inputs = {_identity(path): path for path in (source, *(case.image for case in cases))}
    for target in targets:
        if target.exists() and _identity(target) in inputs:
            raise TrainError(
                f"{target}: would be written over the input {inputs[_identity(target)].name};"
                " give another file or folder"
            )


def _identity(file: Path) -> tuple[int, int]:
    """What all names of a file have in common, links too."""
    facts = file.stat()
    return facts.st_dev, facts.st_ino
