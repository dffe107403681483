"""Confusion, nearest neighbours and projection for the page of runs, on small numbers."""

import numpy as np
import pytest

from trainer.report.classes import (
    find_pairs,
    nearest_class,
    normalise,
    project,
    sort_classes,
    spread,
)


def points(*angles: float) -> np.ndarray:
    """Directions in a plane, as normalised features."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_confused_classes_become_neighbours() -> None:
    counts = np.diag([8, 8, 8, 8, 8, 8])
    for one, other in ((0, 4), (1, 3), (2, 5)):
        counts[one, other] = 6
    order = sort_classes(counts, points(*np.zeros(6)), np.arange(6))
    assert sorted(order) == list(range(6))
    for one, other in ((0, 4), (1, 3), (2, 5)):
        assert abs(order.index(one) - order.index(other)) == 1


def test_classes_that_are_never_confused_are_sorted_by_their_features() -> None:
    features = points(0.0, 3.0, 0.1, 3.1, 0.2)
    order = sort_classes(np.diag([5] * 5), features, np.arange(5))
    assert {frozenset(order[:2]), frozenset(order[3:])} & {frozenset({1, 3})}


@pytest.mark.parametrize("num", [1, 2])
def test_one_or_two_classes_need_no_sorting(num: int) -> None:
    order = sort_classes(np.eye(num, dtype=np.int64), points(*np.zeros(num)), np.arange(num))
    assert order == list(range(num))


def test_pairs_are_listed_by_their_share_of_confusion_in_both_directions() -> None:
    counts = np.array([[6, 4, 0], [2, 8, 0], [0, 1, 1]])
    first, second = find_pairs(counts)
    assert first == {"classes": [0, 1], "counts": [4, 2], "share": 0.3}
    assert second == {"classes": [1, 2], "counts": [0, 1], "share": 0.25}


def test_a_crop_gets_the_class_of_its_neighbours_in_other_patients_only() -> None:
    features, labels = points(0.0, 0.1, 1.0, 1.1, 1.2), np.array([7, 7, 3, 3, 3])
    query = points(0.02)
    other = np.array([9])
    assert nearest_class(features[:3], labels[:3], np.zeros(3, int), query, other).tolist() == [7]
    same = np.array([9, 9, 1, 1, 1])  # the nearest two are of the query's own patient
    assert nearest_class(features, labels, same, query, other).tolist() == [3]
    nobody = nearest_class(features, labels, np.full(5, 9), query, other)
    assert nobody.tolist() == [-1]


def test_a_projection_keeps_the_direction_of_most_variance() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(0, 0.1, (50, 6)).astype(np.float32)
    features[:, 2] += np.linspace(-5, 5, 50, dtype=np.float32)
    found, explained = project(features)
    assert found.shape == (50, 4)
    assert np.abs(found).max(0).tolist() == [1.0] * 4
    assert np.corrcoef(found[:, 0], features[:, 2])[0, 1] > 0.99
    assert explained[0] > 0.95
    assert explained == sorted(explained, reverse=True)


def test_normalised_features_have_length_one_around_the_centre() -> None:
    features = np.array([[3.0, 1.0], [1.0, 1.0], [1.0, 5.0]], np.float32)
    found = normalise(features, np.array([1.0, 1.0], np.float32))
    assert found.tolist() == [[1, 0], [0, 0], [0, 1]]


def test_crops_are_spread_over_all_classes() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 2])
    chosen = spread(labels, 18)
    assert np.bincount(labels[chosen]).tolist() == [8, 8, 2]
    assert (np.diff(chosen) > 0).all()
    assert spread(labels, 1000).tolist() == list(range(112))
    assert spread(labels, 18).tolist() == chosen.tolist()
