"""Predict on new images with a fine-tuned run: masks, or a table of probabilities."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from store.csvfile import write_csv_file
from store.errors import check_local
from store.progress import SILENT, Progress
from trainer.checkpoint import BEST, load_checkpoint
from trainer.device import autocast, pick_device, set_precision
from trainer.errors import SettingError, TrainError
from trainer.finetuning.grid import Grid
from trainer.finetuning.images import check_output, find_stem, write_image
from trainer.finetuning.inference import Predictor
from trainer.finetuning.manifest import read_centres
from trainer.finetuning.starts import rebuild
from trainer.finetuning.task import Case, count_outputs
from trainer.ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class _TunedRun:
    """What the checkpoint of a fine-tuned run says about its task."""

    path: Path
    kind: str
    classes: tuple[str, ...]
    segments: bool
    grid: Grid
    has_centres: bool
    """Whether it classifies crops around given centres."""
    channel: int | None
    overlap: float
    precision: str


def predict(
    run: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    overlap: float | None = None,
    channel: int | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Segment or classify images, as the run was trained to; returns the files written.

    run
        Run directory of `finetune`.
    source
        An image, a folder of one DICOM series, or a folder of images. For a run that was trained
        on crops around given centres: a CSV file with columns image, x_mm, y_mm, z_mm.
    out
        Segmentation: a file for one image, a folder for several; a mask has the grid of its image.
        Classification: a CSV file with the probability of each class.
    overlap
        Overlap of the sliding windows, as a share of the window; None: as in the run's test.
    channel
        Channel to use of images with several channels, also of files NAME_0000, NAME_0001, ...;
        None: as the run was trained.

    Raises TrainError where the run is not a fine-tuned one, an image cannot be read, or an output
    would replace an input or be written twice.
    """
    check_local(out)
    source, out = Path(source), Path(out)
    tuned, weights = _open_run(Path(run))
    overlap = tuned.overlap if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise SettingError(f"overlap must be in [0, 1), got {overlap}")
    cases = _list_cases(tuned, source, tuned.channel if channel is None else channel)
    plan = _plan_masks if tuned.segments else _plan_table
    targets = plan(cases, source, out)
    set_precision(tuned.precision)
    on = pick_device(device, Ranks())
    outputs = count_outputs(tuned.classes)
    net = rebuild(tuned.kind, weights, outputs=outputs, segments=tuned.segments)
    predictor = Predictor(
        net=net.to(on),
        grid=tuned.grid,
        overlap=overlap,
        device=on,
        autocast=autocast(tuned.precision, on),
    )
    read = lru_cache(maxsize=1)(tuned.grid.read)  # an image may have several crops
    with progress.stage("predict", len(cases), "cases") as advance:
        if tuned.segments:
            for case, target in zip(cases, targets, strict=True):
                write_image(predictor.segment(read(case.image, case.channel)), target)
                advance(1)
        else:
            rows = []
            for case in cases:
                image = read(case.image, case.channel)
                seen = tuned.grid.to_input(tuned.grid.resample_case(case, image), image)
                rows.append([*_first_cells(case), *predictor.classify(seen).tolist()])
                advance(1)
            first = ["name", "image", "x_mm", "y_mm", "z_mm"] if tuned.has_centres else ["image"]
            write_csv_file(out, [*first, *tuned.classes], rows)
    return targets


def _open_run(path: Path) -> tuple[_TunedRun, dict[str, torch.Tensor]]:
    """A run's task and its best weights."""
    if not (path / BEST).exists():
        raise TrainError(f"{path}: not a fine-tuned run; make one with `semgen finetune`")
    saved = load_checkpoint(path / BEST)
    if "task" not in saved:
        raise TrainError(f"{path}: pretrained, not fine-tuned; run `semgen finetune` from it")
    task: dict[str, Any] = saved["task"]
    config: dict[str, Any] = saved["config"]
    tuned = _TunedRun(
        path=path,
        kind=task["kind"],
        classes=tuple(task["classes"]),
        segments=task["segments"],
        grid=Grid.from_dict(task["grid"]),
        has_centres=task["places"],
        channel=task["channel"],
        overlap=config["overlap"],
        precision=config["precision"],
    )
    return tuned, saved["model"]


# Inputs -----------------------------------------------------------------------------------------


