"""Training on z-scores: each crop's HU, less the mean of its scan, over its standard deviation."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from store import PatchStore
from tests.support.finetuning import CONFIG, make_task
from tests.support.runs import SHAPE, assert_same_run, read_metrics, tiny
from tests.support.synthetic_store import make_store
from trainer import TrainConfig, TrainError, export_weights, load_unet, perturb, pretrain
from trainer.checkpoint import RunState, load_checkpoint
from trainer.data.dataset import Batch, PatchDataset
from trainer.finetuning import finetune, predict
from trainer.pretraining import Pretrainer
from trainer.setup import set_up
from trainer.weights import read_weights

ZSCORE = tiny(normalise="zscore")


def make_pretrainer(store: Path, run: Path, config: TrainConfig) -> Pretrainer:
    return Pretrainer(set_up(PatchStore(store), run, config), RunState(joint=True))


def first_batch(store: PatchStore) -> Batch:
    return next(PatchDataset(store, batch_size=16, normalise="zscore").batches(0))


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six epochs, 54 steps."""
    run = tmp_path_factory.mktemp("runs") / "zscore"
    config = tiny(
        normalise="zscore", pretext="inpainting", width=4, epochs=6, warmup_epochs=0,
        classify=False, batch_size=8, learning_rate=3e-3,
    )  # fmt: skip
    pretrain(store, run, config)
    return run


def test_a_crop_less_the_mean_of_its_scan_over_its_deviation(store: Path) -> None:
    opened = PatchStore(store)
    batch = first_batch(opened)
    scan = opened.train.scan[batch.rows]
    assert len(np.unique(scan)) > 1
    hu = np.clip(opened.train.read(batch.rows), -1000, 1000)[:, None].astype(np.float64)
    mean, std = (
        column[scan][:, None, None, None, None]
        for column in (opened.scans.mean_hu, opened.scans.std_hu)
    )
    assert batch.zscores is not None
    scores = batch.zscores.apply(batch.images())
    np.testing.assert_allclose(scores.numpy(), (hu - mean) / std, atol=1e-5)
    assert scores.min() < -1  # not a range of 0 to 1
    torch.testing.assert_close(batch.zscores.undo(scores), batch.images(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pretext", ["restoration", "mae", "rotation"])
def test_crops_are_perturbed_in_the_window_then_mapped(store: Path, pretext: str) -> None:
    config = tiny(normalise="zscore", pretext=pretext)
    batch = first_batch(PatchStore(store))
    plain = perturb(dataclasses.replace(batch, zscores=None), config)
    mapped = perturb(batch, config)
    assert plain.inputs.min() >= 0
    assert batch.zscores is not None
    assert torch.equal(mapped.inputs, batch.zscores.apply(plain.inputs))
    if pretext == "rotation":  # its target is a label
        assert torch.equal(mapped.target, plain.target)
    else:
        assert torch.equal(mapped.target, batch.zscores.apply(batch.images()))


def test_z_scores_are_restored_without_a_sigmoid(run: Path) -> None:
    net = load_unet(run)
    restored = net(torch.full((1, 1, *SHAPE), -0.5)).restored
    assert restored is not None
    assert restored.min() < 0
    lines = [line for line in read_metrics(run) if line["kind"] == "validation"]
    first, last = lines[0], lines[-1]
    assert last["inpainting"] < 0.5 * first["inpainting"]
    assert last["inpainting"] < 0.8  # about that of the crops' mean


def test_pictures_show_the_window_as_0_to_1(store: Path, tmp_path: Path) -> None:
    pretrainer = make_pretrainer(store, tmp_path, ZSCORE)
    shown = pretrainer.objective.restore(pretrainer.net, pretrainer.pictured)
    images = pretrainer.pictured.images()
    torch.testing.assert_close(shown["original"], images, atol=1e-6, rtol=0)
    assert -1e-6 <= shown["perturbed"].min() <= shown["perturbed"].max() <= 1 + 1e-6


def test_classes_weigh_as_much_as_in_the_window(store: Path, tmp_path: Path) -> None:
    def weight(**settings: object) -> float:
        config = tiny(**settings)
        return make_pretrainer(store, tmp_path, config).objective.classification_weight

    assert weight() == 0.01
    assert weight(normalise="zscore") == pytest.approx(0.2)
    assert weight(normalise="zscore", pretext="rotation") == 1
    assert weight(normalise="zscore", classification_weight=0.5) == 0.5


def test_weights_say_so_and_a_run_that_starts_from_them_does_the_same(
    run: Path, store: Path, tmp_path: Path
) -> None:
    exported = export_weights(run, tmp_path / "w.safetensors")
    assert exported["normalise"] == read_weights(run).metadata["normalise"] == "zscore"
    for init in (run, tmp_path / "w.safetensors"):
        config = tiny(width=4, init=str(init), init_part="unet")
        setup = set_up(PatchStore(store), tmp_path, config)
        assert setup.config.normalise == setup.facts["normalise"] == "zscore"
        assert setup.net.out_tr.activation == "linear"
    assert set_up(PatchStore(store), tmp_path, tiny()).facts["normalise"] == "window"


def test_fine_tuning_from_them_sees_z_scores(run: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path / "task", range(6))
    config = dataclasses.replace(CONFIG, init=str(run), shape=SHAPE, steps=2, test_fraction=0.4)
    tuned, image = tmp_path / "tuned", tmp_path / "task" / "0.nii"
    finetune(task, tuned, config)
    saved = load_checkpoint(tuned / "best.pt")
    assert saved["task"]["grid"]["intensity"] == "ct-zscore"
    assert read_weights(tuned).metadata["normalise"] == "zscore"
    (folder,) = (tuned / "cases").glob("*/")
    seen = [np.load(file) for file in folder.glob("*/image.npy")]
    assert len(seen) == 6
    for values in seen:  # of the same spacing as the image, so that nothing is resampled
        assert values.mean() == pytest.approx(0, abs=0.02)
        assert values.std() == pytest.approx(1, abs=0.02)
    (mask,) = predict(tuned, image, tmp_path / "mask.nii.gz")
    assert mask.exists()


def test_a_resumed_run_is_the_same(store: Path, tmp_path: Path) -> None:
    pretrain(store, tmp_path / "whole", ZSCORE)
    for config in (tiny(normalise="zscore", epochs=2), tiny()):  # without naming it again
        pretrain(store, tmp_path / "run", config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["normalise"] == "zscore"
    with pytest.raises(TrainError, match="normalise: zscore -> window"):
        pretrain(store, tmp_path / "run", tiny(normalise="window"))


def test_a_store_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    old = make_store(tmp_path / "old.store", shape=SHAPE, statistics=False)
    with pytest.raises(TrainError, match=r"old\.store: was made by an earlier version.*zscore"):
        pretrain(old, tmp_path / "run", ZSCORE)
    assert set_up(PatchStore(old), tmp_path, tiny()).config.normalise == "window"
