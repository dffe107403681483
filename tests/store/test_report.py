"""The page of discovered classes, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from store import PatchStore, annotate
from store.inspect import describe_classes
from store.report.build import card_tiles, mean_crop
from store.report.pictures import LEVELS, planes, projections, to_grey
from store.report.terminal import draw_class
from tests.support.browser import Page
from tests.support.command import Semgen
from tests.support.crops import change_attribute

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def report(prepared: Path, semgen: Semgen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a store with a hostile name, a note and an exclusion."""
    folder = tmp_path_factory.mktemp("report")
    store = shutil.copytree(prepared, folder / "secret-name.store")
    opened = PatchStore(store)
    largest = float(np.nanmax(opened.classes.cycle_mm))  # so that it only just passed
    change_attribute(store, "config", {**opened.config, "max_cycle_mm": largest})
    annotate(store, {1: {"name": HOSTILE, "note": "</script>"}, 3: {"excluded": True}})
    done = semgen("report", store, folder / "page.html")
    assert done.returncode == 0, done.stderr
    assert "4 classes" in done.stdout
    return folder / "page.html"


@pytest.fixture
def page(browser: webdriver.Chrome, report: Path) -> Iterator[Page]:
    browser.get("about:blank")
    opened = Page(browser, report.as_uri())
    opened.go("#/")
    yield opened
    log = browser.get_log("browser")
    assert [entry for entry in log if "readback" not in entry["message"]] == []  # that is `pixels`


def test_the_overview_shows_counts_and_reasons(page: Page, patches: PatchStore) -> None:
    text = page.one("main").text
    assert "4 classes, 1 excluded" in text
    assert "duplicate" in text
    assert "unreadable" in text
    assert len(page.all("#map circle")) == len(patches.scans.id)


def test_a_scan_on_the_map_shows_its_picture(page: Page) -> None:
    page.one("#map circle").send_keys("")  # focus, as the Tab key does
    page.browser.execute_script("document.querySelector('#map circle').focus()")
    assert page.pixels("#hovered canvas").max() > 100


def test_classes_are_sorted_and_filtered(page: Page) -> None:
    page.go("#/classes")
    assert len(page.titles()) == 4
    Select(page.one("#sort")).select_by_value("number")
    assert [title for title in page.titles() if title.startswith("Class")] == [
        "Class 0", "Class 2", "Class 3"]  # fmt: skip
    Select(page.one("#excluded")).select_by_value("excluded")
    assert page.titles() == ["Class 3"]
    Select(page.one("#excluded")).select_by_value("all")
    page.one("#text").send_keys("class 2")
    assert page.titles() == ["Class 2"]
    assert page.one("[role=status]").text == "1 of 4 classes"


def test_a_class_is_opened_and_its_slices_turned(page: Page) -> None:
    page.go("#/classes")
    page.one("a[href='#/class/0']").click()
    page.wait(lambda: page.one("h2").text.startswith("Class 0"))
    first = "#reference canvas"
    before = page.pixels(first)
    drawn = page.one(first).get_attribute("data-drawn")
    page.press(Keys.ARROW_UP, Keys.ARROW_UP)
    page.wait(lambda: page.one(first).get_attribute("data-drawn") != drawn)
    page.other_pixels(first, before)
    assert len(page.all(".member")) >= 3


def test_members_that_only_just_passed_are_marked(page: Page, report: Path) -> None:
    store = PatchStore(report.with_name("secret-name.store"))
    rows = describe_classes(store, quality=True)
    worst = max(rows, key=lambda row: row["weak_members"])
    assert worst["weak_members"] > 0
    page.go("#/classes")
    assert f"{worst['weak_members']} only just passed" in page.one("main").text
    Select(page.one("#sort")).select_by_value("score")
    best = max(row["median_score"] for row in rows)
    first = str(page.one(".card").get_attribute("href"))
    assert best in {
        row["median_score"] for row in rows if first.endswith(f"#/class/{row['class']}")
    }
    page.go(f"#/class/{worst['class']}")
    page.one("details summary").click()
    assert len(page.all("details .weak")) == worst["weak_members"]
    assert len(page.all(".member span.weak")) == worst["weak_members"]
    text = page.one("main").text
    assert f"{worst['weak_members']} of" in text
    assert "Only just passed: a member with a score below 0.50" in text
    assert all("there and back" in member.text for member in page.all(".member"))
    assert "The same place in non-members" not in text


