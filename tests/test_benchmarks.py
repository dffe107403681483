"""Benchmarks that need a machine which is seldom at hand run here at small size."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scans import abdomen_with_organs, altered_copy
from tests.support.command import run_code
from tests.support.synthetic_store import make_store


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Like `python -m`."""
    words = [name, *arguments]
    return run_code(
        f"import runpy, sys; sys.argv = {words!r}; runpy.run_module({name!r}, None, '__main__')"
    )


def test_the_benchmark_for_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(32, 64, 64))
    small = "--device cpu --width 1 --batch-size 2 --steps 1 --warm-up 1 --threads 1"
    nets = "--nets genesis resenc-s"
    done = run_module(
        *("benchmarks.pretrain_gpu", str(store), *small.split(), *nets.split()),
        *("--plain-workers", "1", "--no-compile", "--out", str(tmp_path / "table.md")),
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    for words in (
        "resenc-s: ",
        "bf16 + channels_last_3d |",
        "cache device",
        "Perturbation alone",
        "as fast",
    ):
        assert words in table


@pytest.mark.parametrize("command", ["landmarks", "masks", "store"])
def test_the_benchmark_of_matching_runs_at_small_size(tmp_path: Path, command: str) -> None:
    if command == "store":
        store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(32, 64, 64))
        options = [str(store)]
    else:
        options = ["--seeds", "1", "--phantoms", "2", "--matrix", "32"]
        options += ["--step", "80"] if command == "masks" else ["--margin", "10"]
    done = run_module("benchmarks.anatomy", command, *options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3


def test_real_masks_lie_on_their_organs_also_in_an_altered_copy(ct: Path) -> None:
    abdomen = abdomen_with_organs(ct)
    for scan in (abdomen, altered_copy(abdomen)):
        hu = {
            organ: np.median(scan.volume.hu[scan.labels == label])
            for organ, label in scan.organs.items()
        }
        assert hu["lungs"] < -700
        assert 40 < hu["liver"] < 55
        assert hu["vertebrae"] > 120
        assert hu["ribs"] > 150
