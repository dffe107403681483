"""Tiny pretraining runs: their settings, and how to read and compare them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from trainer import TrainConfig

SHAPE = (8, 16, 16)
TINY = TrainConfig(
    width=2, batch_size=16, epochs=3, warmup_epochs=1, shuffle_blocks=100,
    log_every=2, checkpoint_every=2, seed=5, device="cpu",
)  # fmt: skip
"""15 steps, 5 an epoch; the first epoch is the warm-up."""


def tiny(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_pictures(run: Path) -> dict[str, bytes]:
    """The pictures of restored crops over time, by file name."""
    return {file.name: file.read_bytes() for file in (run / "samples").glob("*")}


def assert_same_run(run: Path, other: Path) -> None:
    """Metrics, pictures, weights and optimiser state agree bit for bit."""
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert read_pictures(run) == read_pictures(other)
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(path / name, weights_only=True) for path in (run, other))
        for key, value in ours["model"].items():
            assert torch.equal(value, theirs["model"][key]), key
        for index, state in ours["optimiser"]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, theirs["optimiser"]["state"][index][key]), key
        assert ours["progress"] == theirs["progress"]
        if ours["config"] == theirs["config"]:
            assert (run / name).read_bytes() == (other / name).read_bytes()
