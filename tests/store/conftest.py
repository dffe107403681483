"""Stores that several tests of the store share."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from store.writer import StoreWriter, write_shard
from tests.support.crops import CROP, NAME, NUM_ROWS, ROWS_PER_SHARD
from tests.support.synthetic_store import make_store


@pytest.fixture(scope="module")
def truth() -> NDArray[np.int16]:
    """Crops of noise, rough enough that every bit counts."""
    rng = np.random.default_rng(0)
    return rng.integers(-1000, 1000, (NUM_ROWS, *CROP), endpoint=True).astype(np.int16)


@pytest.fixture
def written(tmp_path: Path, truth: NDArray[np.int16]) -> Path:
    """A store with nothing but `truth`."""
    path = tmp_path / "crops.store"
    writer = StoreWriter.create(path, config={}, software={})
    grid = writer.create_sharded(
        NAME, shape=truth.shape, dtype="int16", rows_per_shard=ROWS_PER_SHARD
    )
    for shard in reversed(range(grid.num_shards)):
        write_shard(path, NAME, shard, truth[list(grid.rows_of(shard))])
    return path


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared store, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy.store")


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    return make_store(tmp_path / "s")
