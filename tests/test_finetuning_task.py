"""Tasks as users have them: folders, manifests, and who is in which split."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from trainer import TrainError
from trainer.finetuning import FinetuneConfig, Task, load_task
from trainer.finetuning.task import deal_splits


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


def write_manifest(file: Path, rows: list[dict[str, object]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "file_ending": ".nii.gz",
}
DECATHLON = {"modality": {"0": "FLAIR"}, "labels": {"0": "background", "1": "edema", "2": "core"}}


def test_the_layout_of_nnunet(tmp_path: Path) -> None:
    task = load_task(write_folder(tmp_path / "Dataset1_Liver", NNUNET, ["a", "b"], "_0000"))
    assert (task.name, task.classes, task.segments, task.is_ct) == (
        "Dataset1_Liver", ("background", "liver"), True, True)  # fmt: skip
    assert [(case.name, case.image.name) for case in task.cases] == [
        ("a", "a_0000.nii.gz"), ("b", "b_0000.nii.gz")]  # fmt: skip
    assert task.num_outputs == 1


def test_the_layout_of_the_decathlon(tmp_path: Path) -> None:
    task = load_task(write_folder(tmp_path / "Task01", DECATHLON, ["a"], ""))
    assert (task.classes, task.is_ct) == (("background", "edema", "core"), False)
    assert task.num_outputs == 3


def test_test_images_with_labels_are_for_testing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", NNUNET, ["a", "b", "c"], "_0000")
    write_image(folder / "imagesTs" / "z_0000.nii.gz")
    write_image(folder / "labelsTs" / "z.nii.gz")
    task = deal_splits(load_task(folder), FinetuneConfig())
    assert [case.name for case in task.cases if case.split == "test"] == ["z"]


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"labels": {"background": 0, "liver": 2}}, "without a gap"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions"),
        ({"modality": {}}, "labels"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(
    tmp_path: Path, about: dict[str, object], says: str
) -> None:
    folder = write_folder(tmp_path / "t", about, ["a"], "")
    with pytest.raises(TrainError, match=says):
        load_task(folder)


def test_a_label_without_its_image_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t", NNUNET, ["a", "b"], "_0000")
    (folder / "imagesTr" / "b_0000.nii.gz").unlink()
    with pytest.raises(TrainError, match=r"b\.nii\.gz has a label but no image b_0000\.nii\.gz"):
        load_task(folder)


def test_a_manifest_of_masks_and_one_of_labels(tmp_path: Path) -> None:
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
    ("rows", "says"),
    [
        ([{"file": "a.nii.gz", "mask": "a.nii.gz"}], "needs columns image"),
        ([{"image": "a.nii.gz", "label": "1"}], "labels must differ"),
        ([{"image": "a.nii.gz", "mask": ""}], "line 2 lacks"),
        ([{"image": "no.nii.gz", "mask": "a.nii.gz"}], "no.nii.gz is missing"),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz"}] * 2, "is there twice"),
        (
            [
                {"image": "a.nii.gz", "mask": "a.nii.gz", "patient": "p", "split": "train"},
                {"image": "b.nii.gz", "mask": "a.nii.gz", "patient": "p", "split": "test"},
            ],
            "patient 'p' is in two splits",
        ),
        ([{"image": "a.nii.gz", "mask": "a.nii.gz", "split": "dev"}], "split must be one of"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    tmp_path: Path, rows: list[dict[str, object]], says: str
) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii.gz")
    with pytest.raises(TrainError, match=says):
        load_task(write_manifest(tmp_path / "m.csv", rows))


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


def test_splits_are_dealt_by_patients(twenty: Task) -> None:
    dealt = by_split(deal_splits(twenty, FinetuneConfig()))
    assert [len(patients) for patients in dealt.values()] == [6, 2, 2]
    assert len(set.union(*dealt.values())) == 10, "no patient is in two splits"
    assert by_split(deal_splits(twenty, FinetuneConfig(seed=7))) == dealt, "seed is of other draws"
    assert by_split(deal_splits(twenty, FinetuneConfig(split_seed=7))) != dealt


def test_every_patient_is_tested_on_in_one_fold(twenty: Task) -> None:
    folds = [by_split(deal_splits(twenty, FinetuneConfig(folds=3, fold=f))) for f in range(3)]
    tested = [patient for fold in folds for patient in fold["test"]]
    assert sorted(tested) == sorted({case.patient for case in twenty.cases})


def test_fewer_labels_are_part_of_more(twenty: Task) -> None:
    shares = [
        by_split(deal_splits(twenty, FinetuneConfig(label_fraction=share)))
        for share in (0.1, 0.5, 1.0)
    ]
    some, half, all_ = (share["train"] for share in shares)
    assert len(some) == 1
    assert some < half < all_
    assert shares[0]["test"] == shares[2]["test"], "testing is the same"


def test_more_folds_than_patients_are_refused(twenty: Task) -> None:
    with pytest.raises(TrainError, match="10 patients make no 11 folds"):
        deal_splits(twenty, FinetuneConfig(folds=11))
