"""What a confusion matrix and features say about classes: pure arithmetic, no net and no store."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

NEIGHBOURS: Final = 5
"""Nearest training crops that name a crop's class."""
_COMPONENTS: Final = 4
_PAIRS: Final = 12
_BY_FEATURES: Final = 0.1
"""Weight of features where classes are sorted: confusion decides, features break ties."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float32]


def shares(counts: Counts) -> NDArray[np.float64]:
    """(classes, classes) each row of a confusion matrix over its sum; 0 for an empty row."""
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def sort_classes(counts: Counts, features: Floats, labels: NDArray[np.int64]) -> list[int]:
    """Classes in an order in which those that are confused are neighbours.

    Average linkage with optimal order of leaves. Two classes are near when one is taken for the
    other; where neither is, when the means of their features are similar.

    features, labels
        (n, d), from `normalise`, and (n,).
    """
    num = len(counts)
    if num < 3:
        return list(range(num))
    confused = (shares(counts) + shares(counts).T) / 2
    means = np.zeros((num, features.shape[1]))
    for label in np.unique(labels):
        mean = features[labels == label].mean(0, dtype=np.float64)
        means[label] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    distance = (1 - confused) + _BY_FEATURES * (1 - means @ means.T).clip(0)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [int(label) for label in leaves_list(tree)]


def find_pairs(counts: Counts) -> list[dict[str, Any]]:
    """The pairs of classes that are most often taken for each other, by mean share."""
    share = shares(counts)
    one, other = np.triu_indices(len(counts), 1)
    both = (share[one, other] + share[other, one]) / 2
    order = np.argsort(-both, kind="stable")[:_PAIRS]
    return [
        {
            "classes": [int(one[i]), int(other[i])],
            "counts": [int(counts[one[i], other[i]]), int(counts[other[i], one[i]])],
            "share": round(float(both[i]), 4),
        }
        for i in order
        if both[i] > 0
    ]


def normalise(features: Floats, centre: Floats) -> Floats:
    """Features (n, d) less a centre, each of length 1: products are cosine similarities."""
    moved = features - centre
    found: Floats = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    return found


def project(features: Floats) -> tuple[NDArray[np.float64], list[float]]:
    """The first principal components (n, 4), in -1 to 1, and the share of variance of each.

    The sign of a component is such that its largest weight is positive.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, ::-1][:, :_COMPONENTS]
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    found = centred @ vectors
    found /= np.maximum(np.abs(found).max(0), 1e-12)
    total = max(float(values.clip(0).sum()), 1e-12)
    return found, [round(float(value / total), 4) for value in values[::-1][:_COMPONENTS].clip(0)]


def nearest_class(
    features: Floats,
    labels: NDArray[np.int64],
    patients: NDArray[np.int64],
    queries: Floats,
    query_patients: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The class of most of the five nearest crops of other patients, for each query.

    -1 where every crop is of the same patient. For arguments, see `nearest_votes`.
    """
    num_classes = int(labels.max(initial=0)) + 1
    votes = nearest_votes(features, labels, patients, queries, query_patients, num_classes)
    return np.where(votes.any(1), votes.argmax(1), -1)


def nearest_votes(
    features: Floats,
    labels: NDArray[np.int64],
    patients: NDArray[np.int64],
    queries: Floats,
    query_patients: NDArray[np.int64],
    num_classes: int,
) -> NDArray[np.float64]:
    """(m, classes) votes of the five nearest crops of other patients, for each query.

    Votes count by similarity, so there are no ties between unlike neighbours. Zeros where every
    crop is of the same patient.

    features, queries
        (n, d) and (m, d), products of which are similarities.
    """
    alike = queries @ features.T  # (m, n)
    alike[query_patients[:, None] == patients] = -np.inf
    order = np.argsort(-alike, axis=1, kind="stable")[:, :NEIGHBOURS]
    found = np.zeros((len(queries), num_classes))
    for number, nearest in enumerate(order):
        known = nearest[np.isfinite(alike[number, nearest])]
        weights = 1 + alike[number, known].clip(-1)
        found[number] = np.bincount(labels[known], weights=weights, minlength=num_classes)
    return found


def spread(labels: NDArray[np.integer[Any]], most: int) -> NDArray[np.intp]:
    """At most `most` positions, in order, of all classes about equally, always the same."""
    drawn = np.random.default_rng(0).permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # of a position among those of its class
    for label in np.unique(labels):
        own = drawn[labels[drawn] == label]
        rank[own] = np.arange(len(own))
    return np.sort(drawn[np.argsort(rank[drawn], kind="stable")][:most])
