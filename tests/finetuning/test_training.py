"""Prepared cases, patches, losses, and voxels to ignore."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from torch import Tensor

from tests.support.finetuning import (
    CONFIG,
    draw_case,
    make_task,
    read_rows,
    write_manifest,
)
from tests.support.progress import CountedProgress
from trainer import Noticed
from trainer.finetuning import FinetuneConfig, finetune, load_task
from trainer.finetuning.cases import Prepared, prepare_cases
from trainer.finetuning.grid import choose_grid
from trainer.finetuning.losses import make_loss
from trainer.finetuning.patches import Examples, Patches
from trainer.finetuning.scores import overlap_scores


def prepare(task: Path, cases: Path, config: FinetuneConfig = CONFIG) -> list[Prepared]:
    loaded = load_task(task)
    return prepare_cases(loaded, choose_grid(loaded, config, (-1000, 1000)), cases)


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.npy")}


# Prepared cases


def test_tasks_that_share_a_folder_of_cases_do_not_change_each_others_cases(tmp_path: Path) -> None:
    """Same names, same sizes, same times of the files; other images."""
    one, other = make_task(tmp_path / "a", range(3)), make_task(tmp_path / "b", range(3, 6))
    for file in [*one.parent.iterdir(), *other.parent.iterdir()]:
        os.utime(file, (1, 1))
    mine = prepare(one, tmp_path / "cases")
    before = read_all(tmp_path / "cases")
    theirs = prepare(other, tmp_path / "cases")
    after = read_all(tmp_path / "cases")
    assert {name: after[name] for name in before} == before
    assert not {case.digest for case in mine} & {case.digest for case in theirs}


def test_a_prepared_case_stays_when_its_image_changes(tmp_path: Path) -> None:
    task = make_task(tmp_path / "a", range(2))
    held = prepare(task, tmp_path / "cases")[0].folder
    before = read_all(held)
    sitk.WriteImage(draw_case(50)[0], str(tmp_path / "a" / "0.nii"))
    changed = prepare(task, tmp_path / "cases")[0].folder
    assert read_all(held) == before
    assert read_all(changed)["image.npy"] != before["image.npy"]


@pytest.mark.parametrize(
    "column", [{"channel": 1}, {"name": "other"}, {"mask": "1_mask.nii"}], ids=str
)
def test_another_channel_name_or_mask_gives_another_prepared_case(
    tmp_path: Path, column: dict[str, object]
) -> None:
    task = make_task(tmp_path / "a", range(2, 4, 2))
    sitk.WriteImage(sitk.Cast(draw_case(2)[1], sitk.sitkUInt8), str(tmp_path / "a" / "1_mask.nii"))
    row: dict[str, object] = {"image": "0.nii", "mask": "0_mask.nii", "name": "0", "channel": 0}
    folders = {
        prepare(write_manifest(task, [line]), tmp_path / "cases")[0].folder
        for line in (row, {**row, **column})
    }
    assert len(folders) == 2


def test_a_change_of_the_raw_file_of_an_mhd_is_noticed(tmp_path: Path) -> None:
    """LUNA16 has such files."""
    task = make_task(tmp_path / "a", range(2))
    sitk.WriteImage(draw_case(0)[0], str(tmp_path / "a" / "0.mhd"))
    write_manifest(task, [{"image": "0.mhd", "mask": "0_mask.nii"}])
    digest = prepare(task, tmp_path / "cases")[0].digest
    header = (tmp_path / "a" / "0.mhd").stat()
    sitk.WriteImage(draw_case(2)[0], str(tmp_path / "a" / "0.mhd"))
    os.utime(tmp_path / "a" / "0.mhd", ns=(header.st_atime_ns, header.st_mtime_ns))
    assert prepare(task, tmp_path / "cases")[0].digest != digest


@pytest.mark.parametrize("high", [1, 255])
def test_binary_images_with_intensity_unit_have_values_0_and_1(tmp_path: Path, high: int) -> None:
    """As `semgen task medmnist` writes them: bytes, not HU."""
    rows: list[dict[str, object]] = []
    for number in range(2):
        shape = draw_case(number)[1] * high
        sitk.WriteImage(shape, str(tmp_path / f"{number}.nii.gz"))
        rows.append({"image": f"{number}.nii.gz", "label": number, "intensity": "unit"})
    config = FinetuneConfig(shape=(14, 24, 24))
    for case in prepare(write_manifest(tmp_path / "task.csv", rows), tmp_path / "cases", config):
        assert np.unique(case.image).tolist() == [0, 1]


def test_the_intensity_of_the_settings_takes_precedence_over_the_manifest(tmp_path: Path) -> None:
    sitk.WriteImage(draw_case(0)[0], str(tmp_path / "a.nii"))
    rows: list[dict[str, object]] = [
        {"name": n, "image": "a.nii", "label": n, "intensity": "unit"} for n in "ab"
    ]
    task = load_task(write_manifest(tmp_path / "task.csv", rows))
    chosen = [
        choose_grid(task, FinetuneConfig(intensity=intensity), (0, 1)).intensity
        for intensity in ("auto", "ct", "per-image")
    ]
    assert chosen == ["unit", "ct", "per-image"]


def test_progress_counts_cases(tmp_path: Path) -> None:
    task = load_task(make_task(tmp_path / "a", range(3)))
    progress = CountedProgress()
    grid = choose_grid(task, CONFIG, (-1000, 1000))
    prepare_cases(task, grid, tmp_path / "cases", progress=progress)
    assert progress.totals == progress.units == {"cases": 3}


# Patches


def examples(task: Path, cases: Path, *, mirror: bool, role: str = "train") -> list[Examples]:
    config = replace(CONFIG, mirror=mirror)
    return list(Patches(prepare(task, cases), config, segments=True, role=role).epoch(0))


def test_mirroring_flips_image_and_mask_alike(tmp_path: Path) -> None:
    task = make_task(tmp_path / "a", range(4))
    plain, mirrored = (
        examples(task, tmp_path / "cases", mirror=mirror) for mirror in (False, True)
    )
    flips: set[tuple[int, ...]] = set()
    ways = [axes for count in range(4) for axes in itertools.combinations(range(3), count)]
    for one, other in zip(plain, mirrored, strict=True):
        for number in range(len(one)):
            fitting = [
                axes
                for axes in ways
                if torch.equal(torch.flip(one.images[number, 0], axes), other.images[number, 0])
            ]
            assert len(fitting) == 1
            flipped = torch.flip(one.truths[number], fitting[0])
            assert torch.equal(flipped, other.truths[number])
            flips.add(fitting[0])
    assert {axis for axes in flips for axis in axes} == {0, 1, 2}
    assert () in flips, "mirroring is random, so some are not mirrored"


def test_validation_is_not_mirrored(tmp_path: Path) -> None:
    task = make_task(tmp_path / "a", range(4))
    plain, mirrored = (
        examples(task, tmp_path / "cases", mirror=mirror, role="validation")
        for mirror in (False, True)
    )
    for one, other in zip(plain, mirrored, strict=True):
        assert torch.equal(one.images, other.images)


# Losses


def draw_logits(outputs: int) -> tuple[Tensor, Tensor]:
    """Logits (2, outputs, 4, 4, 4) and truth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, outputs, 4, 4, 4, generator=generator)
    return logits, torch.randint(max(2, outputs), (2, 4, 4, 4), generator=generator)


