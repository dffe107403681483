"""Losses equal the recorded ones, so that a refactoring cannot change numbers unnoticed."""

import json
from pathlib import Path

import pytest

from tests.support.golden_losses import RECORD, TRAININGS

TOLERANCE = 2e-4
"""Relative. Other instruction sets (SSE4.1, AVX2, AVX-512) change these losses by up to 4e-5."""


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_equal_the_recorded_ones(name: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORD.read_text())[name]
    lines = TRAININGS[name](tmp_path)
    for line, expected in zip(lines, recorded, strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=TOLERANCE), (
            "where that is meant: OMP_NUM_THREADS=1 python -m tests.support.golden_losses"
        )
