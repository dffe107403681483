"""Settings of training: types and ranges."""

import dataclasses
from typing import Any

import pytest

from store.settings import to_json
from trainer import TrainConfig, TrainError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"accumulate": 65}, "accumulate must be <= batch_size, got 65"),
        ({"seed": 2**63}, "seed must be in [0, 2^63)"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes must be > 0, got 0"),
        ({"lr_gamma": 0.0}, "lr_gamma must be in (0, 1], got 0.0"),
        ({"lr_minimum": 0.1}, "lr_minimum must be in [0, learning_rate], got 0.1"),
        ({"pretext_weight": -1}, "pretext_weight must be >= 0, got -1"),
        ({"classification_weight": -0.5}, "classification_weight must be >= 0, got -0.5"),
        ({"fraction": 1.5}, "fraction must be in (0, 1], got 1.5"),
        ({"classes": ()}, "classes must be at least one number, or None for all, got ()"),
        ({"scales": []}, "scales must be at least one number, or None for all, got ()"),
        ({"pretext": "rotations"}, "pretext must be one of restoration, inpainting"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, tf32, bf16, got 'fp8'"),
        ({"pretext": "none", "classify": False}, "nothing to learn"),
        ({"pretext": "none", "classification_weight": 0}, "nothing to learn"),
        ({"pretext_weight": 0, "classification_weight": 0}, "nothing to learn"),
        ({"learning_rate": 1e300}, "learning_rate must be in (0, 1e+38), got 1e+300"),
        ({"width": 10**12}, "width must be <= 256, got 1000000000000"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError) as caught:
        TrainConfig(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"threads": True}, "threads must be a whole number, got True"),
        ({"epochs": "many"}, "epochs must be a whole number, got 'many'"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, got nan"),
        ({"classify": "no"}, "classify must be true or false, got 'no'"),
        ({"device": 0}, "device must be text, got 0"),
        ({"classes": 3}, "classes must be a list of whole numbers, got 3"),
        ({"excluded_members": [3]}, "excluded_members must be a list of texts, got [3]"),
        ({"classes": [0, 1.5]}, "classes must be a list of whole numbers, got [0, 1.5]"),
    ],
)
def test_values_of_another_type_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError) as caught:
        TrainConfig(**changes)
    assert str(caught.value) == message


def test_settings_are_equal_for_equal_values_of_other_types() -> None:
    as_in_toml = {"learning_rate": 1, "classes": [0, 2], "width": 8.0}
    assert TrainConfig(**as_in_toml) == TrainConfig(learning_rate=1.0, classes=(0, 2), width=8)


def test_settings_survive_json() -> None:
    config = TrainConfig(classes=(0, 2), warmup_epochs=3)
    assert TrainConfig(**to_json(config)) == config
    assert all(f.name in to_json(config) for f in dataclasses.fields(config))
