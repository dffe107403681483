"""Benchmarks that need a machine which is seldom at hand run here at small size."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_benchmark_for_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    small = "--device cpu --width 1 --batch-size 2 --steps 1 --warm-up 1 --crops 16 --threads 1"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.pretrain_gpu", *small.split()),
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
