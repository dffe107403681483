"""Benchmarks that need a machine which is seldom at hand run here at small size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT
from tests.support.synthetic_store import make_store


def test_the_benchmark_for_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(32, 64, 64))
    small = "--device cpu --width 1 --batch-size 2 --steps 1 --warm-up 1 --threads 1"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.pretrain_gpu", str(store), *small.split()),
            *("--plain-workers", "1", "--no-compile", "--out", str(tmp_path / "table.md")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    for words in ("bf16 + channels_last_3d |", "cache device", "Perturbation alone", "as fast"):
        assert words in table


@pytest.mark.parametrize("command", ["landmarks", "masks", "store"])
def test_the_benchmark_of_matching_runs_at_small_size(tmp_path: Path, command: str) -> None:
    if command == "store":
        store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(32, 64, 64))
        options = [str(store)]
    else:
        options = ["--seeds", "1", "--phantoms", "2", "--matrix", "32"]
        options += ["--step", "80"] if command == "masks" else ["--margin", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.anatomy", command, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
