"""Crops that are larger than the default: what follows from their shape."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PrepareConfig, load_config
from pipeline.place import count_too_small
from store import PatchStore
from store.errors import ConfigError
from tests.support.synthetic_store import make_store
from trainer.config import suggest_batch_size

SHAPES = [(32, 64, 64), (96, 96, 96), (128, 128, 128), (160, 160, 160), (16, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_scales_have_the_published_ratio_to_the_base_crop(
    shape: tuple[int, int, int],
) -> None:
    config = PrepareConfig(shape=shape)
    low, high = (side / shape[2] for side in config.side_steps)
    assert (low, high) == pytest.approx((50 / 64, 80 / 64))
    assert config.shift_steps == (-config.shift_steps[1], config.shift_steps[1])
    assert config.shift_steps[1] / shape[2] == pytest.approx(10 / 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shard_holds_at_most_16_mib_and_64_crops(shape: tuple[int, int, int]) -> None:
    rows = PrepareConfig(shape=shape).rows_per_shard
    crop_bytes = 2 * math.prod(shape)
    assert rows <= 64
    assert rows * crop_bytes <= 2**24
    assert rows == 64 or (rows + 1) * crop_bytes > 2**24


def test_a_crop_larger_than_a_shard_is_alone_in_it() -> None:
    assert PrepareConfig(shape=(256, 256, 256)).rows_per_shard == 1


def test_what_is_given_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("shape = [96, 96, 96]\nside_steps = [50, 80]\nrows_per_shard = 3\n")
    config = load_config(file, overrides={"shift_steps": (0, 1)})
    assert (config.side_steps, config.shift_steps, config.rows_per_shard) == ((50, 80), (0, 1), 3)


@pytest.mark.parametrize("shape", [(96, 96), "abc", (95, 96, 96), (0, 0, 0), None])
def test_a_wrong_shape_is_named(shape: object) -> None:
    with pytest.raises(ConfigError, match=r"^shape must be"):
        PrepareConfig(shape=shape)  # type: ignore[arg-type]


def test_scans_in_which_no_crop_fits_are_counted(
    patches: PatchStore, config: PrepareConfig
) -> None:
    assert count_too_small(patches, config) == 0
    size_mm = (patches.scans.size - 1) * patches.scans.spacing_mm
    deep = replace(config, shape=(160, 32, 32), scales=1)
    needed_mm = 159 * config.spacing_mm[0]  # type: ignore[operator]
    assert count_too_small(patches, deep) == (size_mm[:, 0] < needed_mm).sum() > 0


def test_batches_of_large_crops_have_as_many_voxels_as_the_default() -> None:
    found = [suggest_batch_size(shape) for shape in SHAPES]
    assert found == [64, 9, 4, 2, 64]


def test_rows_are_read_in_batches_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.reader._BATCH_BYTES", 5 * 2 * 8**3 + 1)
    path = make_store(tmp_path / "s", shape=(8, 8, 8), rows_per_shard=1)
    split = PatchStore(path).train
    rows = np.arange(len(split))[::-2]
    batches = list(split.read_batches(rows))
    assert [len(batch) for batch in batches] == [5] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(batches), split.read(rows))
