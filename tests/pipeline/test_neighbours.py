"""The index of nearest scans: exact, in a fixed order, among eligible scans alone."""

import numpy as np
import pytest

from pipeline.errors import PrepareError
from pipeline.neighbours import Neighbours


@pytest.mark.parametrize("seed", range(4))
def test_the_flat_index_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(200, 12)).astype(np.float32)
    rows = np.sort(rng.permutation(200)[:150])
    eligible = rng.random(200) < 0.3
    index = Neighbours(embedding, rows, "Flat")
    for scan in (0, 7, 199):
        distance = np.linalg.norm(embedding.astype(float) - embedding[scan], axis=1)
        expected = sorted((row for row in rows if eligible[row]), key=lambda row: distance[row])
        found, given = index.nearest(scan, 10, eligible)
        assert found.tolist() == expected[:10]
        np.testing.assert_allclose(given, distance[found], rtol=1e-6)


def test_fewer_are_found_where_fewer_are_eligible() -> None:
    embedding = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    eligible = np.isin(np.arange(50), [3, 30, 41])
    found, _ = Neighbours(embedding, np.arange(50), "Flat").nearest(0, 10, eligible)
    assert sorted(found.tolist()) == [3, 30, 41]


def test_ties_are_in_order_of_rows() -> None:
    embedding = np.zeros((60, 4), np.float32)
    embedding[10] = 1
    found, _ = Neighbours(embedding, np.arange(60), "Flat").nearest(10, 5, np.ones(60, bool))
    assert found.tolist() == [10, 0, 1, 2, 3]


def test_distances_are_exact_with_an_approximate_index() -> None:
    embedding = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    found, distance = Neighbours(embedding, np.arange(500), "HNSW16").nearest(
        3, 20, np.ones(500, bool)
    )
    exact = np.linalg.norm(embedding[found].astype(float) - embedding[3], axis=1)
    np.testing.assert_allclose(distance, exact, rtol=1e-6)


@pytest.mark.parametrize("index", ["Flatt", "IVF100,Flat"])
def test_an_index_that_cannot_be_built_is_named_in_the_error(index: str) -> None:
    embedding = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    with pytest.raises(PrepareError, match=f"index '{index}' cannot be built on 20 scans"):
        Neighbours(embedding, np.arange(20), index)
