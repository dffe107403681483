"""Tasks: folders and manifests, settings that do not fit, and the split of each case."""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from tests.support.finetuning import write_manifest
from trainer import TrainError
from trainer.finetuning import FinetuneConfig, Task, load_task
from trainer.finetuning.config import Loss
from trainer.finetuning.loading import fit_task
from trainer.finetuning.splits import assign_splits


def write_image(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 8, 8), np.int16)), str(file))
    return file


def write_folder(folder: Path, about: dict[str, object], names: list[str], suffix: str) -> Path:
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(about))
    for name in names:
        write_image(folder / "imagesTr" / f"{name}{suffix}.nii.gz")
        write_image(folder / "labelsTr" / f"{name}.nii.gz")
    return folder


NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "file_ending": ".nii.gz",
}
DECATHLON = {"modality": {"0": "FLAIR"}, "labels": {"0": "background", "1": "edema", "2": "core"}}


def test_the_folder_layout_of_nnunet_is_read(tmp_path: Path) -> None:
    task = load_task(write_folder(tmp_path / "Dataset1_Liver", NNUNET, ["a", "b"], "_0000"))
    assert (task.name, task.classes, task.segments, task.intensity) == (
        "Dataset1_Liver", ("background", "liver"), True, "ct")  # fmt: skip
    assert [(case.name, case.image.name) for case in task.cases] == [
        ("a", "a_0000.nii.gz"), ("b", "b_0000.nii.gz")]  # fmt: skip
    assert task.num_outputs == 1


def test_the_folder_layout_of_the_decathlon_is_read(tmp_path: Path) -> None:
    task = load_task(write_folder(tmp_path / "Task01", DECATHLON, ["a"], ""))
    assert (task.classes, task.intensity) == (("background", "edema", "core"), "per-image")
    assert task.num_outputs == 3


def test_images_in_imagests_are_test_cases(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", NNUNET, ["a", "b", "c"], "_0000")
    write_image(folder / "imagesTs" / "z_0000.nii.gz")
    write_image(folder / "labelsTs" / "z.nii.gz")
    task = assign_splits(load_task(folder), FinetuneConfig())
    assert [case.name for case in task.cases if case.split == "test"] == ["z"]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"labels": {"background": 0, "liver": 2}}, "without a gap"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "region-based"),
        ({"modality": {}}, "labels"),
    ],
)
def test_an_invalid_dataset_json_is_refused(
    tmp_path: Path, about: dict[str, object], message: str
) -> None:
    folder = write_folder(tmp_path / "t", about, ["a"], "")
    with pytest.raises(TrainError, match=message):
        load_task(folder)


def test_the_ignore_label_of_nnunet_is_not_a_class(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "ignore": 2}
    task = load_task(write_folder(tmp_path / "t", {"labels": labels}, ["a"], ""))
    assert task.classes == ("background", "liver")
    assert (task.ignored, task.num_labels, task.num_outputs) == (2, 3, 1)


def test_an_ignore_label_that_is_not_the_highest_is_refused(tmp_path: Path) -> None:
    labels = {"background": 0, "ignore": 1, "liver": 2}
    folder = write_folder(tmp_path / "t", {"labels": labels}, ["a"], "")
    with pytest.raises(TrainError, match="'ignore' must have the highest number"):
        load_task(folder)


TWO_CHANNELS = {**NNUNET, "channel_names": {"0": "CT", "1": "PET"}}


def write_two_channels(folder: Path) -> Path:
    write_folder(folder, TWO_CHANNELS, ["a", "b"], "_0000")
    for name in ("a", "b"):
        write_image(folder / "imagesTr" / f"{name}_0001.nii.gz")
    return folder


def test_one_of_several_channels_must_be_chosen(tmp_path: Path) -> None:
    task = load_task(write_two_channels(tmp_path / "t"))
    with pytest.raises(TrainError, match=r"2 channels \(0 CT, 1 PET\).*give --channel"):
        fit_task(task, FinetuneConfig())
    with pytest.raises(TrainError, match="channel must be below 2, got 2"):
        fit_task(task, FinetuneConfig(channel=2))


