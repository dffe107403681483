"""Benchmarks that need a machine which is seldom at hand run here at small size."""

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scipy import stats

from benchmarks.probe import class_task, draw_crops, find_seen, probe, scan_tasks
from benchmarks.probe import main as probe_main
from benchmarks.probe_scores import cross_validate, deal_folds, interval, resample, score
from benchmarks.proof import SIZES, open_store, run_start
from benchmarks.proof_data import make_disease, make_organs
from benchmarks.proof_tables import gather_results, planned_gains, read_complete, write_results
from benchmarks.scans import abdomen_with_organs, altered_copy
from benchmarks.transfer import Results
from pipeline import PrepareConfig
from store import PatchStore
from store.scans import scan_name
from tests.support.command import run_code
from tests.support.runs import tiny
from tests.support.synthetic_store import make_store
from trainer import pretrain
from trainer.weights import Weights


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Like `python -m`."""
    words = [name, *arguments]
    return run_code(
        f"import runpy, sys; sys.argv = {words!r}; runpy.run_module({name!r}, None, '__main__')"
    )


def test_the_benchmark_for_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(32, 32, 32))
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
    assert "failed" not in table


def test_a_failure_in_the_benchmark_for_gpus_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(16, 32, 32))
    small = "--device cpu --width 1 --batch-size 2 --steps 1 --warm-up 1 --threads 1"
    done = run_module(
        *("benchmarks.pretrain_gpu", str(store), *small.split(), "--plain-workers", "0"),
        *("--no-compile", "--out", str(tmp_path / "table.md")),
    )
    assert done.returncode == 1
    table = (tmp_path / "table.md").read_text()
    assert "| bf16 + channels_last_3d | failed: TrainError: precision bf16" in table
    assert "| tf32 | " in table
    assert "as fast" in table


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
    assert tables.count("| classification-shuffled | ") == 3  # organs also by organ
    results = tmp_path / "results" / "results.jsonl"
    assert sorted(read_complete(results, 4), key=str) == sorted(lines, key=str)
    assert read_complete(results, 5) == []


def test_trials_of_several_pretrainings_are_gathered_and_earlier_ones_count(
    tmp_path: Path,
) -> None:
    def make(trial: int, start: str, fold: int) -> dict[str, object]:
        score = 0.5 + 0.1 * (start == "genesis-joint") + 0.01 * (trial % 2) * fold
        return {
            "task": "sarcoma-ct", "start": start, "label_fraction": 1.0, "trial": trial,
            "fold": fold, "order": 0, "adds_to": None, "metric": "dice", "score": score,
            "failed": None, "leaked": [], "curve": [[1, 0.5]], "num_test": 6,
        }  # fmt: skip

    both = [
        make(trial, start, fold)
        for trial in range(2)
        for start in ("genesis-scratch", "genesis-joint")
        for fold in range(2)
    ]
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(line) + "\n" for line in both))
    results = Results(tmp_path / "results", known, 2)
    assert (results.has("sarcoma-ct", range(2)), results.has("sarcoma-ct", range(2, 4))) == (
        True,
        False,
    )
    results.add("sarcoma-ct", range(2, 4), both)
    again = Results(tmp_path / "results", known, 2)
    assert again.has("sarcoma-ct", range(4))
    assert len(again.read("sarcoma-ct")) == 16
    arguments = ("--work", str(tmp_path), "--known", str(known), "--table")
    done = run_module("benchmarks.transfer", *arguments)
    assert done.returncode == 0, done.stderr
    assert "| 100% | scratch | joint | 4 | +10.0 |" in done.stdout
    assert "| mean, pretrainings | scratch | joint | 2 | +10.0 |" in done.stdout
    with Image.open(tmp_path / "results" / "figure.png") as figure:
        assert figure.width > figure.height > 100


def test_the_probe_finds_a_class_in_features_and_nothing_for_shuffled_labels(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "store", num_train=30, num_validation=20, shape=(8, 8, 8))
    task = class_task(PatchStore(store))
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(task.labels), 12)).astype(np.float32)
    encoded = noise + 4 * np.eye(12, dtype=np.float32)[task.labels]
    shuffled = dataclasses.replace(task, labels=rng.permutation(task.labels))
    right, wrong = (
        read_scores(probe(one, {"scratch": [noise, noise], "encoded": [encoded]}))
        for one in (task, shuffled)
    )
    for column in ("kNN", "linear"):
        assert right["encoded"][column] > 95
        assert right["encoded"][f"{column}, gain"] > 60
        assert right["scratch"][column] == pytest.approx(100 / 6, abs=12)
        assert wrong["encoded"][column] == pytest.approx(100 / 6, abs=12)


def read_scores(table: str) -> dict[str, dict[str, float]]:
    """The first number of each cell, by start and column."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    )
    return {
        start: {name: float(cell.split()[0]) for name, cell in zip(header[1:], cells) if cell}
        for start, *cells in rows
    }