def slow_dice(probability: Tensor, truth: Tensor, classes: list[int]) -> float:
    """1 - mean over classes of 2 |both| / (|one| + |other|), over the batch."""
    scores = []
    for number in classes:
        found, wanted = probability[number], (truth == number).float()
        scores.append(2 * (found * wanted).sum() / (found.sum() + wanted.sum()))
    return 1 - float(torch.stack(scores).mean())


def slow_losses(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Dice and cross-entropy, from their definitions; any voxels as (outputs, n) and (n,)."""
    probability = logits.softmax(0)
    if len(logits) == 1:
        probability = torch.cat((1 - logits.sigmoid(), logits.sigmoid()))
    entropy = -probability.gather(0, truth[None]).log().mean()
    return slow_dice(probability, truth, list(range(1, len(probability)))), float(entropy)


def flat(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    return logits.movedim(1, 0).flatten(1), truth.flatten()


@pytest.mark.parametrize("outputs", [1, 3])
def test_losses_equal_their_definitions(outputs: int) -> None:
    logits, truth = draw_logits(outputs)
    dice, entropy = slow_losses(*flat(logits, truth))
    wanted = {"dice": dice, "cross-entropy": entropy, "dice+cross-entropy": dice + entropy}
    for kind, value in {**wanted, "auto": dice}.items():
        found = make_loss(kind, segments=True)(logits, truth.to(torch.uint8))
        assert float(found) == pytest.approx(value, abs=1e-4), kind


def test_the_default_loss_of_classification_is_cross_entropy() -> None:
    logits, truth = torch.randn(5, 3), torch.arange(5) % 3
    found = make_loss("auto", segments=False)(logits, truth)
    assert float(found) == pytest.approx(slow_losses(logits.T, truth)[1], abs=1e-5)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["dice", "cross-entropy", "dice+cross-entropy"])
def test_ignored_voxels_do_not_count_in_any_loss(kind: str, outputs: int) -> None:
    """The loss is that of the other voxels, and the gradient at ignored voxels is zero."""
    logits, truth = draw_logits(outputs)
    number = max(2, outputs)
    ignored = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    logits.requires_grad_()
    loss = make_loss(kind, segments=True, ignored=number)(
        logits, truth.masked_fill(ignored, number).to(torch.uint8)
    )
    loss.backward()
    few, known = flat(logits.detach(), truth)
    dice, entropy = slow_losses(few[:, ~ignored.flatten()], known[~ignored.flatten()])
    wanted = {"dice": dice, "cross-entropy": entropy, "dice+cross-entropy": dice + entropy}[kind]
    assert loss.item() == pytest.approx(wanted, abs=1e-4)
    assert logits.grad is not None
    gradients = logits.grad.movedim(1, -1)
    assert not gradients[ignored].any()
    assert gradients[~ignored].any()


@pytest.mark.parametrize("kind", ["dice", "cross-entropy"])
def test_a_batch_of_only_ignored_voxels_has_zero_gradients(kind: str) -> None:
    logits = torch.randn(1, 1, 2, 2, 2, requires_grad=True)
    loss = make_loss(kind, segments=True, ignored=2)(logits, torch.full((1, 2, 2, 2), 2))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert not logits.grad.any()


# Voxels to ignore


def test_ignored_voxels_do_not_count_in_any_score() -> None:
    prediction, truth = np.array([1, 1, 0, 1]), np.array([1, 2, 1, 2])
    assert overlap_scores(prediction, truth, 2, ignored=2) == {
        "dice": [pytest.approx(2 / 3)],
        "iou": [0.5],
    }


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of nnU-Net; half of each mask is marked "ignore"."""
    folder = tmp_path_factory.mktemp("tasks") / "partly"
    manifest = make_task(folder.with_name("plain"), range(6))
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number in range(6):
        shutil.copy(manifest.parent / f"{number}.nii", folder / "imagesTr")
        mask = sitk.ReadImage(str(manifest.parent / f"{number}_mask.nii"))
        mask[:, :12, :] = 2
        sitk.WriteImage(mask, str(folder / "labelsTr" / f"{number}.nii"))
    labels = {"background": 0, "ball": 1, "ignore": 2}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_patches_are_not_centred_on_ignored_voxels(partly: Path, tmp_path: Path) -> None:
    for case in prepare(partly, tmp_path / "cases"):
        assert (case.mask == 2).any()
        assert {int(case.mask[tuple(place)]) for place in case.foreground} <= {1}


def test_test_scores_leave_out_ignored_voxels(partly: Path, tmp_path: Path) -> None:
    finetune(partly, tmp_path / "run", replace(CONFIG, steps=4))
    rows = read_rows(tmp_path / "run" / "cases.csv")
    assert rows
    for row in rows:
        prediction, truth = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            for file in (
                tmp_path / "run" / "test" / f"{row['case']}.nii.gz",
                partly / "labelsTr" / f"{row['case']}.nii",
            )
        )
        assert set(np.unique(prediction)) <= {0, 1}
        wanted = overlap_scores(prediction[truth != 2], truth[truth != 2], 2)["dice"][0]
        assert float(row["dice"]) == pytest.approx(wanted, nan_ok=True)


# Settings without effect


def test_a_window_without_effect_is_reported(tmp_path: Path) -> None:
    task, events = make_task(tmp_path / "balls", range(5)), []
    config = replace(CONFIG, steps=1, intensity="per-image", window_hu=(-150, 250))
    finetune(task, tmp_path / "run", config, on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Noticed)]
    assert "window_hu has no effect with intensity 'per-image'" in notices
