"""How threads that wait behave where other processes use the same cores.

    python -m benchmarks.shared_machine --rounds 3

60 steps of the autoencoder's training, two threads, alone and beside two processes that never
rest, under each way in which OpenMP's threads may wait. Seconds of wall time, the least and the
largest of the rounds, and whether the weights are the same bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

WAYS = {
    "as OpenMP comes": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
}
_WORK = """
import hashlib, tempfile, time
from pathlib import Path
import numpy as np, torch
from pipeline.config import AutoencoderConfig
from pipeline.training import train_autoencoder
config = AutoencoderConfig(max_steps=60)
torch.set_num_threads(config.threads)
shape = (40, 64, 128, 128)
scans = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
with tempfile.TemporaryDirectory() as folder:
    begun = time.perf_counter()
    model, _ = train_autoencoder(lambda rows: scans[rows], train=np.arange(36),
        validation=np.arange(36, 40), config=config, seed=0, checkpoint=Path(folder) / "none")
    seconds = time.perf_counter() - begun
values = b"".join(t.numpy().tobytes() for t in model.state_dict().values())
print(seconds, hashlib.sha256(values).hexdigest())
"""


@contextmanager
def company(count: int) -> Iterator[None]:
    """So many processes that never rest."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(way: dict[str, str]) -> tuple[float, str]:
    """Seconds and the weights' digest."""
    known = {name for settings in WAYS.values() for name in settings}
    environment = {k: v for k, v in os.environ.items() if k not in known} | way
    done = subprocess.run(
        [sys.executable, "-c", _WORK], env=environment, capture_output=True, text=True, check=True
    )
    seconds, digest = done.stdout.split()
    return float(seconds), digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    taken: dict[tuple[str, int], list[float]] = {}
    digests = set()
    for _ in range(rounds):
        for others in (0, 2):
            for name, way in WAYS.items():
                with company(others):
                    seconds, digest = measure(way)
                taken.setdefault((name, others), []).append(seconds)
                digests.add(digest)
    print("| threads wait | alone, s | beside two busy processes, s |\n| --- | --- | --- |")
    for name in WAYS:
        cells = [f"{min(t):.1f} to {max(t):.1f}" for t in (taken[name, 0], taken[name, 2])]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{'The same bytes' if len(digests) == 1 else 'DIFFERENT bytes'}, {rounds} rounds.")


if __name__ == "__main__":
    main()
