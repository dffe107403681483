"""Prediction: its inputs, its outputs, and what is refused before anything is written."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from click.testing import CliRunner

from cli import main
from pipeline.phantom.files import write_dicom
from pipeline.phantom.patients import draw_phantom
from tests.support.finetuning import CONFIG, draw_case, make_task, read_rows, write_manifest
from tests.support.progress import CountedProgress
from trainer import TrainError
from trainer.finetuning import finetune, predict
from trainer.finetuning.inference import Predictor

BRIEF = replace(CONFIG, width=2, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Path:
    """Segments, badly."""
    finetune(make_task(folder / "balls", range(5)), folder / "segmenter", BRIEF)
    return folder / "segmenter"


def make_labels(folder: Path, **columns: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for number in range(6):
        sitk.WriteImage(draw_case(2 * number)[0], str(folder / f"{number}.nii"))
        rows.append({"image": f"{number}.nii", "label": f"is {number % 2}", **columns})
    return write_manifest(folder / "task.csv", rows)


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    """Classifies whole images, badly."""
    finetune(make_labels(folder / "labels"), folder / "classifier", BRIEF)
    return folder / "classifier"


CENTRE = {"x_mm": 12, "y_mm": 12, "z_mm": 14}
SPACED = replace(BRIEF, spacing_mm=(2.0, 1.5, 1.5))


@pytest.fixture(scope="module")
def centred(folder: Path) -> Path:
    """Classifies crops around given centres."""
    finetune(make_labels(folder / "centres", **CENTRE), folder / "centred", SPACED)
    return folder / "centred"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, seed in (("a", 100), ("b", 101)):
        sitk.WriteImage(draw_case(seed)[0], str(folder / f"{name}.nii.gz"))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# Files that would be lost


def same_file(images: Path) -> tuple[Path, Path]:
    return images / "a.nii.gz", images / "a.nii.gz"


def same_file_by_another_path(images: Path) -> tuple[Path, Path]:
    return images / "a.nii.gz", images / ".." / "images" / "a.nii.gz"


def hard_link(images: Path) -> tuple[Path, Path]:
    os.link(images / "a.nii.gz", images.parent / "mask.nii.gz")
    return images / "a.nii.gz", images.parent / "mask.nii.gz"


def symbolic_link(images: Path) -> tuple[Path, Path]:
    (images.parent / "mask.nii.gz").symlink_to(images / "a.nii.gz")
    return images / "a.nii.gz", images.parent / "mask.nii.gz"


def same_folder(images: Path) -> tuple[Path, Path]:
    return images, images


def folder_by_a_link(images: Path) -> tuple[Path, Path]:
    (images.parent / "masks").symlink_to(images)
    return images, images.parent / "masks"


def folder_of_links(images: Path) -> tuple[Path, Path]:
    (images.parent / "masks").mkdir()
    os.link(images / "b.nii.gz", images.parent / "masks" / "b.nii.gz")
    return images, images.parent / "masks"


@pytest.mark.parametrize(
    "name_paths",
    [same_file, same_file_by_another_path, hard_link, symbolic_link, same_folder, folder_by_a_link,
     folder_of_links],
)  # fmt: skip
def test_an_input_image_is_never_replaced(
    segmenter: Path, images: Path, name_paths: Callable[[Path], tuple[Path, Path]]
) -> None:
    source, out = name_paths(images)
    before = snapshot(images.parent)
    with pytest.raises(TrainError, match=r"would replace the input [ab]"):
        predict(segmenter, source, out)
    assert snapshot(images.parent) == before


def test_masks_are_not_written_into_the_folder_of_images(segmenter: Path, images: Path) -> None:
    """The next prediction would read them as images."""
    for name in ("a", "b"):
        (images / f"{name}.nii.gz").rename(images / f"{name}_0000.nii.gz")
    before = snapshot(images)
    with pytest.raises(TrainError, match="masks would be mixed with the images"):
        predict(segmenter, images, images)
    assert snapshot(images) == before


def test_images_whose_masks_would_have_the_same_name_are_refused(
    segmenter: Path, images: Path
) -> None:
    image = draw_case(0)[0]
    for name in ("a_0000.nii.gz", "a.nrrd"):
        sitk.WriteImage(image, str(images / name))
    message = r"would get the mask file a\.nii\.gz: a\.nii\.gz, a\.nrrd, a_0000\.nii\.gz"
    with pytest.raises(TrainError, match=message):
        predict(segmenter, images, images.parent / "masks")
    assert not (images.parent / "masks").exists()


def test_predicting_again_replaces_the_masks(segmenter: Path, images: Path) -> None:
    for _ in range(2):
        written = predict(segmenter, images, images.parent / "masks")
    assert [file.name for file in written] == ["a.nii.gz", "b.nii.gz"]
    assert sorted(f.name for f in (images.parent / "masks").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_file_where_a_folder_of_masks_is_needed_is_refused(segmenter: Path, images: Path) -> None:
    out = images.parent / "masks"
    out.touch()
    with pytest.raises(TrainError, match="masks: is a file; give a folder"):
        predict(segmenter, images, out)


def test_a_mask_as_mhd_is_refused(segmenter: Path, images: Path) -> None:
    """Its voxels would go to a second file, under a temporary name."""
    with pytest.raises(TrainError, match=r"mask\.mhd: \.mhd cannot be written.* use \.mha"):
        predict(segmenter, images / "a.nii.gz", images.parent / "mask.mhd")
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_images_with_suffixes_in_upper_case_are_found(segmenter: Path, images: Path) -> None:
    (images / "b.nii.gz").rename(images / "B.NII.GZ")
    written = predict(segmenter, images, images.parent / "masks")
    assert [file.name for file in written] == ["B.nii.gz", "a.nii.gz"]


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
def test_a_mask_can_be_written_in_other_formats(segmenter: Path, images: Path, ending: str) -> None:
    (written,) = predict(segmenter, images / "a.nii.gz", images.parent / f"mask{ending}")
    assert sitk.ReadImage(str(written)).GetSize() == draw_case(100)[0].GetSize()
    assert {path.name for path in images.parent.iterdir()} == {"images", written.name}


def test_progress_counts_cases(segmenter: Path, images: Path) -> None:
    progress = CountedProgress()
    predict(segmenter, images, images.parent / "masks", progress=progress)
    assert progress.totals == progress.units == {"predict": 2}


@pytest.mark.parametrize("name", ["out.nii.gz", "out", "a.nii.gz"])
def test_probabilities_are_written_as_csv_only(classifier: Path, images: Path, name: str) -> None:
    before = snapshot(images)
    with pytest.raises(TrainError, match=r"give a file that ends in \.csv"):
        predict(classifier, images / "a.nii.gz", images / name)
    assert snapshot(images) == before


# DICOM


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_dicom(draw_phantom(5, 20, matrix=16, protocol="chest"), tmp_path / "series")
    return tmp_path / "series"


def change(run: Path, copy: Path, **facts: dict[str, Any]) -> Path:
    """A copy of a run with another grid, task or settings in its checkpoint."""
    saved = torch.load(run / "best.pt", weights_only=True)
    saved["task"]["grid"] |= facts.get("grid", {})
    saved["task"] |= facts.get("task", {})
    saved["config"] |= facts.get("config", {})
    copy.mkdir()
    torch.save(saved, copy / "best.pt")
    return copy


def test_a_dicom_folder_gives_one_mask_on_its_grid(
    segmenter: Path, series: Path, tmp_path: Path
) -> None:
    coarse = change(segmenter, tmp_path / "run", grid={"spacing_mm": [16.0, 24.0, 24.0]})
    (written,) = predict(coarse, series, series.parent / "mask.nii.gz")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    image, mask = reader.Execute(), sitk.ReadImage(str(written))
    assert mask.GetSize() == image.GetSize()
    assert mask.GetDirection() == pytest.approx(image.GetDirection())
    assert mask.GetOrigin() == pytest.approx(image.GetOrigin(), abs=1e-3)
    assert mask.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-3)
    assert set(np.unique(sitk.GetArrayViewFromImage(mask))) <= {0, 1}


def test_a_dicom_folder_is_classified_as_one_image(classifier: Path, series: Path) -> None:
    predict(classifier, series, series.parent / "out.csv")
    assert [row["image"] for row in read_rows(series.parent / "out.csv")] == ["series"]


def test_an_empty_folder_is_refused(segmenter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match="empty: has no files; give an image, or a folder"):
        predict(segmenter, tmp_path / "empty", tmp_path / "out")


def test_a_mask_is_not_written_into_its_dicom_folder(segmenter: Path, series: Path) -> None:
    with pytest.raises(TrainError, match="masks would be mixed with the images"):
        predict(segmenter, series, series / "mask.nii.gz")


# Crops around given centres


def test_prediction_on_centres_gives_the_same_probabilities_as_the_test(
    centred: Path, folder: Path, tmp_path: Path
) -> None:
    """The manifest of the training is the input, too."""
    predict(centred, folder / "centres" / "task.csv", tmp_path / "out.csv")
    found = {row["name"]: row for row in read_rows(tmp_path / "out.csv")}
    assert len(found) == 6
    assert {float(row["z_mm"]) for row in found.values()} == {14.0}
    tested = read_rows(centred / "cases.csv")
    assert tested
    for row in tested:
        assert float(found[row["case"]]["is 1"]) == pytest.approx(float(row["is 1"]), abs=1e-6)


def test_another_centre_gives_another_probability(
    centred: Path, folder: Path, tmp_path: Path
) -> None:
    image = folder / "centres" / "0.nii"
    rows = [{"image": image, **CENTRE}, {"image": image, **CENTRE, "x_mm": 4}]
    predict(centred, write_manifest(tmp_path / "in.csv", rows), tmp_path / "out.csv")
    one, other = (float(row["is 0"]) for row in read_rows(tmp_path / "out.csv"))
    assert one != other


def test_a_run_trained_on_centres_refuses_an_image(centred: Path, images: Path) -> None:
    with pytest.raises(
        TrainError, match=r"trained on crops around .* CSV file with columns image, x_mm"
    ):
        predict(centred, images / "a.nii.gz", images.parent / "out.csv")


def test_a_run_trained_on_whole_images_refuses_centres(classifier: Path, folder: Path) -> None:
    with pytest.raises(TrainError, match="was trained on whole images"):
        predict(classifier, folder / "centres" / "task.csv", folder / "out.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "0.nii", "x_mm": 1, "y_mm": 1}], "needs columns image, x_mm, y_mm, z_mm"),
        (
            [{"image": "0.nii", "x_mm": "", "y_mm": "", "z_mm": ""}],
            "line 2: image or x_mm, y_mm, z_mm is empty",
        ),
        ([{"image": "0.nii", "x_mm": 1, "y_mm": 1, "z_mm": "?"}], "line 2: .* must be numbers"),
        ([{"image": "no.nii", "x_mm": 1, "y_mm": 1, "z_mm": 1}], r"line 2: .*no\.nii is missing"),
    ],
)
def test_an_invalid_table_of_centres_is_refused(
    centred: Path, folder: Path, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    file = write_manifest(folder / "centres" / "bad.csv", rows)
    with pytest.raises(TrainError, match=message):
        predict(centred, file, tmp_path / "out.csv")


def test_the_table_of_centres_is_never_replaced(centred: Path, folder: Path) -> None:
    file = folder / "centres" / "task.csv"
    before = file.read_bytes()
    with pytest.raises(TrainError, match=r"would replace the input task\.csv"):
        predict(centred, file, file)
    assert file.read_bytes() == before


# Settings of the run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """Overlap, and whether bf16 is on, of each image that is segmented."""
    calls = []

    def segment(self: Predictor, image: sitk.Image) -> sitk.Image:
        calls.append((self.overlap, bool(self.autocast._enabled)))
        return sitk.Image(image.GetSize(), sitk.sitkUInt8)

    monkeypatch.setattr(Predictor, "segment", segment)
    return calls


def test_the_overlap_is_that_of_the_runs_test_unless_given(
    segmenter: Path, images: Path, tmp_path: Path, calls: list[tuple[float, bool]]
) -> None:
    other = change(segmenter, tmp_path / "run", config={"overlap": 0.25, "precision": "bf16"})
    for run, overlap in ((segmenter, None), (other, None), (other, 0.75)):
        predict(run, images / "a.nii.gz", tmp_path / "mask.nii.gz", overlap=overlap)
    assert calls == [(0.5, False), (0.25, True), (0.75, True)]


# Channels


@pytest.fixture
def of_channel_1(segmenter: Path, tmp_path: Path) -> Path:
    """A run whose checkpoint says that it was trained on the second channel."""
    return change(segmenter, tmp_path / "run", task={"channel": 1})


def test_the_runs_channel_is_used_of_a_4d_image(
    segmenter: Path, of_channel_1: Path, tmp_path: Path
) -> None:
    image = sitk.JoinSeries([draw_case(0)[0], draw_case(2)[0]])
    sitk.WriteImage(image, str(tmp_path / "four.nii"))
    sitk.WriteImage(draw_case(2)[0], str(tmp_path / "one.nii"))
    masks = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(predict(run, tmp_path / name, out)[0])))
        for run, name, out in (
            (of_channel_1, "four.nii", tmp_path / "a.nii.gz"),
            (segmenter, "one.nii", tmp_path / "b.nii.gz"),
        )
    ]
    np.testing.assert_array_equal(*masks)
    with pytest.raises(TrainError, match="has channels 0 to 1, and none is given"):
        predict(segmenter, tmp_path / "four.nii", tmp_path / "c.nii.gz")


def test_the_runs_channel_selects_files_of_nnunet(of_channel_1: Path, images: Path) -> None:
    for name in ("a", "b"):
        (images / f"{name}.nii.gz").rename(images / f"{name}_0000.nii.gz")
        sitk.WriteImage(draw_case(7)[0], str(images / f"{name}_0001.nii.gz"))
    written = predict(of_channel_1, images, images.parent / "masks")
    assert [file.name for file in written] == ["a.nii.gz", "b.nii.gz"]
    assert sitk.ReadImage(str(written[0])).GetDirection() == draw_case(7)[0].GetDirection()


def test_a_missing_file_of_the_channel_is_named(of_channel_1: Path, images: Path) -> None:
    (images / "a.nii.gz").rename(images / "a_0000.nii.gz")
    with pytest.raises(TrainError, match=r"a_0000\.nii\.gz: there is no a_0001 beside it"):
        predict(of_channel_1, images, images.parent / "masks")


# On the command line


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


OPTIONS = ("--width", 2, "--shape", "8,16,16", "--steps", 1, "--device", "cpu")


@pytest.mark.parametrize(
    ("columns", "hint"), [({}, "IMAGE OUT.csv"), (CENTRE, "CENTRES.csv OUT.csv")]
)
def test_the_next_step_after_classification_names_a_table(
    tmp_path: Path, columns: dict[str, object], hint: str
) -> None:
    task = make_labels(tmp_path / "labels", **columns)
    assert invoke("finetune", task, tmp_path / "run", *OPTIONS).rstrip().endswith(hint)


def test_the_next_step_after_segmentation_names_a_mask(tmp_path: Path) -> None:
    task = make_task(tmp_path / "balls", range(5))
    out = invoke("finetune", task, tmp_path / "run", *OPTIONS)
    assert out.rstrip().endswith("IMAGE OUT.nii.gz")


def test_the_command_line_has_overlap_and_channel(
    segmenter: Path, images: Path, calls: list[tuple[float, bool]]
) -> None:
    image = sitk.JoinSeries([draw_case(0)[0], draw_case(2)[0]])
    sitk.WriteImage(image, str(images / "four.nii"))
    out = images.parent / "mask.nii.gz"
    invoke("predict", segmenter, images / "four.nii", out, "--overlap", 0.1, "--channel", 1)
    assert calls == [(0.1, False)]


def test_settings_of_the_command_line_reach_the_training(tmp_path: Path) -> None:
    task = make_task(tmp_path / "balls", range(5))
    given = ("--intensity", "per-image", "--loss", "dice+cross-entropy", "--mirror", "--channel", 0)
    invoke("finetune", task, tmp_path / "run", *OPTIONS, *given)
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    wanted = {"intensity": "per-image", "loss": "dice+cross-entropy", "mirror": True, "channel": 0}
    assert {name: saved["config"][name] for name in wanted} == wanted
    assert saved["task"]["grid"]["intensity"] == "per-image"


def test_scores_without_test_cases_are_null_in_json(tmp_path: Path) -> None:
    task = make_task(tmp_path / "balls", range(3))
    rows: list[dict[str, object]] = [
        {**row, "split": "validation" if row["image"] == "0.nii" else "train"}
        for row in read_rows(task)
    ]
    splits = write_manifest(task, rows)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    summary = json.loads(
        invoke("finetune", splits, tmp_path / "run", *OPTIONS, "--json"), parse_constant=refuse
    )
    assert summary["scores"] == {"dice": None, "iou": None}
