"""Scores of a fine-tuned net on whole, held-out cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from torch import nn

from store.csvfile import write_csv
from trainer.finetuning import scores
from trainer.finetuning.cases import Grid, Prepared
from trainer.finetuning.images import read_mask, write_image
from trainer.finetuning.inference import classify, segment
from trainer.finetuning.pictures import Tile, draw_tile, join_tiles
from trainer.finetuning.task import Task

CASES, RESULT, MASKS, PICTURE = "cases.csv", "result.json", "test", "test.png"
_MOST_TILES = 8


def score_cases(
    net: nn.Module,
    cases: Sequence[Prepared],
    task: Task,
    grid: Grid,
    run: Path,
    *,
    overlap: float,
    device: torch.device,
    autocast: torch.autocast,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Means over the cases; each case's go to `run`/cases.csv, masks to `run`/test and test.png.

    Masks are compared on the grid that the image came with.
    """
    rows: list[dict[str, Any]] = []
    tiles: list[Tile] = []
    probabilities = np.zeros((len(cases), len(task.classes)))
    for number, prepared in enumerate(cases):
        case = prepared.case
        if task.segments:
            assert case.mask is not None
            image = grid.read(case.image, case.channel)
            answer = segment(net, image, grid, overlap=overlap, device=device, autocast=autocast)
            write_image(answer, run / MASKS / f"{case.name}.nii.gz")
            truth = read_mask(case.mask, image, task.num_labels)
            found = scores.overlap(
                sitk.GetArrayViewFromImage(answer),
                sitk.GetArrayViewFromImage(truth),
                len(task.classes),
                ignored=task.ignored,
            )
            row = {name: scores.mean(values) for name, values in found.items()}
            if number < _MOST_TILES:
                caption = f"{case.name}: Dice {row['dice']:.2f}"
                if task.ignored is not None:
                    truth = sitk.Mask(truth, sitk.NotEqual(truth, task.ignored))
                tiles.append(draw_tile(caption, image, truth, answer, grid))
            if len(task.classes) > 2:
                for name, values in found.items():
                    for kind, value in zip(task.classes[1:], values, strict=True):
                        row[f"{name} {kind}"] = value
        else:
            images = torch.from_numpy(np.array(prepared.image))[None, None]
            probability = classify(net, images, device=device, autocast=autocast)[0]
            probabilities[number] = probability
            row = dict(zip(task.classes, probability.tolist(), strict=True))
        rows.append({"case": case.name, **({} if task.segments else {"label": case.label}), **row})
        progress(number + 1)
    _write_rows(run / CASES, rows)
    if tiles:
        join_tiles(tiles).save(run / PICTURE)
    if task.segments:
        return {name: scores.mean([row[name] for row in rows]) for name in ("dice", "iou")}
    truths = np.array([prepared.case.label for prepared in cases], np.int64)
    return scores.classification_scores(probabilities, truths)


def write_result(run: Path, result: dict[str, Any]) -> None:
    """What a run came to, for programs."""
    partial = run / (RESULT + ".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(run / RESULT)


def read_scores(run: Path, best_step: int) -> dict[str, float] | None:
    """The scores of those weights, where they were tested already."""
    if not (run / RESULT).exists():
        return None
    result = json.loads((run / RESULT).read_text())
    if result["best_step"] != best_step:
        return None
    return {k: math.nan if v is None else v for k, v in result["scores"].items()}


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        write_csv(stream, rows[0] if rows else ["case"], (row.values() for row in rows))
    partial.replace(file)