@pytest.mark.parametrize(("channel", "intensity"), [(0, "ct"), (1, "per-image")])
def test_the_channel_selects_a_file_of_nnunet(tmp_path: Path, channel: int, intensity: str) -> None:
    task = load_task(write_two_channels(tmp_path / "t"))
    task = fit_task(task, FinetuneConfig(channel=channel))
    assert {c.image.name for c in task.cases} == {f"{n}_000{channel}.nii.gz" for n in "ab"}
    assert (task.intensity, task.channel) == (intensity, channel)


def test_the_channel_is_read_from_the_single_file_of_the_decathlon(tmp_path: Path) -> None:
    about = {**DECATHLON, "modality": {"0": "FLAIR", "1": "CT"}}
    task = load_task(write_folder(tmp_path / "t", about, ["a_0000", "b"], ""))
    task = fit_task(task, FinetuneConfig(channel=1))
    assert {c.image.name for c in task.cases} == {"a_0000.nii.gz", "b.nii.gz"}
    assert ({c.channel for c in task.cases}, task.intensity) == ({1}, "ct")


def test_a_channel_file_that_dataset_json_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", NNUNET, ["a"], "_0000")
    write_image(folder / "imagesTr" / "a_0001.nii.gz")
    with pytest.raises(TrainError, match=r"a_0001\.nii\.gz, but dataset\.json names 1 channels"):
        load_task(folder)


def test_a_hidden_file_among_the_labels_is_ignored(tmp_path: Path) -> None:
    """Its name without the ending is empty, and would name the folder of all cases."""
    folder = write_folder(tmp_path / "t", NNUNET, ["a"], "_0000")
    write_image(folder / "labelsTr" / ".nii.gz")
    write_image(folder / "imagesTr" / ".nii.gz")
    assert [case.name for case in load_task(folder).cases] == ["a"]


def test_a_label_without_an_image_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", NNUNET, ["a", "b"], "_0000")
    (folder / "imagesTr" / "b_0000.nii.gz").unlink()
    with pytest.raises(TrainError, match=r"b\.nii\.gz has a label but no image b_0000\.nii\.gz"):
        load_task(folder)


