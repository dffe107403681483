"""Scores of predictions: Dice and IoU of masks, AUC and accuracy of probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def overlap_scores(
    prediction: NDArray[np.integer[Any]],
    truth: NDArray[np.integer[Any]],
    num_classes: int,
    *,
    ignored: int | None = None,
) -> dict[str, list[float]]:
    """Dice and intersection over union (IoU) of each class but the first.

    NaN where a class is neither in the truth nor predicted.

    prediction, truth
        Class of each voxel, of the same shape.
    ignored
        Number of the voxels in the truth that do not count.
    """
    if ignored is not None:
        prediction, truth = prediction[truth != ignored], truth[truth != ignored]
    dice, iou = [], []
    for number in range(1, num_classes):
        one, other = prediction == number, truth == number
        both, total = np.count_nonzero(one & other), np.count_nonzero(one) + np.count_nonzero(other)
        dice.append(2 * both / total if total else math.nan)
        iou.append(both / (total - both) if total else math.nan)
    return {"dice": dice, "iou": iou}


def area_under_curve(score: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve (AUC), from the Mann-Whitney U statistic.

    It is the probability that a positive case has a higher score than a negative one; ties count
    half.

    score, positive
        (n,) each. NaN where all cases are positive, or none is.
    """
    score = score.astype(np.float64)  # ranks need more than 24 bits
    positives, negatives = score[positive], score[~positive]
    if not len(positives) or not len(negatives):
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):  # of the p-value, where all scores tie
        wins = stats.mannwhitneyu(positives, negatives, method="asymptotic").statistic
    return float(wins) / (len(positives) * len(negatives))


def classification_scores(
    probability: NDArray[np.floating[Any]], truth: NDArray[np.integer[Any]]
) -> dict[str, float]:
    """AUC and accuracy; with several classes the AUC is the mean of each class against the rest.

    probability, truth
        (n, classes) and (n,).
    """
    columns = [1] if probability.shape[1] == 2 else range(probability.shape[1])
    areas = [area_under_curve(probability[:, c], truth == c) for c in columns]
    accuracy = float(np.mean(probability.argmax(1) == truth)) if len(truth) else math.nan
    return {"auc": mean(areas), "accuracy": accuracy}


def mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
