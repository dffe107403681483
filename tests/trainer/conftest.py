"""Fixtures that several tests of the trainer share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.runs import SHAPE, TINY
from tests.support.synthetic_store import make_store
from trainer import Event, pretrain


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons need the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "tiny.store", shape=SHAPE)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """An uninterrupted run and its events."""
    events: list[Event] = []
    run = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(store, run, TINY, on_event=events.append)
    return run, events
