"""Answers of a fine-tuned run about new images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from store.csvfile import write_csv
from trainer.checkpoint import BEST, load_checkpoint
from trainer.device import autocast, pick_device
from trainer.errors import TrainError
from trainer.finetuning.answers import classify, segment
from trainer.finetuning.images import ENDINGS, find_stem, read_image, write_image
from trainer.finetuning.init import rebuild
from trainer.finetuning.prepared import Grid
from trainer.finetuning.task import count_outputs
from trainer.ranks import Ranks


def predict(
    run_path: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    overlap: float = 0.5,
    channel: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Name the voxels of images, or the images themselves; returns the files written.

    source
        An image, a folder of one DICOM series, or a folder of images.
    out
        Segmenting: a file for one image, a folder for several; masks have the geometry of the
        image. Classifying: a CSV file with the probability of each class.

    Raises TrainError when the run is no fine-tuned one or an image cannot be read.
    """
    run, source, out = Path(run_path), Path(source), Path(out)
    if not (run / BEST).exists():
        raise TrainError(f"{run}: no fine-tuned run; make one with `semgen finetune`")
    saved = load_checkpoint(run / BEST)
    if "task" not in saved:
        raise TrainError(f"{run}: pretrained, not fine-tuned; run `semgen finetune` from it")
    task = saved["task"]
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in task["grid"].items()
    }
    grid = Grid(**settings)
    where = pick_device(device, Ranks())
    classes = task["classes"]
    outputs = count_outputs(classes)
    net = rebuild(task["kind"], saved["model"], outputs=outputs, segments=task["segments"])
    net.to(where)
    exact = autocast("fp32", where)
    images = _list_images(source)
    several = images != [source]
    if task["segments"] and not several and not out.name.endswith(ENDINGS):
        raise TrainError(f"{out}: a mask's name must end in {', '.join(ENDINGS)}")
    written: list[Path] = []
    rows: list[dict[str, float | str]] = []
    for number, file in enumerate(images, 1):
        image = read_image(file, channel)
        if task["segments"]:
            mask = segment(net, image, grid, overlap=overlap, device=where, autocast=exact)
            # nnU-Net marks a first channel so
            name = (find_stem(file) or file.name).removesuffix("_0000")
            target = out / f"{name}.nii.gz" if several else out
            write_image(mask, target)
            written.append(target)
        else:
            values = torch.from_numpy(np.asarray(grid.to_unit(grid.bring(image))))[None, None]
            found = classify(net, values, device=where, autocast=exact)[0]
            rows.append({"image": file.name, **dict(zip(classes, found.tolist(), strict=True))})
        progress(number, len(images))
    if rows:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as stream:
            write_csv(stream, rows[0], (row.values() for row in rows))
        written.append(out)
    return written


def _list_images(source: Path) -> list[Path]:
    """The source itself, or the images in it."""
    if not source.exists():
        raise TrainError(f"{source}: no such image or folder")
    if source.is_file():
        return [source]
    images = sorted(p for p in source.glob("[!.]*") if p.name.endswith(ENDINGS))
    return images or [source]  # a DICOM series
