"""Benchmarks that need a machine which is seldom at hand run here at small size."""

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proof import SIZES, open_store, run_start
from benchmarks.proof_data import make_disease, make_organs
from benchmarks.proof_tables import gather_results, planned_gains, read_complete, write_results
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


def test_shuffled_labels_keep_crops_and_sizes_of_classes(tmp_path: Path) -> None:
    make_store(tmp_path / "match", num_train=40, num_validation=10, shape=(8, 8, 8))
    right, wrong, again = (open_store(tmp_path, c, 3) for c in ("", "shuffled", "shuffled"))
    for split in ("train", "validation"):
        labels, shuffled = right.split(split).label, wrong.split(split).label
        assert (np.bincount(labels) == np.bincount(shuffled)).all()
        assert (labels != shuffled).any()
        assert (again.split(split).label == shuffled).all()
    assert (open_store(tmp_path, "shuffled", 4).train.label != wrong.train.label).any()
    assert wrong.fingerprint != right.fingerprint


def test_a_gain_is_tested_trial_by_trial() -> None:
    """Starts differ by 1 +- 0.1 in each trial, and trials by far more."""
    scores = {"scratch": [0.10, 0.50, 0.90], "restoration": [0.11, 0.512, 0.909]}
    lines = [
        {"task": "organs", "start": start, "labels": labels, "trial": trial, "score": score}
        for start, values in scores.items()
        for trial, score in enumerate(values)
        for labels in (5, 10)
    ]
    ((gain, holm),) = planned_gains(lines)
    assert (gain.one, gain.other, gain.num) == ("scratch", "restoration", 3)
    assert gain.mean == pytest.approx(0.0103, abs=1e-4)
    assert gain.low > 0
    assert gain.p_paired == holm == pytest.approx(0.0072, abs=1e-4)
    assert gain.p_welch > 0.9
    del lines[-1]  # the last trial now lacks a number of labels
    assert planned_gains(lines)[0][0].num == 2
    assert planned_gains(lines, 5)[0][0].num == 3


def test_the_proof_trains_on_phantoms_and_repeats_its_tables_without_training(
    tmp_path: Path,
) -> None:
    make_store(tmp_path / "match", num_train=3, num_validation=1, shape=(16, 16, 16))
    size = dataclasses.replace(
        SIZES["small"], matrix=16, width=1, pretrain_steps=1, pretrain_batch=2, train=1,
        organs_labels=(1,), disease_labels=(2,), organs_steps=1, disease_steps=1, batch=1,
    )  # fmt: skip
    make_organs(tmp_path / "organs", train=1, test=1, matrix=16)
    make_disease(tmp_path / "disease", train=1, test=1, matrix=16)
    starts = ("scratch", "classification-shuffled")
    for start in starts:
        run_start(tmp_path, size, 1, start, ("organs", "disease"), "cpu")
    made = []
    for _ in range(2):
        lines = gather_results(tmp_path / "compared", size.pools)
        tables = write_results(lines, tmp_path / "results")
        files = sorted((tmp_path / "results").iterdir())
        made.append([tables, *(file.read_bytes() for file in files)])
    assert [file.name for file in files] == ["figure.png", "results.jsonl", "tables.md"]
    assert made[0] == made[1]
    assert len(lines) == 2 * len(starts)
    assert {line["labels"] for line in lines} == {1, 2}
    assert tables.count("| classification-shuffled | ") == 2
    results = tmp_path / "results" / "results.jsonl"
    assert sorted(read_complete(results, 2), key=str) == sorted(lines, key=str)
    assert read_complete(results, 3) == []
