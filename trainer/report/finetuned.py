"""Collect a fine-tuning's test for its page: scores of classes and cases, pictures of masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image


def describe_test(run: Path, *, names: bool = False) -> dict[str, Any] | None:
    """Scores of a fine-tuned run's test cases; None where it was not tested.

    names
        Show the names of cases, not only their numbers.
    """
    from trainer.finetuning.evaluation import CASES, RESULT  # noqa: PLC0415 - needs SimpleITK

    if not (run / RESULT).exists():
        return None
    result = json.loads((run / RESULT).read_text())
    with (run / CASES).open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    classifies = header[1:2] == ["label"]
    first = 2 if classifies else 1  # column after the case and its label; a class may be "label"
    leaked = set(result.get("leaked", []))
    return {
        "scores": result["scores"],
        "numTest": result["num_test"],
        "bestStep": result["best_step"],
        "columns": header[first:],
        "classifies": classifies,
        "cases": [
            {
                "name": row[0] if names else f"Case {number}",
                "label": int(row[1]) if classifies else None,
                "leaked": row[0] in leaked,
                "values": [round(float(cell or "nan"), 4) for cell in row[first:]],
            }
            for number, row in enumerate(rows, 1)
        ],
    }


def read_pictures(run: Path, num_cases: int) -> list[Image.Image]:
    """The pictures of masks in test.png, without their captions, which name the cases."""
    from trainer.finetuning.evaluation import PICTURE  # noqa: PLC0415 - needs SimpleITK
    from trainer.finetuning.pictures import split_tiles  # noqa: PLC0415

    if not (run / PICTURE).exists():
        return []
    with Image.open(run / PICTURE) as picture:
        return split_tiles(picture, num_cases)
