"""Fine-tuning from end to end, on images whose answer is plain to see."""

import csv
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

from cli import main
from tests.finetuning.test_task import write_manifest
from tests.support.synthetic_store import make_store
from trainer import Saved, TrainConfig, TrainError, export_weights, pretrain, read_weights
from trainer.finetuning import FinetuneConfig, finetune, predict
from trainer.finetuning.cases import Grid
from trainer.finetuning.images import pseudonym, read_image
from trainer.finetuning.pictures import draw_tile
from trainer.finetuning.scores import area_under_curve, overlap

CONFIG = FinetuneConfig(
    width=4,
    shape=(8, 16, 16),
    batch_size=8,
    steps=60,
    learning_rate=1e-2,
    patches_per_case=4,
    device="cpu",
)
NUM_CASES = 8


def draw_case(seed: int, *, bright: bool = True) -> tuple[sitk.Image, sitk.Image]:
    """A noisy CT image with a ball of 800 HU somewhere, or none, and the ball's mask."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(14), np.arange(24), np.arange(24), indexing="ij")
    middle = rng.integers((4, 8, 8), (10, 16, 16))
    ball = sum((a - m) ** 2 for a, m in zip((z, y, x), middle, strict=True)) < 25
    values = rng.normal(-200, 60, ball.shape) + 1000 * (ball if bright else 0)
    arrays = (values.astype(np.int16), ball.astype(np.uint8))
    images = [sitk.GetImageFromArray(array) for array in arrays]
    for image in images:
        image.SetSpacing((1.0, 1.0, 2.0))
        image.SetDirection((-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0) if seed % 2 else np.eye(3).ravel())
    return images[0], images[1]


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Find the ball."""
    folder = tmp_path_factory.mktemp("balls")
    rows: list[dict[str, object]] = []
    for number in range(NUM_CASES):
        image, mask = draw_case(number)
        sitk.WriteImage(image, str(folder / f"{number}.nii.gz"))
        sitk.WriteImage(mask, str(folder / f"{number}_mask.nii.gz"))
        rows.append({"image": f"{number}.nii.gz", "mask": f"{number}_mask.nii.gz"})
    return write_manifest(folder / "balls.csv", rows)


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


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


# To segment


def test_the_ball_is_found(segmenter: Path) -> None:
    result = json.loads((segmenter / "result.json").read_text())
    assert result["scores"]["dice"] > 0.8
    rows = read_rows(segmenter / "cases.csv")
    assert len(rows) == result["num_test"] == 2
    assert np.mean([float(row["dice"]) for row in rows]) == pytest.approx(result["scores"]["dice"])


GREEN, RED = (80, 220, 80), (255, 70, 70)


def test_the_picture_shows_the_answers_over_the_images(segmenter: Path) -> None:
    with Image.open(segmenter / "test.png") as picture:
        colours = {colour for _, colour in picture.getcolors(2**20)}
    assert RED in colours
    assert len(colours) > 50


def test_truth_and_answer_have_a_contour_each() -> None:
    image = sitk.Image((20, 20, 4), sitk.sitkInt16)
    truth, answer = (sitk.Image((20, 20, 4), sitk.sitkUInt8) for _ in range(2))
    truth[2:8, 2:8, 2:3] = 1
    answer[12:18, 12:18, 2:3] = 1
    grid = Grid(spacing_mm=(1, 1, 1), shape=(8, 8, 8), intensity="ct", window_hu=(-1000, 1000))
    tile = draw_tile("case", image, truth, answer, grid)
    pixels = np.array(tile.picture)
    side = len(pixels) / 20
    for colour, (low, high) in ((GREEN, (2, 8)), (RED, (12, 18))):
        found = np.argwhere((pixels == colour).all(axis=-1)) / side
        assert len(found) > 100, colour
        np.testing.assert_allclose(found.min(axis=0), low, atol=0.2)
        np.testing.assert_allclose(found.max(axis=0), high, atol=0.2)
    assert tile.caption == "case, slice 3 of 4"


def test_masks_of_test_cases_lie_on_their_images(segmenter: Path, balls: Path) -> None:
    for row in read_rows(segmenter / "cases.csv"):
        mask = sitk.ReadImage(str(segmenter / "test" / f"{row['case']}.nii.gz"))
        image = sitk.ReadImage(str(balls.parent / f"{row['case']}.nii.gz"))
        truth = sitk.ReadImage(str(balls.parent / f"{row['case']}_mask.nii.gz"))
        assert mask.GetDirection() == image.GetDirection()
        assert mask.GetSize() == image.GetSize()
        found = overlap(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(truth), 2)
        assert found["dice"][0] == pytest.approx(float(row["dice"]))


def test_predicting_answers_as_testing_did(segmenter: Path, balls: Path, tmp_path: Path) -> None:
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
        found = overlap(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), truth, 2)
        assert found["dice"][0] > 0.7


def test_a_name_that_no_image_has_is_refused_before_the_work(
    segmenter: Path, balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"mask\.png: a mask's name must end in \.nii\.gz"):
        predict(segmenter, balls.parent / "0.nii.gz", tmp_path / "mask.png")


def test_a_killed_run_goes_on_as_if_it_was_not(balls: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=7, checkpoint_every=1, log_every=1)
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
    stages: list[str] = []
    again = finetune(balls, segmenter, CONFIG, on_case=lambda what, *_: stages.append(what))
    assert again.training.already_complete
    assert "test" not in stages
    assert again.scores == json.loads((segmenter / "result.json").read_text())["scores"]
    assert (segmenter / "best.pt").read_bytes() == before