def test_patients_are_not_on_both_sides_and_are_resampled_whole() -> None:
    """Features tell the patient, and the label follows from the patient alone."""
    patients = np.repeat(np.arange(60), 4)
    labels = patients % 2
    folds = deal_folds(patients, labels, 5)
    for fold in range(5):
        assert np.bincount(labels[folds == fold]).tolist() == [24, 24]
        assert not np.isin(patients[folds == fold], patients[folds != fold]).any()
    features = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)[patients]
    found = cross_validate("kNN", features, labels, patients, folds, 2)
    weights = resample(patients, 500)
    samples = score(labels, found, weights)
    assert (weights[:, ::4] == weights[:, 3::4]).all()
    assert weights.sum(1).tolist() == [len(labels)] * 501
    assert samples[0] == pytest.approx(roc_auc(labels, found), abs=1e-12)
    low, high = interval(samples)
    assert 0.2 < low < samples[0] < high < 0.8


def roc_auc(labels: np.ndarray, found: np.ndarray) -> float:
    statistic = stats.mannwhitneyu(found[labels == 1, 1], found[labels == 0, 1]).statistic
    return float(statistic / np.prod(np.bincount(labels)))


def test_region_and_side_of_random_crops_are_those_of_the_scan(tmp_path: Path) -> None:
    """Limbs are dark; the left half of a chest is brighter than the right one."""
    for number, name in enumerate(("chest-0", "chest-1", "limb-2", "limb-3", "other")):
        hu = np.full((16, 48, 48), -1000, np.int16)
        is_limb = name.startswith("limb")
        hu[:, 8:40, 8:40] = 100 if is_limb else 300
        hu[:, 8:40, 24:40] += 0 if is_limb else 600
        hu[0, 0, 0] += number  # no two scans are the same
        image = SimpleITK.GetImageFromArray(hu)
        image.SetSpacing((4.0, 4.0, 4.0))
        SimpleITK.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    config = PrepareConfig(shape=(8, 8, 8), spacing_mm=(3.0, 3.0, 3.0))
    regions = [("chest-", "chest"), ("limb-", "limb")]
    seen, _ = draw_crops(tmp_path / "chest-1.nii.gz", config, 0, 0)
    region, side = scan_tasks([tmp_path], regions, {"limb"}, config, {seen}, 10)
    brightest = region.crops.voxels.max(axis=(1, 2, 3))
    assert len(brightest) == 40
    assert (region.labels == (brightest <= 100)).all()
    assert (side.labels == (brightest[side.used] > 500)).all()
    for task in (region, side):
        assert ((task.folds == -1) == (task.patients == 1)).all()
    assert 10 < len(side.used) < 20
    assert set(side.patients) == {0, 1}


def test_the_probe_writes_a_table_for_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", num_train=6, num_validation=2, shape=(8, 16, 16))
    run, file = tmp_path / "mae", tmp_path / "adrenal.npz"
    pretrain(store, run, tiny(pretext="mae", classify=False, epochs=1, warmup_epochs=0))
    images = np.random.default_rng(0).integers(0, 2, (8, 28, 28, 28), np.uint8)
    parts = {f"{split}_images": images for split in ("train", "val", "test")}
    parts |= {f"{split}_labels": np.arange(8)[:, None] % 2 for split in ("train", "val", "test")}
    np.savez(file, **parts)
    words = ("probe", store, "--runs", run, "--seeds", 2, "--adrenal", file, "--out", run / "out")
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    probe_main()
    _, classes, adrenal = (run / "out").read_text().split("**: ")
    assert "12 crops of 2 patients tested, of 24 crops of 4" in classes
    assert "8 crops of 8 patients tested, of 24 crops of 24" in adrenal
    assert list(read_scores(adrenal)) == ["voxels", "scratch", "mae"]
    assert read_scores(adrenal)["voxels"]["kNN"] == 100  # the images of the test are known


def test_patients_of_training_are_seen_and_those_of_validation_are_not(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_train=3, num_validation=1, shape=(8, 16, 16))
    weights = Weights({}, {"scans": [scan_name(scan) for scan in (0, 1, 2, 3, 99)]})
    assert find_seen(PatchStore(store), [weights]) == {scan_name(scan) for scan in (0, 1, 99)}