def _list_cases(tuned: _TunedRun, source: Path, channel: int | None) -> list[Case]:
    """The images, or crops of images, to predict on; outputs are named after the cases."""
    if not source.exists():
        raise TrainError(f"{source}: no such image or folder")
    is_table = source.is_file() and source.suffix.lower() == ".csv"
    if tuned.has_centres != is_table:
        raise TrainError(
            f"{tuned.path}: was trained on crops around given centres; instead of {source} give a"
            " CSV file with columns image, x_mm, y_mm, z_mm"
            if tuned.has_centres
            else f"{tuned.path}: was trained on whole images; instead of {source} give an image or"
            " a folder"
        )
    if is_table:
        return [
            Case(name=case.name, patient=case.patient, image=case.image, centre_mm=case.centre_mm,
                 channel=channel if case.channel is None else case.channel)
            for case in read_centres(source)
        ]  # fmt: skip
    images = [source]
    if source.is_dir():
        if not any(path.is_file() for path in source.iterdir()):
            raise TrainError(f"{source}: has no files; give an image, or a folder with images")
        found = sorted(p for p in source.glob("[!.]*") if find_stem(p) is not None)
        images = _files_of_channel(found, channel) or [source]  # a DICOM series
    names = [_case_name(image, channel) for image in images]
    return [
        Case(name=name, patient=name, image=image, channel=channel)
        for name, image in zip(names, images, strict=True)
    ]


def _files_of_channel(images: Sequence[Path], channel: int | None) -> list[Path]:
    """From files NAME_0000, NAME_0001, ... those of the channel; other files as they are."""
    if channel is None:
        return list(images)
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    for image in images:
        stem = find_stem(image) or image.name
        groups[re.sub(r"_\d{4}$", "", stem)][stem] = image
    chosen: list[Path] = []
    for name, group in groups.items():
        wanted = f"{name}_{channel:04d}"
        if f"{name}_0000" not in group:
            chosen += group.values()
        elif wanted in group:
            chosen.append(group[wanted])
        else:
            raise TrainError(
                f"{group[f'{name}_0000']}: there is no {wanted} beside it for channel {channel};"
                " add the file or give another --channel"
            )
    return sorted(chosen)


def _case_name(image: Path, channel: int | None) -> str:
    """The image's file name without suffix and without nnU-Net's channel suffix."""
    stem = find_stem(image) or image.name
    return stem.removesuffix(f"_{channel or 0:04d}") or stem


def _first_cells(case: Case) -> list[object]:
    """The cells of a case's line before its probabilities."""
    if case.centre_mm is None:
        return [case.image.name]
    return [case.name, case.image.name, *case.centre_mm]


# Outputs ----------------------------------------------------------------------------------------


def _plan_masks(cases: Sequence[Case], source: Path, out: Path) -> list[Path]:
    """The file of each mask; TrainError where a file would be lost."""
    is_single = [case.image for case in cases] == [source]
    if is_single:
        check_output(out)
    elif out.exists() and not out.is_dir():
        raise TrainError(f"{out}: is a file; give a folder for the masks of {len(cases)} images")
    targets = [out] if is_single else [out / f"{case.name}.nii.gz" for case in cases]
    images: dict[Path, list[str]] = defaultdict(list)
    for case, target in zip(cases, targets, strict=True):
        images[target].append(case.image.name)
    for target, names in images.items():
        if len(names) > 1:
            raise TrainError(
                f"several images would get the mask file {target.name}: {', '.join(names)}; rename"
                " all but one of them, or predict on them one by one"
            )
    _refuse_inputs(cases, source, targets)
    folder = out.parent if is_single else out
    if source.is_dir() and folder.resolve() == source.resolve():
        raise TrainError(f"{out}: masks would be mixed with the images; give another folder")
    return targets


def _plan_table(cases: Sequence[Case], source: Path, out: Path) -> list[Path]:
    """The file of the table; creates its folder."""
    if out.suffix.lower() != ".csv" or out.is_dir():
        raise TrainError(f"{out}: probabilities are written as CSV; give a file that ends in .csv")
    _refuse_inputs(cases, source, [out])
    out.parent.mkdir(parents=True, exist_ok=True)
    return [out]


def _refuse_inputs(cases: Sequence[Case], source: Path, targets: Sequence[Path]) -> None:
    """Raise TrainError where an output is an input, by this or another path."""
    inputs = {_inode(path): path for path in (source, *(case.image for case in cases))}
    for target in targets:
        if target.exists() and _inode(target) in inputs:
            raise TrainError(
                f"{target}: would replace the input {inputs[_inode(target)].name};"
                " give another file or folder"
            )


def _inode(file: Path) -> tuple[int, int]:
    """Device and inode, the same for all paths and links to a file."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino
