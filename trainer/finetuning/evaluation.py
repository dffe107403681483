"""Test a fine-tuned net on whole, held-out cases: scores, masks and a picture of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from store.atomic import replace_file
from store.csvfile import write_csv_file
from store.progress import SILENT, Progress
from trainer.finetuning import scores
from trainer.finetuning.cases import Prepared
from trainer.finetuning.images import read_mask, write_image
from trainer.finetuning.inference import Predictor
from trainer.finetuning.pictures import Tile, draw_tile, join_tiles
from trainer.finetuning.task import Task

CASES, RESULT, MASKS, PICTURE = "cases.csv", "result.json", "test", "test.png"
_MAX_TILES = 8


def score_cases(
    predictor: Predictor,
    cases: Sequence[Prepared],
    task: Task,
    run: Path,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Mean scores over the cases: dice and iou, or auc and accuracy; NaN without cases.

    Scores of each case go to `run`/cases.csv, predicted masks to `run`/test and test.png. Masks
    are compared on the original image's grid.
    """
    header: list[str] = []
    rows: list[list[Any]] = []
    overlaps: list[dict[str, Any]] = []
    tiles: list[Tile] = []
    probabilities = np.zeros((len(cases), len(task.classes)))
    with (progress if cases else SILENT).stage("test", len(cases), "cases") as advance:
        for number, prepared in enumerate(cases):
            case = prepared.case
            if task.segments:
                assert case.mask is not None
                image = predictor.grid.read(case.image, case.channel)
                mask = predictor.segment(image)
                write_image(mask, run / MASKS / f"{case.name}.nii.gz")
                truth = read_mask(case.mask, image, task.num_labels)
                row = _score_mask(mask, truth, task)
                overlaps.append(row)
                header, cells = list(row), list(row.values())
                if number < _MAX_TILES:
                    caption = f"{case.name}: Dice {row['dice']:.2f}"
                    if task.ignored is not None:
                        truth = sitk.Mask(truth, sitk.NotEqual(truth, task.ignored))
                    tiles.append(draw_tile(caption, image, truth, mask, predictor.grid))
            else:
                probability = predictor.classify(prepared.image)
                probabilities[number] = probability
                header, cells = ["label", *task.classes], [case.label, *probability.tolist()]
            rows.append([case.name, *cells])
            advance(1)
    write_csv_file(run / CASES, ["case", *header], rows)  # a class may be called "case"
    if tiles:
        with replace_file(run / PICTURE) as partial:
            join_tiles(tiles).save(partial)
    if task.segments:
        return {name: scores.mean([row[name] for row in overlaps]) for name in ("dice", "iou")}
    truths = np.array([prepared.case.label for prepared in cases], np.int64)
    return scores.classification_scores(probabilities, truths)


def _score_mask(mask: sitk.Image, truth: sitk.Image, task: Task) -> dict[str, Any]:
    """Mean Dice and IoU over the classes, then those of each class where there are several."""
    found = scores.overlap_scores(
        sitk.GetArrayViewFromImage(mask),
        sitk.GetArrayViewFromImage(truth),
        len(task.classes),
        ignored=task.ignored,
    )
    row = {name: scores.mean(values) for name, values in found.items()}
    if len(task.classes) > 2:
        for name, values in found.items():
            for kind, value in zip(task.classes[1:], values, strict=True):
                row[f"{name} {kind}"] = value
    return row


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Write `run`/result.json."""
    with replace_file(run / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")


def read_scores(run: Path, best_step: int) -> dict[str, float] | None:
    """The scores in result.json; None where the weights of `best_step` were not tested yet."""
    if not (run / RESULT).exists():
        return None
    result = json.loads((run / RESULT).read_text())
    if result["best_step"] != best_step:
        return None
    return {k: math.nan if v is None else v for k, v in result["scores"].items()}