def test_manifests_of_masks_and_of_labels_are_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.nii.gz")
        write_image(tmp_path / "masks" / f"{name}.nii.gz")
    masks = [
        {"image": f"images/{n}.nii.gz", "mask": f"masks/{n}.nii.gz", "patient": "p"} for n in "ab"
    ]
    task = load_task(write_manifest(tmp_path / "masks.csv", masks))
    assert (task.segments, {case.patient for case in task.cases}) == (True, {"p"})
    labels = [{"image": f"images/{n}.nii.gz", "label": v} for n, v in (("a", "10"), ("b", "9"))]
    task = load_task(write_manifest(tmp_path / "labels.csv", labels))
    assert task.classes == ("9", "10"), "numbers are ordered as numbers"
    assert [case.label for case in task.cases] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a.nii.gz", "mask": "a.nii.gz"}], "needs columns image"),
        ([{"image": "a.nii.gz", "label": "1"}], "at least two different labels"),
        ([{"image": "a.nii.gz", "mask": ""}], "line 2: image or mask is empty"),
        ([{"image": "no.nii.gz", "mask": "a.nii.gz"}], "no.nii.gz is missing"),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz"}] * 2, "two cases are named"),
        (
            [
                {"image": "a.nii.gz", "mask": "a.nii.gz", "patient": "p", "split": "train"},
                {"image": "b.nii.gz", "mask": "a.nii.gz", "patient": "p", "split": "test"},
            ],
            "patient 'p' is in two splits",
        ),
        (
            [{"image": "a.nii.gz", "mask": "a.nii.gz", "split": "dev"}],
            "line 2: split must be one of",
        ),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz", "channel": "x"}], "line 2: channel must be"),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz", "channel": -1}], "line 2: channel must be"),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz", "intensity": "mr"}], "intensity must be one"),
        (
            [
                {"image": "a.nii.gz", "label": "0", "intensity": "ct"},
                {"image": "b.nii.gz", "label": "1", "intensity": "unit"},
            ],
            "intensity must be the same on all lines",
        ),
        (
            [
                {"image": "a.nii.gz", "label": "0", "x_mm": 1, "y_mm": 2, "z_mm": 3},
                {"image": "b.nii.gz", "label": "1"},
            ],
            "on all lines, or on none",
        ),
        (
            [{"image": "a.nii.gz", "mask": "a.nii.gz", "x_mm": 1, "y_mm": 2, "z_mm": 3}],
            "are for labels, not for masks",
        ),
        (
            [
                {"image": "a.nii.gz", "label": "0", "x_mm": 1, "y_mm": "nan", "z_mm": 3},
                {"image": "b.nii.gz", "label": "1", "x_mm": 1, "y_mm": 2, "z_mm": 3},
            ],
            "line 2: x_mm, y_mm, z_mm must be finite",
        ),
    ],
)
def test_an_invalid_manifest_is_refused(
    tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii.gz")
    with pytest.raises(TrainError, match=message):
        load_task(write_manifest(tmp_path / "m.csv", rows))


@pytest.mark.parametrize("name", ["..", ".", ".a", "a/b", "/a", "a\\b", "a\tb"])
def test_a_case_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "a.nii.gz")
    rows: list[dict[str, object]] = [{"name": name, "image": "a.nii.gz", "mask": "a.nii.gz"}]
    with pytest.raises(TrainError, match=r"m\.csv: line 2: .* must be a plain file name"):
        load_task(write_manifest(tmp_path / "m.csv", rows))


@pytest.mark.parametrize("image", [".hidden.nii.gz", "a/.."])
def test_an_image_whose_name_could_leave_the_folder_needs_a_name(
    tmp_path: Path, image: str
) -> None:
    write_image(tmp_path / "a" / "b.nii.gz")
    write_image(tmp_path / ".hidden.nii.gz")
    row: dict[str, object] = {"image": image, "mask": "a/b.nii.gz"}
    with pytest.raises(TrainError, match=r"line 2: .* must be a plain file name"):
        load_task(write_manifest(tmp_path / "m.csv", [row]))
    task = load_task(write_manifest(tmp_path / "m.csv", [{**row, "name": "other"}]))
    assert task.cases[0].name == "other"


def test_similar_names_are_different_cases(tmp_path: Path) -> None:
    names = ("a b", "a_b", "a+b", "é")
    rows = []
    for name in names:
        write_image(tmp_path / f"{name}.nii.gz")
        rows.append({"image": f"{name}.nii.gz", "mask": f"{name}.nii.gz"})
    task = load_task(write_manifest(tmp_path / "m.csv", rows))
    assert [case.name for case in task.cases] == list(names)


@pytest.mark.parametrize("intensity", ["ct", "per-image", "unit"])
def test_the_manifest_sets_the_intensity(tmp_path: Path, intensity: str) -> None:
    write_image(tmp_path / "a.nii.gz")
    rows: list[dict[str, object]] = [
        {"name": n, "image": "a.nii.gz", "label": n, "intensity": intensity} for n in "ab"
    ]
    assert load_task(write_manifest(tmp_path / "m.csv", rows)).intensity == intensity