def test_another_window_changes_the_grey_levels(page: Page) -> None:
    page.go("#/class/0")
    wide = page.pixels("#reference canvas")
    page.press("2")
    lung = page.other_pixels("#reference canvas", wide)
    page.press("3")
    page.other_pixels("#reference canvas", lung)
    assert Select(page.one("#window")).first_selected_option.text == "Soft tissue"


def test_the_keyboard_goes_from_class_to_class_and_back(page: Page) -> None:
    page.go("#/class/0")
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.browser.current_url[-1] != "0")
    page.press(Keys.ARROW_LEFT)
    page.wait(lambda: page.browser.current_url.endswith("#/class/0"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.browser.current_url.endswith("#/classes"))


def test_a_hostile_name_is_shown_as_text(page: Page) -> None:
    page.go("#/class/1")
    page.wait(lambda: page.one("h2").text)
    assert page.one("h2").text.startswith(HOSTILE)
    assert "</script>" in page.one("main").text
    page.go("#/classes")
    assert HOSTILE in page.titles()
    assert page.browser.title == "semgen: discovered classes"


def test_every_picture_has_a_text_alternative(page: Page) -> None:
    page.go("#/class/0")
    page.wait(lambda: page.all("canvas"))
    for canvas in page.all("canvas"):
        assert canvas.get_attribute("role") == "img"
        assert canvas.get_attribute("aria-label")


def test_the_page_needs_no_network_and_contains_no_name(report: Path) -> None:
    text = report.read_text()
    assert re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text) == []
    assert "secret-name" not in text
    data = json.loads(re.findall(r'id="data">(.*)</script>', text)[0])
    assert len(data["classes"]) == 4


def test_the_same_store_gives_the_same_page(report: Path, semgen: Semgen) -> None:
    again = report.with_name("again.html")
    semgen("report", report.with_name("secret-name.store"), again)
    assert again.read_bytes() == report.read_bytes()


def test_left_is_on_the_right_and_the_head_is_up() -> None:
    crop = np.full((8, 10, 12), -1000)
    crop[7, 9, 11] = 1000  # head, back, left
    *axial, coronal, sagittal = planes(crop, 8)
    assert np.argwhere(axial[-1] > 200).tolist() == [[9, 11]]
    front, side = projections(to_grey(crop))
    assert np.argwhere(front > 200).tolist() == [[0, 11]]
    assert np.argwhere(side > 200).tolist() == [[0, 9]]
    assert coronal.shape == (8, 12)
    assert sagittal.shape == (8, 10)


def test_grey_levels_resolve_soft_tissue_to_four_hu() -> None:
    hu = np.arange(-200, 300)
    levels = to_grey(hu)
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert len(np.unique(levels)) > len(hu) / 4.1
    assert to_grey(np.array([-3000, 5000])).tolist() == [LEVELS[0][1], LEVELS[-1][1]]


def test_a_terminal_shows_a_class_in_grey_levels(patches: PatchStore) -> None:
    caption, *lines = draw_class(patches, 0).splitlines()
    assert caption.split("  ")[0] == "mean"
    assert len(lines) == 15
    pixels = [re.findall(r"38;5;(\d+);48;5;(\d+)m▀", line) for line in lines]
    assert {len(line) for line in pixels} == {4 * 30}
    greys = np.array(pixels, int)
    assert greys.min() >= 232
    assert greys.max() <= 255
    mean, reference = greys[:, :30, 0], greys[:, 30:60, 0]
    tile = card_tiles(patches, 0, mean_crop(patches, 0))[1]
    upper, lower = tile[: len(tile) // 2].mean(), tile[len(tile) // 2 :].mean()
    assert (reference[:7].mean() > reference[8:].mean()) == (upper > lower)
    assert mean.std() > 0
