"""Pretraining killed at random moments and run again: the same metrics and weights?

python -m tests.campaigns.resume --kills 20
python -m tests.campaigns.resume --kills 20 --signal TERM
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.support.synthetic_store import make_store
from trainer import TrainConfig, pretrain


class Campaign:
    """A store, and the run that an uninterrupted training makes of it."""

    def __init__(self, folder: Path, seed: int, number: int) -> None:
        self.folder, self.number = folder, number
        self.rng = np.random.default_rng(seed)
        make_store(folder / "store", shape=(16, 16, 16), num_train=20)
        begun = time.perf_counter()
        assert self.start(folder / "whole").wait() == 0
        self.seconds = time.perf_counter() - begun

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.campaigns.resume", "--train"),
                *(str(self.folder / "store"), str(run)),
            ],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def kills(self, count: int) -> tuple[int, int]:
        """Kill until `count` hit a running training; runs completed, and those that differ."""
        hits = done = different = 0
        while hits < count:
            run = self.folder / f"run{done}"
            while True:
                job = self.start(run)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(self.rng.uniform(0.2, 1) * self.seconds)
                    break
                job.send_signal(self.number)
                job.wait()
                hits += 1
            done += 1
            different += job.returncode != 0 or not self.same(run)
        return done, different

    def same(self, run: Path) -> bool:
        whole = self.folder / "whole"
        lines = [(path / "metrics.jsonl").read_bytes() for path in (run, whole)]
        saved = [torch.load(path / "last.pt", weights_only=True) for path in (run, whole)]
        weights = zip(saved[0]["model"].values(), saved[1]["model"].values(), strict=True)
        return lines[0] == lines[1] and all(torch.equal(*pair) for pair in weights)


def train(store: str, run: str) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(
        width=3, batch_size=10, epochs=8, warmup_epochs=2, checkpoint_every=3, device="cpu"
    )
    pretrain(store, run, config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(Path(scratch), chosen.seed, signal.Signals[f"SIG{chosen.signal}"])
        print(f"uninterrupted: {campaign.seconds:.1f} s", flush=True)
        runs, failed = campaign.kills(chosen.kills)
    print(f"{runs} runs completed after {chosen.kills} kills or more; {failed} differ")
    sys.exit(int(failed > 0))