# Settings without effect on a task


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A manifest of two whole images of different labels."""
    write_image(tmp_path / "a.nii.gz")
    return write_manifest(
        tmp_path / "labels.csv", [{"name": n, "image": "a.nii.gz", "label": n} for n in "ab"]
    )


@pytest.mark.parametrize("loss", [loss for loss in get_args(Loss) if "dice" in loss])
def test_a_dice_loss_is_refused_when_classifying(labels: Path, loss: str) -> None:
    with pytest.raises(TrainError, match=f"loss '{re.escape(loss)}' needs masks"):
        fit_task(load_task(labels), FinetuneConfig(loss=loss))


def test_a_spacing_is_refused_when_whole_images_are_classified(labels: Path) -> None:
    with pytest.raises(TrainError, match="spacing has no effect"):
        fit_task(load_task(labels), FinetuneConfig(spacing_mm=(1, 1, 1)))


def test_a_spacing_is_accepted_when_crops_around_centres_are_classified(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz")
    centre = {"image": "a.nii.gz", "x_mm": 1, "y_mm": 2, "z_mm": 3}
    rows = [{"name": n, "label": n, **centre} for n in "ab"]
    task = load_task(write_manifest(tmp_path / "centres.csv", rows))
    assert fit_task(task, FinetuneConfig(spacing_mm=(1, 1, 1))).has_centres


def test_a_negative_split_seed_is_refused() -> None:
    with pytest.raises(TrainError, match="split_seed must be >= 0, got -1"):
        FinetuneConfig(split_seed=-1)


# Splits


@pytest.fixture
def twenty(tmp_path: Path) -> Task:
    """Ten patients of two images each."""
    rows = []
    for number in range(20):
        write_image(tmp_path / f"{number:02d}.nii.gz")
        rows.append({"image": f"{number:02d}.nii.gz", "mask": "00.nii.gz", "patient": number // 2})
    return load_task(write_manifest(tmp_path / "m.csv", rows))


def by_split(task: Task) -> dict[str, set[str]]:
    return {
        split: {case.patient for case in task.cases if case.split == split}
        for split in ("train", "validation", "test")
    }


def test_patients_are_assigned_to_splits_by_split_seed(twenty: Task) -> None:
    assigned = by_split(assign_splits(twenty, FinetuneConfig()))
    assert [len(patients) for patients in assigned.values()] == [6, 2, 2]
    assert len(set.union(*assigned.values())) == 10, "no patient is in two splits"
    assert by_split(assign_splits(twenty, FinetuneConfig(seed=7))) == assigned, (
        "seed is for other draws"
    )
    assert by_split(assign_splits(twenty, FinetuneConfig(split_seed=7))) != assigned


def test_crops_of_one_image_are_in_one_split_without_patients(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        image = f"{number // 4}.nii.gz"
        write_image(tmp_path / image)
        centre = {"x_mm": number, "y_mm": 2, "z_mm": 3}
        rows.append({"image": image, "name": number, "label": number % 2, **centre})
    task = assign_splits(load_task(write_manifest(tmp_path / "m.csv", rows)), FinetuneConfig())
    splits: dict[str, set[str | None]] = {}
    for case in task.cases:
        splits.setdefault(case.image.name, set()).add(case.split)
    assert [len(found) for found in splits.values()] == [1] * 5
    assert set.union(*splits.values()) == {"train", "validation", "test"}


def test_every_patient_is_a_test_patient_in_exactly_one_fold(twenty: Task) -> None:
    folds = [by_split(assign_splits(twenty, FinetuneConfig(folds=3, fold=f))) for f in range(3)]
    tested = [patient for fold in folds for patient in fold["test"]]
    assert sorted(tested) == sorted({case.patient for case in twenty.cases})


def test_a_smaller_share_of_labels_is_a_subset_of_a_larger_one(twenty: Task) -> None:
    shares = [
        by_split(assign_splits(twenty, FinetuneConfig(label_fraction=share)))
        for share in (0.1, 0.5, 1.0)
    ]
    some, half, all_ = (share["train"] for share in shares)
    assert len(some) == 1
    assert some < half < all_
    assert shares[0]["test"] == shares[2]["test"], "testing is the same"


def test_more_folds_than_patients_are_refused(twenty: Task) -> None:
    with pytest.raises(TrainError, match=r"11 folds need at least 11 patients .* has only 10"):
        assign_splits(twenty, FinetuneConfig(folds=11))
