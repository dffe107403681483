"""Fine-tuning from end to end, on images with a ball that is easy to find."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from click.testing import CliRunner
from PIL import Image
from selenium import webdriver

from cli import main
from tests.support.browser import Page
from tests.support.finetuning import (
    CONFIG,
    draw_case,
    make_task,
    read_rows,
    write_manifest,
)
from tests.support.progress import CountedProgress
from tests.support.synthetic_store import make_store
from trainer import Saved, TrainConfig, TrainError, export_weights, pretrain, read_weights
from trainer.finetuning import finetune, predict
from trainer.finetuning.grid import Grid
from trainer.finetuning.images import compute_scan_id, read_image
from trainer.finetuning.pictures import draw_tile
from trainer.finetuning.scores import area_under_curve, classification_scores, overlap_scores
from trainer.report import write_run_report
from trainer.report.finetuned import describe_test, read_pictures

NUM_CASES = 8


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Find the ball."""
    folder = tmp_path_factory.mktemp("balls") / "task"
    return make_task(folder, range(NUM_CASES), ending=".nii.gz")


@pytest.fixture(scope="module")
def presence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Is there a ball?"""
    folder = tmp_path_factory.mktemp("presence")
    rows: list[dict[str, object]] = []
    for number in range(20):
        sitk.WriteImage(draw_case(number, bright=number % 4 > 1)[0], str(folder / f"{number}.nii"))
        rows.append({"image": f"{number}.nii", "label": "yes" if number % 4 > 1 else "no"})
    return write_manifest(folder / "presence.csv", rows)


@pytest.fixture(scope="module")
def segmenter(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "segmenter"
    finetune(balls, run, CONFIG)
    return run


@pytest.fixture(scope="module")
def classifier(presence: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classifier"
    finetune(presence, run, replace(CONFIG, steps=60, learning_rate=1e-3))
    return run


# Segmentation


def test_the_ball_is_found(segmenter: Path) -> None:
    result = json.loads((segmenter / "result.json").read_text())
    assert result["scores"]["dice"] > 0.8
    rows = read_rows(segmenter / "cases.csv")
    assert len(rows) == result["num_test"] == 2
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(result["scores"]["dice"])


GREEN, RED = (80, 220, 80), (255, 70, 70)


def test_the_picture_shows_predictions_over_the_images(segmenter: Path) -> None:
    with Image.open(segmenter / "test.png") as picture:
        colours = {colour for _, colour in picture.getcolors(2**20)}
    assert RED in colours
    assert len(colours) > 50


def test_truth_and_prediction_each_have_a_contour() -> None:
    image = sitk.Image((20, 20, 4), sitk.sitkInt16)
    truth, prediction = (sitk.Image((20, 20, 4), sitk.sitkUInt8) for _ in range(2))
    truth[2:8, 2:8, 2:3] = 1
    prediction[12:18, 12:18, 2:3] = 1
    grid = Grid(spacing_mm=(1, 1, 1), shape=(8, 8, 8), intensity="ct", window_hu=(-1000, 1000))
    tile = draw_tile("case", image, truth, prediction, grid)
    pixels = np.array(tile.picture)
    side = len(pixels) / 20
    for colour, (low, high) in ((GREEN, (2, 8)), (RED, (12, 18))):
        found = np.argwhere((pixels == colour).all(axis=-1)) / side
        assert len(found) > 100, colour
        np.testing.assert_allclose(found.min(axis=0), low, atol=0.2)
        np.testing.assert_allclose(found.max(axis=0), high, atol=0.2)
    assert tile.caption == "case, slice 3 of 4"


def test_masks_of_test_cases_have_the_grid_of_their_images(segmenter: Path, balls: Path) -> None:
    for row in read_rows(segmenter / "cases.csv"):
        mask = sitk.ReadImage(str(segmenter / "test" / f"{row['case']}.nii.gz"))
        image = sitk.ReadImage(str(balls.parent / f"{row['case']}.nii.gz"))
        truth = sitk.ReadImage(str(balls.parent / f"{row['case']}_mask.nii.gz"))
        assert mask.GetDirection() == image.GetDirection()
        assert mask.GetSize() == image.GetSize()
        found = overlap_scores(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(truth), 2)
        assert found["dice"][0] == pytest.approx(float(row["dice"]))


def test_prediction_gives_the_same_mask_as_the_test(
    segmenter: Path, balls: Path, tmp_path: Path
) -> None:
    name = read_rows(segmenter / "cases.csv")[0]["case"]
    (written,) = predict(segmenter, balls.parent / f"{name}.nii.gz", tmp_path / "mask.nii.gz")
    one, other = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for file in (written, segmenter / "test" / f"{name}.nii.gz")
    )
    np.testing.assert_array_equal(one, other)


def test_a_folder_of_images_becomes_a_folder_of_masks(segmenter: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in (100, 101):
        sitk.WriteImage(draw_case(seed)[0], str(tmp_path / "images" / f"new{seed}_0000.nii.gz"))
    written = predict(segmenter, tmp_path / "images", tmp_path / "masks")
    assert [file.name for file in written] == ["new100.nii.gz", "new101.nii.gz"]
    for seed, file in zip((100, 101), written, strict=True):
        truth = sitk.GetArrayFromImage(draw_case(seed)[1])
        found = overlap_scores(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), truth, 2)
        assert found["dice"][0] > 0.7


def test_an_output_that_is_not_an_image_is_refused_before_prediction(
    segmenter: Path, balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"mask\.png: masks are written as \.nii\.gz.*; use one"):
        predict(segmenter, balls.parent / "0.nii.gz", tmp_path / "mask.png")


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"optimiser": "sgd", "lr_schedule": "poly", "clip_norm": 1.0, "ema_decay": 0.9},
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    balls: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    config = replace(CONFIG, steps=7, checkpoint_every=1, log_every=1, **recipe)
    finetune(balls, tmp_path / "whole", config)

    class KilledError(Exception):
        pass

    def kill(event: object) -> None:
        if isinstance(event, Saved) and event.step == 4:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(balls, tmp_path / "killed", config, on_event=kill)
    finetune(balls, tmp_path / "killed", config)
    for name in ("metrics.jsonl", "cases.csv", "result.json"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert one == other, name


def test_a_finished_run_is_not_trained_again(segmenter: Path, balls: Path) -> None:
    before = (segmenter / "best.pt").read_bytes()
    progress = CountedProgress()
    again = finetune(balls, segmenter, CONFIG, progress=progress)
    assert again.training.already_complete
    assert list(progress.totals) == ["cases"], "nothing is tested again"
    assert again.scores == json.loads((segmenter / "result.json").read_text())["scores"]
    assert (segmenter / "best.pt").read_bytes() == before


def test_resuming_with_other_settings_or_other_splits_is_refused(
    segmenter: Path, balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="patches_per_case: 4 -> 5"):
        finetune(balls, segmenter, replace(CONFIG, patches_per_case=5))
    with pytest.raises(TrainError, match="give the same"):
        finetune(balls, segmenter, replace(CONFIG, split_seed=3))


def test_prepared_cases_are_shared_and_prepared_again_when_an_image_changes(
    balls: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=1)
    finetune(balls, tmp_path / "one", config, cases_path=tmp_path / "cases")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "cases").rglob("*.npy")}
    assert len(times) == 3 * NUM_CASES
    finetune(balls, tmp_path / "two", replace(config, seed=1), cases_path=tmp_path / "cases")
    assert {f: f.stat().st_mtime_ns for f in times} == times
    image = balls.parent / "0.nii.gz"
    content = image.read_bytes()
    try:
        sitk.WriteImage(draw_case(50)[0], str(image))
        finetune(balls, tmp_path / "three", config, cases_path=tmp_path / "cases")
    finally:
        image.write_bytes(content)
    assert {f: f.stat().st_mtime_ns for f in times} == times
    new = {f.parent for f in (tmp_path / "cases").rglob("*.npy")} - {f.parent for f in times}
    assert [json.loads((f / "case.json").read_text())["name"] for f in new] == ["0"]


# Classification


def test_the_classifier_finds_out_whether_there_is_a_ball(classifier: Path) -> None:
    result = json.loads((classifier / "result.json").read_text())
    assert result["scores"]["auc"] > 0.9
    rows = read_rows(classifier / "cases.csv")
    assert all(float(row["no"]) + float(row["yes"]) == pytest.approx(1) for row in rows)


def test_prediction_writes_a_table_of_probabilities(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed, bright in ((200, True), (201, False)):
        file = tmp_path / "images" / f"{seed}.nii"
        sitk.WriteImage(draw_case(seed, bright=bright)[0], str(file))
    predict(classifier, tmp_path / "images", tmp_path / "out.csv")
    rows = read_rows(tmp_path / "out.csv")
    assert [row["image"] for row in rows] == ["200.nii", "201.nii"]
    assert float(rows[0]["yes"]) > float(rows[1]["yes"])


# The page of a run


def test_the_page_shows_scores_and_masks_of_cases_without_their_names(
    segmenter: Path, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    write_run_report([segmenter], tmp_path / "page.html")
    opened = Page(browser, (tmp_path / "page.html").as_uri())
    opened.go("")
    rows = read_rows(segmenter / "cases.csv")
    text = opened.one("#test").text
    for number, row in enumerate(rows, 1):
        assert f"Case {number} {float(row['dice']):.3f} {float(row['iou']):.3f}" in text
    opened.wait(lambda: len(opened.all(".masks canvas[data-drawn]")) == len(rows))
    assert [title.text for title in opened.all(".chart h3")] == [
        "Loss", "Dice", "IoU", "Learning rate"]  # fmt: skip
    assert "Restored crops" not in opened.one("body").text
    assert browser.get_log("browser") == []


def test_the_page_names_cases_on_request(segmenter: Path) -> None:
    test, named = describe_test(segmenter), describe_test(segmenter, names=True)
    assert test is not None
    assert named is not None
    assert [case["name"] for case in test["cases"]] == ["Case 1", "Case 2"]
    names = [row["case"] for row in read_rows(segmenter / "cases.csv")]
    assert [case["name"] for case in named["cases"]] == names


def test_masks_on_the_page_have_no_captions(segmenter: Path) -> None:
    pictures = read_pictures(segmenter, 2)
    with Image.open(segmenter / "test.png") as whole:
        assert sum(picture.height for picture in pictures[:1]) < whole.height
    for picture in pictures:
        white = (np.array(picture) == 255).all(axis=-1)
        assert not white[0].any(), "the first line is the image's, not a caption's"


def test_the_page_of_a_classifier_lists_true_classes_and_probabilities(classifier: Path) -> None:
    test = describe_test(classifier)
    assert test is not None
    assert test["columns"] == ["no", "yes"]
    rows = read_rows(classifier / "cases.csv")
    assert [case["label"] for case in test["cases"]] == [int(row["label"]) for row in rows]
    assert all(sum(case["values"]) == pytest.approx(1, abs=1e-3) for case in test["cases"])


def test_classes_may_be_called_like_the_columns_of_the_tables(balls: Path, tmp_path: Path) -> None:
    renamed = []
    for number in range(NUM_CASES):
        label = "case" if number % 2 else "label"
        split = "test" if number > 5 else "train" if number > 1 else "validation"
        renamed.append(f"{balls.parent / f'{number}.nii.gz'},{label},{split}")
    task = tmp_path / "task.csv"
    task.write_text("\n".join(["image,label,split", *renamed]))
    finetune(task, tmp_path / "run", replace(CONFIG, steps=1))
    test = describe_test(tmp_path / "run", names=True)
    assert test is not None
    assert test["columns"] == ["case", "label"]
    assert [case["name"] for case in test["cases"]] == ["6", "7"]
    assert all(sum(case["values"]) == pytest.approx(1, abs=1e-3) for case in test["cases"])


def test_a_run_of_pretraining_and_a_store_are_no_place_for_fine_tuning(
    balls: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    run = pretrain(store, tmp_path / "run", TrainConfig(width=2, batch_size=6, steps=1)).run
    before = sorted(run.iterdir())
    with pytest.raises(TrainError, match="run: a run of `semgen pretrain`; give another RUN"):
        finetune(balls, run, CONFIG)
    assert sorted(run.iterdir()) == before
    with pytest.raises(TrainError, match=r"tiny\.store: holds a run or a store"):
        finetune(balls, tmp_path / "other", CONFIG, cases_path=store)
    assert not (tmp_path / "other").exists()


# Leaks


@pytest.fixture
def leaky(balls: Path, tmp_path: Path) -> Path:
    """A pretraining run whose checkpoint lists all images of `balls` as its scans."""
    store = make_store(tmp_path / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    config = TrainConfig(width=4, batch_size=6, steps=1, shuffle_blocks=10)
    run = pretrain(store, tmp_path / "pretrained", config).run
    saved = torch.load(run / "best.pt", weights_only=True)
    saved["scans"] = [
        compute_scan_id(read_image(balls.parent / f"{number}.nii.gz"))
        for number in range(NUM_CASES)
    ]
    torch.save(saved, run / "best.pt")
    return run


def test_test_cases_that_the_weights_were_pretrained_on_are_refused(
    balls: Path, leaky: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"were pretrained on 2 of the test cases .*--force"):
        finetune(balls, tmp_path / "run", replace(CONFIG, init=str(leaky)))
    config = replace(CONFIG, steps=1)
    assert not finetune(balls, tmp_path / "run", config).leaked, (
        "from scratch, the same RUN will do"
    )


def test_with_force_leaked_test_cases_are_named_in_the_result(
    balls: Path, leaky: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, init=str(leaky), steps=1)
    summary = finetune(balls, tmp_path / "run", config, force=True)
    assert len(summary.leaked) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["leaked"] == list(summary.leaked)


def test_a_fine_tuned_run_is_a_start_that_records_its_training_scans(
    balls: Path, segmenter: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, init=str(segmenter), steps=1)
    assert not finetune(balls, tmp_path / "again", config).leaked
    with pytest.raises(TrainError, match=r"were pretrained on .* of the test cases"):
        finetune(balls, tmp_path / "other", replace(config, split_seed=1))
    export_weights(segmenter, tmp_path / "w.safetensors", part="unet")
    assert len(read_weights(tmp_path / "w.safetensors").metadata["scans"]) == 6


# Intensities


def test_the_window_is_that_of_pretraining_unless_given(balls: Path, tmp_path: Path) -> None:
    store = make_store(
        tmp_path / "tiny.store", num_classes=3, num_train=4, num_validation=1, window_hu=(-150, 250)
    )
    pretrain(store, tmp_path / "run", TrainConfig(width=4, batch_size=6, steps=1))
    export_weights(tmp_path / "run", tmp_path / "w.safetensors", part="encoder")
    inits = {"run": None, "w.safetensors": None, "scratch": None, "run/best.pt": (-500.0, 500.0)}
    windows = []
    for number, (name, window_hu) in enumerate(inits.items()):
        init = name if name == "scratch" else str(tmp_path / name)
        config = replace(CONFIG, init=init, window_hu=window_hu, steps=1)
        finetune(balls, tmp_path / str(number), config, cases_path=tmp_path / "cases")
        again = replace(config, init=str(tmp_path / str(number)), window_hu=None)
        finetune(balls, tmp_path / f"{number}-again", again, cases_path=tmp_path / "cases")
        grids = [
            torch.load(tmp_path / run / "best.pt", weights_only=True)["task"]["grid"]
            for run in (str(number), f"{number}-again")
        ]
        assert grids[0] == grids[1]
        windows.append(grids[0]["window_hu"])
    assert windows == [[-150, 250], [-150, 250], [-1000, 1000], [-500, 500]]


# Scores


def test_dice_and_iou_on_known_numbers() -> None:
    prediction, truth = np.array([1, 1, 0, 2]), np.array([1, 0, 0, 2])
    found = overlap_scores(prediction, truth, 4)
    assert found["dice"][:2] == [pytest.approx(2 / 3), 1.0]
    assert found["iou"][:2] == [pytest.approx(1 / 2), 1.0]
    assert np.isnan(found["dice"][2]), "a class that is neither in the truth nor predicted"


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(area_under_curve(score, np.ones(40, bool)))
    assert area_under_curve(np.ones(40), positive) == 0.5


def test_auc_of_several_classes_is_the_mean_of_each_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    truth, probability = np.arange(30) % 3, rng.dirichlet(np.ones(3), 30)
    areas = [area_under_curve(probability[:, c], truth == c) for c in range(3)]
    found = classification_scores(probability, truth)
    assert found["auc"] == pytest.approx(np.mean(areas))
    assert found["accuracy"] == np.mean(probability.argmax(axis=1) == truth)


# On the command line


def test_finetune_and_predict_work_from_the_command_line(balls: Path, tmp_path: Path) -> None:
    options = ["--width", "2", "--shape", "8,16,16", "--steps", "2", "--spacing", "2,1,1", "--json"]
    options += ["--window", "-200,800"]
    done = CliRunner().invoke(main, ["finetune", str(balls), str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["num_test"] == 2
    assert "cases: 8 cases" in done.stderr
    assert "test: 2 cases" in done.stderr
    image = balls.parent / "0.nii.gz"
    mask = tmp_path / "mask.nii.gz"
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), str(image), str(mask)])
    assert done.exit_code == 0, done.stderr
    assert sitk.ReadImage(str(mask)).GetSize() == (24, 24, 14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "no.csv", "run"), "no such task"),
        (("predict", "nothing", "a.nii.gz", "b.nii.gz"), "not a fine-tuned run"),
    ],
)
def test_an_error_is_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shape", "32.5,64,64"), ("--shape", "32,64"), ("--window", "-150"), ("--spacing", "a,b,c")],
)
def test_an_option_that_is_not_a_list_of_numbers_is_refused(
    option: str, value: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, ["finetune", "no.csv", str(tmp_path / "run"), option, value])
    assert done.exit_code == 2
    assert f"{value!r}: give " in done.stderr


def test_a_pretrained_run_cannot_predict(leaky: Path, balls: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="pretrained, not fine-tuned"):
        predict(leaky, balls.parent / "0.nii.gz", tmp_path / "mask.nii.gz")
