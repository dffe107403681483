"""Pretraining, fine-tuning or a comparison killed at random moments and run again: the same files?

    python -m tests.campaigns.resume --kills 20
    python -m tests.campaigns.resume --trainer finetune --kills 20 --signal TERM

The commands are forked from a process that has imported what most of them need. A moment is one
of the command's CPU time, which does not depend on what else the machine does.
"""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests.support.command import running_semgen, start_server
from tests.support.comparison import PLAN
from tests.support.finetuning import make_task
from tests.support.synthetic_store import make_store
from trainer.comparison.results import RESULTS, read_results

_POLL_SECONDS = 0.01
_PRETRAINING = """
width = 3
batch_size = 10
epochs = 8
warmup_epochs = 2
checkpoint_every = 3
device = "cpu"
"""
_FINE_TUNING = """
width = 4
shape = [8, 16, 16]
batch_size = 4
steps = 40
patches_per_case = 4
checkpoint_every = 3
device = "cpu"
"""
_OTHER = ("tensorboard", RESULTS, "last.pt", "best.pt")
"""Files of a run that are not compared byte by byte."""


def make_pretraining(folder: Path) -> list[object]:
    (folder / "settings.toml").write_text(_PRETRAINING)
    store = make_store(folder / "store", shape=(16, 16, 16), num_train=20)
    return ["pretrain", "--config", folder / "settings.toml", store]


def make_fine_tuning(folder: Path) -> list[object]:
    (folder / "settings.toml").write_text(_FINE_TUNING)
    task = make_task(folder / "balls", range(10))
    return ["finetune", "--config", folder / "settings.toml", task]


def make_comparison(folder: Path) -> list[object]:
    (folder / "plan.toml").write_text(PLAN.replace("balls.csv", "balls/task.csv"))
    make_task(folder / "balls", range(6))
    return ["compare", folder / "plan.toml"]


TRAINERS: dict[str, Callable[[Path], list[object]]] = {
    "pretrain": make_pretraining,
    "finetune": make_fine_tuning,
    "compare": make_comparison,
}
"""Each makes its input in a folder, and returns the command without its last argument, the run."""


class Campaign:
    """A command, and the run that it makes when nothing interrupts it."""

    def __init__(self, folder: Path, trainer: str, seed: int, number: int) -> None:
        self.folder, self.number = folder, number
        self.errors = folder / "errors"
        self.errors.touch()
        self.rng = np.random.default_rng(seed)
        self.command = TRAINERS[trainer](folder)
        start_server()
        self.seconds = 0.0
        """CPU time of the uninterrupted command."""
        assert self.run(folder / "whole", np.inf) == 0, self.errors.read_text()
        self.whole = count_lines(folder / "whole")

    def kills(self, count: int) -> tuple[Counter[str], int, int]:
        """Kill until `count` hit a running command.

        Returns kills by what the run had reached, the runs completed, and those that differ.
        """
        hits: Counter[str] = Counter()
        done = different = 0
        while hits.total() < count:
            run = self.folder / f"run{done}"
            while (code := self.run(run, self.rng.uniform(0, self.seconds))) is None:
                hits[self.reached(run)] += 1
            done += 1
            if code or not is_same(run, self.folder / "whole"):
                different += 1
                print(f"run {done} differs: {self.errors.read_text()}", flush=True)
        return hits, done, different

    def run(self, run: Path, seconds: float) -> int | None:
        """Run the command; its exit status, or None if it was signalled after some CPU time."""
        with running_semgen(*self.command, run, errors=self.errors) as job:
            process = psutil.Process(job.pid)
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
                while (used := sum(process.cpu_times()[:2])) < seconds:
                    self.seconds = max(self.seconds, used)
                    job.join(_POLL_SECONDS)
                process.send_signal(self.number)
                job.join()
                return None
            job.join()
        return job.exitcode

    def reached(self, run: Path) -> str:
        lines = count_lines(run)
        return "before training" if not lines else "training" if lines < self.whole else "the end"


def count_lines(run: Path) -> int:
    """Lines of metrics in a run, or in all of a comparison."""
    return sum(len(file.read_bytes().splitlines()) for file in run.rglob("metrics.jsonl"))


def is_same(run: Path, other: Path) -> bool:
    """Whether all results agree: metrics, scores, masks, pictures, and weights bit for bit."""
    ours, theirs = (
        {
            file.relative_to(path): file.read_bytes()
            for file in path.rglob("*")
            if file.is_file() and not any(name in file.parts for name in _OTHER)
        }
        for path in (run, other)
    )
    weights = [
        {file.relative_to(path): load_weights(file) for file in path.rglob("*.pt")}
        for path in (run, other)
    ]
    return ours == theirs and are_equal(*weights) and read_results(run) == read_results(other)


def load_weights(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def are_equal(one: Any, other: Any) -> bool:
    """Whether two values agree, tensors in them bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainer", choices=TRAINERS, default="pretrain")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        number = signal.Signals[f"SIG{chosen.signal}"]
        campaign = Campaign(Path(scratch), chosen.trainer, chosen.seed, number)
        print(f"uninterrupted: {campaign.seconds:.1f} s of CPU time", flush=True)
        hits, runs, failed = campaign.kills(chosen.kills)
    for reached, count in sorted(hits.items()):
        print(f"{count:6d} kills, reached: {reached}")
    reached = {f"reached {what}": number for what, number in hits.items()}
    print(json.dumps({"kills": hits.total(), "runs": runs, "runs that differ": failed, **reached}))
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
