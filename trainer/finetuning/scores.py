"""How good answers are: overlap of masks, ranking of classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def overlap(
    answer: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]],
    num_classes: int,
    *,
    ignored: int | None = None,
) -> dict[str, list[float]]:
    """Dice and intersection over union of each class but the first.

    NaN where a class is neither there nor named: such a case says nothing about it.

    ignored
        A number in the truth of voxels that do not count.
    """
    if ignored is not None:
        answer, truth = answer[truth != ignored], truth[truth != ignored]
    dice, iou = [], []
    for number in range(1, num_classes):
        one, other = answer == number, truth == number
        both, total = np.count_nonzero(one & other), np.count_nonzero(one) + np.count_nonzero(other)
        dice.append(2 * both / total if total else math.nan)
        iou.append(both / (total - both) if total else math.nan)
    return {"dice": dice, "iou": iou}


def area_under_curve(score: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive case scores above a negative one, ties counting half (AUC).

    score, positive
        (n,) each. NaN when all are of one kind.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return math.nan
    rank_sum = float(rankdata(score)[positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def classification_scores(
    probability: NDArray[np.floating[Any]], truth: NDArray[np.integer[Any]]
) -> dict[str, float]:
    """AUC (of several classes: mean of each against the rest) and accuracy.

    probability, truth
        (n, classes) and (n,).
    """
    columns = [1] if probability.shape[1] == 2 else range(probability.shape[1])
    areas = [area_under_curve(probability[:, c], truth == c) for c in columns]
    accuracy = float(np.mean(probability.argmax(1) == truth)) if len(truth) else math.nan
    return {"auc": mean(areas), "accuracy": accuracy}


def mean(values: list[float]) -> float:
    """Of those that are numbers; NaN when none is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