def test_a_run_of_other_settings_or_other_labels_is_refused(
    segmenter: Path, balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="patches_per_case 4 -> 5"):
        finetune(balls, segmenter, replace(CONFIG, patches_per_case=5))
    with pytest.raises(TrainError, match="give the same"):
        finetune(balls, segmenter, replace(CONFIG, split_seed=3))


def test_prepared_cases_are_shared_and_made_anew_when_an_image_changes(
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


# To classify


def test_whether_there_is_a_ball_is_told(classifier: Path) -> None:
    result = json.loads((classifier / "result.json").read_text())
    assert result["scores"]["auc"] > 0.9
    rows = read_rows(classifier / "cases.csv")
    assert all(float(row["no"]) + float(row["yes"]) == pytest.approx(1) for row in rows)


def test_predicting_classes_writes_a_table(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed, bright in ((200, True), (201, False)):
        file = tmp_path / "images" / f"{seed}.nii"
        sitk.WriteImage(draw_case(seed, bright=bright)[0], str(file))
    predict(classifier, tmp_path / "images", tmp_path / "answers.csv")
    rows = read_rows(tmp_path / "answers.csv")
    assert [row["image"] for row in rows] == ["200.nii", "201.nii"]
    assert float(rows[0]["yes"]) > float(rows[1]["yes"])


# Leaks


@pytest.fixture
def leaky(balls: Path, tmp_path: Path) -> Path:
    """A pretraining run that says it saw all the images of `balls`."""
    store = make_store(tmp_path / "tiny.store", num_classes=3, num_train=4, num_validation=1)
    config = TrainConfig(width=4, batch_size=6, steps=1, shuffle_blocks=10)
    run = pretrain(store, tmp_path / "pretrained", config).run
    saved = torch.load(run / "best.pt", weights_only=True)
    saved["scans"] = [
        pseudonym(read_image(balls.parent / f"{number}.nii.gz")) for number in range(NUM_CASES)
    ]
    torch.save(saved, run / "best.pt")
    return run


def test_testing_on_what_was_pretrained_on_is_refused(
    balls: Path, leaky: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"2 test cases were pretrained on .*--force"):
        finetune(balls, tmp_path / "run", replace(CONFIG, init=str(leaky)))
    config = replace(CONFIG, steps=1)
    assert not finetune(balls, tmp_path / "run", config).leaked, (
        "from scratch, the same RUN will do"
    )


def test_forced_it_is_marked(balls: Path, leaky: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, init=str(leaky), steps=1)
    summary = finetune(balls, tmp_path / "run", config, force=True)
    assert len(summary.leaked) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["leaked"] == list(summary.leaked)


def test_a_fine_tuned_run_is_a_start_too_and_knows_what_it_was_shown(
    balls: Path, segmenter: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, init=str(segmenter), steps=1)
    assert not finetune(balls, tmp_path / "again", config).leaked
    with pytest.raises(TrainError, match="test cases were pretrained on"):
        finetune(balls, tmp_path / "other", replace(config, split_seed=1))
    export_weights(segmenter, tmp_path / "w.safetensors", part="unet")
    assert len(read_weights(tmp_path / "w.safetensors").metadata["scans"]) == 6


# Intensities


def test_images_are_windowed_as_in_pretraining(balls: Path, tmp_path: Path) -> None:
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


def test_overlap_on_known_numbers() -> None:
    answer, truth = np.array([1, 1, 0, 2]), np.array([1, 0, 0, 2])
    found = overlap(answer, truth, 4)
    assert found["dice"][:2] == [pytest.approx(2 / 3), 1.0]
    assert found["iou"][:2] == [pytest.approx(1 / 2), 1.0]
    assert np.isnan(found["dice"][2]), "a class that is neither there nor named"


def test_area_under_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(area_under_curve(score, np.ones(40, bool)))


# On the command line


def test_the_command_line(balls: Path, tmp_path: Path) -> None:
    options = ["--width", "2", "--shape", "8,16,16", "--steps", "2", "--spacing", "2,1,1", "--json"]
    options += ["--window", "-200,800"]
    done = CliRunner().invoke(main, ["finetune", str(balls), str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["num_test"] == 2
    assert "prepare: 8 cases" in done.stderr
    assert "test: 2 cases" in done.stderr
    image = balls.parent / "0.nii.gz"
    mask = tmp_path / "mask.nii.gz"
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "run"), str(image), str(mask)])
    assert done.exit_code == 0, done.stderr
    assert sitk.ReadImage(str(mask)).GetSize() == (24, 24, 14)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("finetune", "no.csv", "run"), "no such task"),
        (("predict", "nothing", "a.nii.gz", "b.nii.gz"), "no fine-tuned run"),
    ],
)
def test_mistakes_take_one_line(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shape", "32.5,64,64"), ("--shape", "32,64"), ("--window", "-150"), ("--spacing", "a,b,c")],
)
def test_numbers_that_are_none_are_named(option: str, value: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["finetune", "no.csv", str(tmp_path / "run"), option, value])
    assert done.exit_code == 2
    assert f"{value!r}: give " in done.stderr


def test_a_pretrained_run_cannot_predict(leaky: Path, balls: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="pretrained, not fine-tuned"):
        predict(leaky, balls.parent / "0.nii.gz", tmp_path / "mask.nii.gz")
