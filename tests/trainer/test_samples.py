"""Pictures of restored crops over a run: which are kept, also after a resumption."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import read_pictures
from trainer.samples import MOST, add_sample, drop_samples_after, list_samples, read_sample


def crops(brightness: float, *, num: int = 2, side: int = 8) -> torch.Tensor:
    return torch.full((num, 1, 4, side, side), brightness)


def add(run: Path, number: int) -> None:
    """The picture of a validation after `number` epochs of 10 steps."""
    add_sample(run, number, 10 * number, {"dark": crops(0.0), "late": crops(number / 1000)})


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An uninterrupted run of 100 epochs, of which the first four are the warm-up."""
    (tmp_path / "whole").mkdir()
    for number in range(5, 101):
        add(tmp_path / "whole", number)
    return tmp_path / "whole"


def test_a_few_pictures_are_kept_from_the_first_to_the_last(whole: Path) -> None:
    numbers = [sample.number for sample in list_samples(whole)]
    assert (numbers[0], numbers[-1]) == (5, 100)
    assert numbers[1:-1] == list(range(8, 100, 8))
    assert len(numbers) <= MOST + 2


@pytest.mark.parametrize("stop", [6, 17, 33, 64, 65, 99])
def test_a_resumed_run_keeps_the_same_pictures(whole: Path, tmp_path: Path, stop: int) -> None:
    """Killed after a picture, but before its checkpoint."""
    (tmp_path / "run").mkdir()
    for number in range(5, stop + 1):
        add(tmp_path / "run", number)
    drop_samples_after(tmp_path / "run", 10 * (stop - 1))
    for number in range(stop, 101):
        add(tmp_path / "run", number)
    assert read_pictures(tmp_path / "run") == read_pictures(whole)


def test_a_picture_has_a_captioned_column_for_each_entry(tmp_path: Path) -> None:
    add_sample(tmp_path, 1, 1, {"perturbed": crops(0.2), "original": crops(1.0)})
    captions, _, picture = read_sample(list_samples(tmp_path)[0].file)
    assert captions == ["perturbed", "original"]
    grey = np.asarray(picture)
    assert grey.shape == (16, 16)
    assert np.unique(grey[:, :8]).tolist() == [51]
    assert np.unique(grey[:, 8:]).tolist() == [255]


def test_many_large_crops_still_make_a_small_picture(tmp_path: Path) -> None:
    add_sample(tmp_path, 1, 1, {"noise": torch.rand(8, 1, 2, 160, 160)})
    _, rows, picture = read_sample(list_samples(tmp_path)[0].file)
    assert (rows, picture.size) == (4, (96, 4 * 96))


@pytest.mark.parametrize(("num", "expected"), [(1, 1), (3, 3), (5, 3), (6, 3), (9, 3)])
def test_a_picture_says_how_many_rows_it_has(tmp_path: Path, num: int, expected: int) -> None:
    add_sample(tmp_path, 1, 1, {"noise": torch.rand(num, 1, 2, 8, 8)})
    _, rows, picture = read_sample(list_samples(tmp_path)[0].file)
    assert (rows, picture.height) == (expected, 8 * expected)
