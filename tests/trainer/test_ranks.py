"""Training by two processes, as torchrun starts them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from store import PatchStore
from store.settings import to_json
from tests.support.command import ROOT
from tests.support.ranks import train_by_two
from tests.support.synthetic_store import make_store
from trainer import TrainConfig, TrainError, pretrain
from trainer.data.plan import EpochPlan

CONFIG = TrainConfig(
    width=2, batch_size=10, epochs=3, warmup_epochs=1, shuffle_blocks=100, log_every=2,
    checkpoint_every=2, seed=5, sync_batch_norm=True, device="cpu", threads=1,
)  # fmt: skip
"""6 steps an epoch; the last rows of an epoch do not divide by two."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return make_store(folder / "s", shape=(8, 16, 16), num_classes=3, num_train=17)


def torchrun(
    store: Path, run: Path, *, before: str = "", **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Pretrain by two processes; `before` is code that each runs first."""
    config = {**to_json(CONFIG), **settings}
    code = (
        f"import torch; torch.set_num_threads(1); from trainer import *\n{before}\n"
        f"print(pretrain({str(store)!r}, {str(run)!r}, TrainConfig(**{config!r})).steps)"
    )
    program = run.with_suffix(".py")
    program.write_text(code)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(program)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(run / "last.pt", weights_only=True)["model"]
    return model


@pytest.fixture(scope="module")
def together(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    run = tmp_path_factory.mktemp("runs") / "together"
    train_by_two(store, run, CONFIG)
    return run


def test_two_processes_give_the_weights_of_one(store: Path, together: Path, tmp_path: Path) -> None:
    pretrain(store, tmp_path / "alone", CONFIG)
    ours, theirs = weights(together), weights(tmp_path / "alone")
    start = TrainConfig(
        **{**to_json(CONFIG), "steps": 1, "warmup_epochs": 0, "learning_rate": 1e-12}
    )
    pretrain(store, tmp_path / "start", start)
    before = weights(tmp_path / "start")
    kept = [
        key
        for key, value in theirs.items()
        if value.is_floating_point() and not key.endswith("conv1.bias")  # batch norm undoes it
    ]
    one, other, start_ = (
        torch.cat([run[key].flatten() for key in kept]) for run in (ours, theirs, before)
    )
    # without synced batch norm it is 0.17
    assert (one - other).norm() < 0.05 * (other - start_).norm()


def test_one_step_of_two_processes_is_one_step_of_one(store: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=1, warmup_epochs=0, batch_size=11)
    train_by_two(store, tmp_path / "together", config)
    pretrain(store, tmp_path / "alone", config)
    saved = [
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("together", "alone")
    ]
    for index, state in saved[0]["optimiser"]["state"].items():
        other = saved[1]["optimiser"]["state"][index]["exp_avg"]  # a tenth of the gradient
        # not equal: rounding turns a few voxels on or off, of which these crops have few
        assert (state["exp_avg"] - other).norm() < 1e-2 * other.norm() + 1e-7, index


def test_metrics_cover_all_processes_and_are_written_once(
    store: Path, together: Path, tmp_path: Path
) -> None:
    pretrain(store, tmp_path / "alone", CONFIG)
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (together, tmp_path / "alone")
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "classification", "accuracy"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-3)


SIGNAL_ONE = """
import os, signal
from trainer.pretraining import Pretrainer
step, steps = Pretrainer.step, []
def watched(self, batch):
    losses = step(self, batch)
    steps.append(batch)
    if self.ranks.rank == 1 and len(steps) == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses
Pretrainer.step = watched
"""


def test_a_signal_to_one_process_stops_both_at_the_same_step_without_loss(
    store: Path, together: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = torchrun(store, run, before=SIGNAL_ONE, checkpoint_every=10**6)
    assert done.returncode != 0
    assert "Interrupted" in done.stderr
    saved = torch.load(run / "last.pt", weights_only=True)["progress"]
    assert saved["step"] == 8  # the next line of metrics
    train_by_two(store, run, CONFIG)
    assert (run / "metrics.jsonl").read_bytes() == (together / "metrics.jsonl").read_bytes()
    ours, theirs = weights(run), weights(together)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_number_of_processes_is_refused_without_synced_batch_norm(
    store: Path, tmp_path: Path
) -> None:
    apart = dataclasses.replace(CONFIG, sync_batch_norm=False, steps=2, warmup_epochs=0)
    train_by_two(store, tmp_path / "apart", apart)
    config = dataclasses.replace(apart, steps=4)
    with pytest.raises(TrainError, match="trained by 2 processes, but now there are 1"):
        pretrain(store, tmp_path / "apart", config)


@pytest.mark.parametrize("settings", [{"batch_size": 9, "accumulate": 3}, {"batch_size": 1}])
def test_processes_with_unequal_parts_of_a_batch_do_not_wait_for_ever(
    store: Path, tmp_path: Path, settings: dict[str, int]
) -> None:
    """Parts of 5 and 4 crops in three accumulation steps, or of one and no crop."""
    config = dataclasses.replace(CONFIG, warmup_epochs=0, steps=3, **settings)  # type: ignore[arg-type]
    train_by_two(store, tmp_path / "run", config)
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_ranks_share_an_epoch_without_overlap(store: Path) -> None:
    rows = PatchStore(store).train.label.nonzero()[0]
    plans = [EpochPlan(rows=rows, batch_size=10, rank=r, world_size=2) for r in range(2)]
    for index, parts in enumerate(zip(*(plan.batches(3) for plan in plans), strict=True)):
        assert sum(plan.share(index) for plan in plans) == pytest.approx(1)
        sizes = [len(part) for part in parts]
        assert [plan.share(index) * sum(sizes) for plan in plans] == pytest.approx(sizes)
    seen = sorted(row for plan in plans for batch in plan.batches(3) for row in batch.tolist())
    assert seen == rows.tolist()
