"""Batches that may not fit into memory: what a run says about them."""

from pathlib import Path

import pytest
import torch

from tests.support.runs import tiny
from trainer import Event, Noticed, TrainError, pretrain
from trainer.data import dataset
from trainer.pretraining import Pretrainer


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Noticed)]


def test_a_run_with_large_batches_says_how_to_need_less_memory(store: Path, tmp_path: Path) -> None:
    config = {"steps": 1, "pretext": "none", "validation_batches": 1}
    for name, settings, said in (
        ("large", {"batch_size": 200}, True),
        ("accumulated", {"batch_size": 200, "accumulate": 2}, False),
        ("usual", {"batch_size": 64}, False),
    ):
        events: list[Event] = []
        pretrain(store, tmp_path / name, tiny(**config, **settings), on_event=events.append)
        expected = (
            "batches of 200 crops of 8 x 16 x 16 voxels need about 3 times the memory of the"
            " default; to need less, use batch_size 64, or accumulate 4"
        )
        assert (expected in notices(events)) == said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
        RuntimeError("FIND was unable to find an engine to execute this computation"),  # cuDNN
    ],
    ids=["PyTorch", "cuDNN"],
)
def test_a_gpu_without_enough_memory_is_told_in_one_line(
    error: RuntimeError, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Pretrainer, "step", fail)
    with pytest.raises(TrainError, match="memory is too small for batches of 16; lower"):
        pretrain(store, tmp_path / "run", tiny())


def test_fewer_batches_are_read_ahead_if_they_are_large(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = dataset.read_ahead

    def note(*arguments: object, threads: int) -> object:
        seen.append(threads)
        return real(*arguments, threads=threads)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "read_ahead", note)
    for limit in (2**31, 3 * 2 * 10 * 8 * 16 * 16, 1):
        monkeypatch.setattr(dataset, "_AHEAD_BYTES", limit)
        list(dataset.PatchDataset(store, batch_size=10, threads=8))
    assert seen == [8, 3, 1]
