"""Classifiers, folds and patient bootstraps of `benchmarks.probe`: arithmetic on features alone."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from trainer.report.classes import nearest_votes, normalise

STRENGTHS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties among which the linear probe chooses."""
INNER_FOLDS: Final = 3
"""Folds of the patients with known labels, to choose the penalty."""
_LBFGS: Final = {"maxiter": 200, "ftol": 1e-6}

Floats = NDArray[np.float64]
Features = NDArray[np.float32]
Ints = NDArray[np.int64]


def deal_folds(patients: Ints, labels: Ints, num: int, seed: int = 0) -> Ints:
    """(n,) fold of each crop: a patient's crops share one.

    Patients with the same most frequent label are dealt to the folds evenly.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1), np.int64)
    np.add.at(counts, (index, labels), 1)
    fold = np.empty(len(names), np.int64)
    fold[np.lexsort((rng.random(len(names)), counts.argmax(1)))] = np.arange(len(names)) % num
    return fold[index]


# Classifiers


def predict_nearest(
    features: Features, labels: Ints, patients: Ints, queries: Features, num_classes: int
) -> Floats:
    """(m, classes) share of votes of the five nearest crops by cosine similarity.

    The mean of `features` is subtracted first.
    """
    centre = features.mean(0)
    votes = nearest_votes(
        normalise(features, centre), labels, patients, normalise(queries, centre),
        np.full(len(queries), -1), num_classes,
    )  # fmt: skip
    return np.asarray(votes / votes.sum(1, keepdims=True))


def predict_linear(
    features: Features, labels: Ints, patients: Ints, queries: Features, num_classes: int
) -> Floats:
    """(m, classes) log-probabilities of logistic regression on standardised features.

    The L2 penalty is that of `STRENGTHS` with the lowest loss on held-out patients.
    """
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    known, asked = ((values - mean) / np.maximum(std, 1e-12) for values in (features, queries))
    weights = _balance(labels, num_classes)
    folds = deal_folds(patients, labels, INNER_FOLDS)
    losses = []
    for strength in STRENGTHS:
        loss = 0.0
        for fold in range(INNER_FOLDS):
            out = folds == fold
            fitted = _fit(known[~out], labels[~out], weights[~out], strength, num_classes)
            logits = _predict(fitted, known[out])
            loss -= float(weights[out] @ logits[np.arange(out.sum()), labels[out]])
        losses.append(loss)
    best = STRENGTHS[int(np.argmin(losses))]
    return _predict(_fit(known, labels, weights, best, num_classes), asked)


def _balance(labels: Ints, num_classes: int) -> Floats:
    """Weight of each crop, so that all classes weigh the same; the sum is 1."""
    counts = np.bincount(labels, minlength=num_classes)
    return np.asarray(1 / counts[labels] / np.count_nonzero(counts))


def _fit(
    features: Floats, labels: Ints, weights: Floats, strength: float, num_classes: int
) -> Floats:
    """(d + 1, classes) coefficients, the last row the intercepts, which are not penalised."""
    num, width = features.shape
    truth = np.zeros((num, num_classes))
    truth[np.arange(num), labels] = 1
    weights = weights / weights.sum()

    def loss(flat: Floats) -> tuple[float, Floats]:
        fitted = flat.reshape(width + 1, num_classes)
        logits = _predict(fitted, features)
        change = weights[:, None] * (np.exp(logits) - truth)
        slope = np.concatenate([features.T @ change + strength * fitted[:-1], change.sum(0)[None]])
        penalty = strength / 2 * float(np.square(fitted[:-1]).sum())
        return penalty - float(weights @ logits[truth > 0]), slope.ravel()

    start = np.zeros((width + 1) * num_classes)
    found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", options=_LBFGS)
    return np.asarray(found.x.reshape(width + 1, num_classes))


def _predict(fitted: Floats, features: Floats) -> Floats:
    return np.asarray(log_softmax(features @ fitted[:-1] + fitted[-1], axis=1))


PROBES: Final = {"kNN": predict_nearest, "linear": predict_linear}


def cross_validate(
    probe: str, features: Features, labels: Ints, patients: Ints, folds: Ints, num_classes: int
) -> Floats:
    """(tested, classes) predictions of the crops with a fold >= 0, in order.

    Each is predicted from all crops of other folds; those of fold -1 are never tested.
    """
    found = np.empty((len(labels), num_classes))
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        known = (features[~out], labels[~out], patients[~out])
        found[out] = PROBES[probe](*known, features[out], num_classes)
    return found[folds >= 0]


# Scores


def resample(patients: Ints, times: int, seed: int = 0) -> Floats:
    """(1 + times, n) weights of crops: 1, then those of bootstrap samples of the patients."""
    names, index = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), times)
    return np.concatenate([np.ones((1, len(patients))), drawn[:, index]])


def score(labels: Ints, found: Floats, weights: Floats) -> Floats:
    """(samples,) AUC of two classes, or balanced accuracy of more, for each row of weights.

    Balanced accuracy leaves out classes that a sample lacks; such an AUC is NaN.
    """
    if found.shape[1] == 2:
        margin, positive = found[:, 1] - found[:, 0], labels == 1
        one, other = margin[positive][:, None], margin[~positive]
        above = (one > other) + 0.5 * (one == other)
        on, off = weights[:, positive], weights[:, ~positive]
        pairs = on.sum(1) * off.sum(1)
        wins = ((on @ above) * off).sum(1)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    is_class = labels[:, None] == np.arange(found.shape[1])
    right = is_class & (found.argmax(1) == labels)[:, None]
    total = weights @ is_class  # (samples, classes)
    return np.asarray((weights @ right / np.maximum(total, 1e-12)).sum(1) / (total > 0).sum(1))


def interval(samples: Floats) -> tuple[float, float]:
    """The middle 95 % of the bootstrap samples of `resample`, NaN left out."""
    low, high = np.nanpercentile(samples[1:], (2.5, 97.5))
    return float(low), float(high)
