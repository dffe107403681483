"""The page of runs, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from store import PatchStore, annotate
from tests.support.browser import Page
from tests.support.command import assert_refused, run
from tests.support.runs import SHAPE, read_metrics
from tests.support.synthetic_store import make_store
from trainer import Event
from trainer.nets.registry import build_net
from trainer.report import is_run
from trainer.report.runs import describe_run, label_runs, read_run

HOSTILE = '<script>document.title="owned"</script>'


@pytest.fixture(scope="module")
def runs(
    store: Path, whole: tuple[Path, list[Event]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run, and the same one as if it had trained without restoration."""
    folder = tmp_path_factory.mktemp("secret-place")
    first = shutil.copytree(whole[0], folder / "secret-run")
    annotate(store, {1: {"name": HOSTILE}})
    second = shutil.copytree(first, folder / "other-run")
    content = json.loads((second / "config.json").read_text())
    content["config"] |= {"pretext": "none", "init": "/home/somebody/weights.pt"}
    (second / "config.json").write_text(json.dumps(content))
    shutil.rmtree(second / "samples")
    for name in ("best.pt", "last.pt"):
        (second / name).unlink()
    return first, second


def make_page(out: Path, *arguments: object) -> tuple[dict[str, Any], Result]:
    """The data on a page, and what the command printed."""
    result = run("report", *map(str, arguments), str(out))
    assert result.exit_code == 0, result.output
    found = re.findall(r'id="data">(.*)</script>', out.read_text())
    return json.loads(found[0]), result


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "page.html"
    make_page(out, *runs, "--store", store)
    return out


@pytest.fixture
def page(browser: webdriver.Chrome, report: Path) -> Iterator[Page]:
    browser.get("about:blank")
    opened = Page(browser, report.as_uri())
    opened.go("")
    opened.wait(lambda: opened.all(".chart polyline"))
    yield opened
    assert browser.get_log("browser") == []


def chart(page: Page, title: str) -> Any:
    return next(one for one in page.all(".chart") if one.text.startswith(title))


# Curves and facts


def test_each_metric_has_a_chart_with_the_curves_of_each_run(page: Page) -> None:
    titles = [one.text for one in page.all(".chart h3")]
    assert titles == ["Loss", "Restoration", "Classification", "Accuracy", "Learning rate"]
    lines = chart(page, "Restoration").find_elements("css selector", "polyline")
    assert len(lines) == 2 * 3, "train, validation and trivial answer of two runs"
    page.one("[data-run=B]").click()
    lines = chart(page, "Restoration").find_elements("css selector", "polyline")
    assert len(lines) == 3


def test_arrow_keys_read_the_values_of_a_curve(page: Page, runs: tuple[Path, Path]) -> None:
    svg = chart(page, "Loss").find_element("css selector", "svg")
    page.browser.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.HOME)
    first = next(line for line in read_metrics(runs[0]) if line["kind"] == "train")
    text = str(svg.get_attribute("aria-valuetext"))
    assert text.startswith(f"step {first['step']}, A train {first['loss']:.3g}")
    svg.send_keys(Keys.END)
    assert str(svg.get_attribute("aria-valuetext")).startswith("step 15, ")
    assert "step 15" in chart(page, "Accuracy").text, "one cursor for all charts"


def test_the_scale_becomes_logarithmic_and_the_axis_epochs(page: Page) -> None:
    svg = chart(page, "Loss").find_element("css selector", "svg")
    assert svg.get_attribute("data-scale") == "linear"
    page.one("[data-value=log]").click()
    assert svg.get_attribute("data-scale") == "log"
    Select(page.one("#horizontal")).select_by_value("epochs")
    page.browser.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.END)
    assert str(svg.get_attribute("aria-valuetext")).startswith("epoch 3, ")
    page.browser.execute_script("localStorage.clear()")


def test_smoothing_keeps_the_raw_curve_behind(page: Page) -> None:
    assert page.all(".chart .raw") == []
    slider = page.one("#smoothing")
    page.browser.execute_script("arguments[0].focus()", slider)
    slider.send_keys(Keys.END)
    assert page.all(".chart .raw")
    page.browser.execute_script("localStorage.clear()")


def test_settings_that_differ_from_the_defaults_are_listed(page: Page) -> None:
    text = page.one("#facts").text
    assert "shuffle blocks 100 100 10000" in text
    assert "pretext restoration none restoration" in text
    assert "patience" not in text
    assert "restoration and classes" in text


def test_facts_come_from_the_run_alone(whole: tuple[Path, list[Event]]) -> None:
    facts = describe_run(read_run(whole[0]))
    assert facts["facts"]["steps"] == 15
    assert facts["facts"]["epochs"] == 3
    assert facts["facts"]["perSecond"] > 0
    assert 0 < facts["facts"]["seconds"] < 600
    assert facts["warmupSteps"] == 5
    joint = [m for m in read_metrics(whole[0]) if m["kind"] == "validation" and m["epoch"] > 1]
    assert facts["best"] == min(joint, key=lambda line: line["loss"])
    assert set(facts["curves"]["restoration"]) == {"train", "validation", "baseline"}


def test_runs_are_told_apart_by_their_settings(runs: tuple[Path, Path]) -> None:
    labels = label_runs([read_run(folder) for folder in runs])
    assert labels == [
        "pretext restoration, init default",
        "pretext none, init weights of a file",
    ]


def test_a_run_that_is_still_training_has_a_page(
    whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    """Its last line of metrics may be half written, and there may be no validation yet."""
    begun = shutil.copytree(whole[0], tmp_path / "run")
    text = (begun / "metrics.jsonl").read_text()
    (begun / "metrics.jsonl").write_text(text[: text.index("\n") + 20])
    data, _ = make_page(tmp_path / "page.html", begun)
    assert data["runs"][0]["curves"]["loss"]["train"][0][0] == 2
    assert data["runs"][0]["best"] is None


# Pictures, classes, features


def test_a_slider_shows_the_restored_crops_over_time(page: Page) -> None:
    page.wait(lambda: len(page.all(".samples canvas[data-drawn]")) == 12)
    assert [one.text for one in page.all(".samples .caption")] == [
        "perturbed", "restored", "original"]  # fmt: skip
    restored = ".samples canvas[aria-label^='restored, crop 1']"
    late = page.one(restored).get_attribute("aria-label")
    slider = page.one(".timeline")
    page.browser.execute_script("arguments[0].focus()", slider)
    slider.send_keys(Keys.HOME)
    early = page.one(restored).get_attribute("aria-label")
    assert (early, late) == ("restored, crop 1, step 10", "restored, crop 1, step 15")


def test_the_heat_map_names_classes_and_shows_their_pictures(page: Page) -> None:
    assert len(page.all(".heat .right, .heat .wrong")) >= 3
    heat = page.one(".heat svg")
    page.browser.execute_script("arguments[0].focus()", heat)
    for _ in range(6):
        heat.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    seen = []
    for _ in range(6):
        seen.append(page.one(".split [aria-live] strong").text)
        heat.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert f"Class 1 ({HOSTILE}) recognised" in seen
    assert page.browser.title == "semgen: runs"
    page.wait(lambda: page.all(".split [aria-live] canvas[data-drawn]"))


def test_the_confusion_is_that_of_the_best_validation(
    runs: tuple[Path, Path], store: Path, tmp_path: Path
) -> None:
    data, _ = make_page(tmp_path / "page.html", runs[0], "--store", store)
    (found,) = data["runs"]
    confusion = found["classes"]["confusion"]
    assert confusion["accuracy"] == pytest.approx(found["best"]["accuracy"], abs=1e-3)
    rows = np.bincount(PatchStore(store).validation.label)
    counts = np.zeros((len(rows), len(rows)), int)
    for truth, guess, number in confusion["cells"]:
        counts[truth, guess] = number
    assert counts.sum(1).tolist() == rows.tolist()
    assert sorted(found["classes"]["order"]) == list(range(len(rows)))
    points = found["classes"]["points"]
    assert sum(points["split"]) == found["classes"]["nearest"]["validation"] == rows.sum()


def test_the_map_of_features_shows_the_crop_that_is_chosen(page: Page) -> None:
    plots = page.all(".plot svg")
    feature_map = plots[-1]
    page.browser.execute_script("arguments[0].focus()", feature_map)
    feature_map.send_keys(Keys.ARROW_RIGHT)
    assert str(feature_map.get_attribute("aria-valuetext")).startswith("Crop of class")
    details = page.all(".split [aria-live]")[-1]
    assert details.text.startswith("Class ")
    page.wait(lambda: details.find_elements("css selector", "canvas[data-drawn]"))
    page.one("[data-value=split]").click()
    assert page.all(".plot circle[style*='--validation']")


def test_what_is_measured_is_kept_until_the_weights_change(
    runs: tuple[Path, Path], store: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("report.npz"))
    first, _ = make_page(tmp_path / "page.html", copy, "--store", store)
    again, result = make_page(tmp_path / "page.html", copy)
    assert "without" not in result.stdout
    assert again["runs"][0]["classes"] == first["runs"][0]["classes"] | {"names": {}}
    saved = torch.load(copy / "best.pt", weights_only=True)
    saved["model"]["clc_out.fc1.bias"] += 1
    torch.save(saved, copy / "best.pt")
    changed, result = make_page(tmp_path / "page.html", copy)
    assert changed["runs"][0]["classes"] is None
    assert "--store STORE" in result.stdout


def test_features_and_logits_are_those_of_the_training_net() -> None:
    for parts in (1, 2):
        net = build_net(width=2, num_classes=3, decoder=False, parts_per_axis=parts).eval()
        crops = torch.rand(2, 1, 32, 32, 32)
        features, logits = net.describe(crops)
        assert features.shape == (2, net.backbone.bottleneck_channels)
        assert logits is not None
        assert torch.equal(logits, net(crops, pretext=False).logits)


# What is missing, what is refused, what must not be there


def test_the_page_says_what_is_missing(page: Page) -> None:
    text = page.one(".notmeasured").text
    assert text == "B: no confusion and no map of features: the run has no checkpoint yet."


def test_a_store_that_no_run_was_trained_on_is_refused(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other.store", shape=SHAPE, seed=9)
    result = run("report", str(runs[0]), str(tmp_path / "p.html"), "--store", str(other))
    assert_refused(result, "other.store", "no run of this page was trained on this store")
    assert not (tmp_path / "p.html").exists()


def test_a_folder_that_is_no_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("report", str(runs[0]), str(tmp_path), str(tmp_path / "p.html"))
    assert_refused(result, "not a run")
    assert not is_run(tmp_path)


def test_more_than_eight_runs_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("report", *[str(runs[0])] * 9, str(tmp_path / "p.html"))
    assert_refused(result, "9 runs; a page shows at most 8")


def test_the_page_needs_no_network_and_contains_no_path_or_name(report: Path) -> None:
    text = report.read_text()
    assert "default-src 'none'; img-src data:;" in text
    assert re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text) == []
    for name in ("secret", "other-run", "somebody", "weights.pt", "tiny.store"):
        assert name not in text


def test_the_same_runs_give_the_same_page(
    runs: tuple[Path, Path], store: Path, report: Path, tmp_path: Path
) -> None:
    make_page(tmp_path / "again.html", *runs, "--store", store)
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_names_of_folders_are_shown_on_request(runs: tuple[Path, Path], tmp_path: Path) -> None:
    data, result = make_page(tmp_path / "page.html", "--names", *runs)
    assert [one["label"] for one in data["runs"]] == ["secret-run", "other-run"]
    assert f"A  {runs[0]}" in result.stdout
