"""The page of discovered classes, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from store import PatchStore, annotate
from store.inspect import describe_classes
from store.report.pictures import LEVELS, projections, slices, to_grey
from store.report.sheets import card_tiles, choose_members, mean_crop
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
    annotate(
        store,
        {
            0: {"note": "two organs"},
            1: {"name": HOSTILE, "note": "</script>"},
            2: {"tags": ("vessel",)},
            3: {"excluded": True},
        },
    )
    done = semgen("report", store, folder / "page.html")
    assert done.returncode == 0, done.stderr
    assert "4 classes" in done.stdout
    return folder / "page.html"


@pytest.fixture
def page(browser: webdriver.Chrome, report: Path) -> Iterator[Page]:
    browser.get("about:blank")
    browser.get_log("browser")
    opened = Page(browser, report.as_uri())
    opened.go("#/")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    yield opened
    log = browser.get_log("browser")
    assert [entry for entry in log if "readback" not in entry["message"]] == []  # that is `pixels`


def test_the_page_opens_on_the_classes_below_a_summary(page: Page, patches: PatchStore) -> None:
    counts = {box.text.splitlines()[1]: box.text for box in page.all(".count")}
    assert counts["classes"].splitlines() == ["4", "classes", "1 excluded"]
    assert counts["scans"].startswith(str(len(patches.scans.id)))
    assert counts["rejected series"].startswith("2")
    assert len(page.all(".card")) == 4
    assert page.pixels(".card canvas").max() > 50


def test_the_scans_have_a_map_and_the_rejections_their_reasons(
    page: Page, patches: PatchStore
) -> None:
    page.go("#/scans")
    text = page.one("main").text
    assert "duplicate" in text
    assert "unreadable" in text
    assert len(page.all("#map circle")) == len(patches.scans.id)
    page.browser.execute_script("document.querySelector('#map circle').focus()")
    assert page.pixels("#hovered canvas").max() > 100
    before = [dot.get_attribute("fill") for dot in page.all("#map circle")]
    Select(page.one("#colouring")).select_by_value("split")
    assert [dot.get_attribute("fill") for dot in page.all("#map circle")] != before
    assert "validation" in page.one("#legend").text


def test_a_lasso_around_scans_shows_their_classes(page: Page, patches: PatchStore) -> None:
    page.go("#/scans")
    box = page.one("#map")
    width, height = box.size["width"], box.size["height"]
    corners = [(-0.49, -0.49), (0.49, -0.49), (0.49, 0.49), (-0.49, 0.49)]
    drag = ActionChains(page.browser)
    for number, (x, y) in enumerate(corners):
        drag.move_to_element_with_offset(box, int(x * width), int(y * height))
        if not number:
            drag.click_and_hold()
    drag.release().perform()
    assert f"{len(patches.scans.id)} scans chosen, in 4 classes" in page.one("#found").text
    page.one("#map circle").click()  # a click chooses one scan
    assert "1 scan chosen" in page.one("#found").text
    hit = page.one("#found").text.split(" in ")[1][0]
    page.one("#show-classes").click()
    page.wait(lambda: page.all("#any-scan"))
    assert len(page.all(".card")) == int(hit)
    page.one("#any-scan").click()
    assert len(page.all(".card")) == 4


def test_classes_are_sorted_and_searched_by_name_note_tag_and_number(page: Page) -> None:
    Select(page.one("#sort")).select_by_value("number")
    assert [title for title in page.titles() if title.startswith("Class")] == [
        "Class 0", "Class 2", "Class 3"]  # fmt: skip
    Select(page.one("#show")).select_by_value("excluded")
    assert page.titles() == ["Class 3"]
    Select(page.one("#show")).select_by_value("all")
    for text, found in (("class 2", "Class 2"), ("two organs", "Class 0"), ("vessel", "Class 2")):
        page.one("#text").clear()
        page.one("#text").send_keys(text)
        assert page.titles() == [found]
    assert page.one(".toolbar [role=status]").text == "1 of 4 classes"


def test_one_slider_turns_all_members_in_three_planes(page: Page) -> None:
    page.go("#/class/0")
    second = ".tile:nth-child(2) canvas"
    axial = page.pixels(second)
    reference = page.pixels("aside canvas")
    page.press(Keys.ARROW_UP, Keys.ARROW_UP)
    page.other_pixels(second, axial)
    page.other_pixels("aside canvas", reference)
    assert "to the head" in page.one("#where").text
    page.press("p")
    assert page.one(".choice [aria-checked=true][data-value=coronal]")
    page.other_pixels(second, axial)


def test_members_are_sorted_and_doubtful_ones_marked(page: Page, report: Path) -> None:
    store = PatchStore(report.with_name("secret-name.store"))
    worst = max(describe_classes(store, quality=True), key=lambda row: row["weak_members"])
    assert worst["weak_members"] > 0
    page.go(f"#/class/{worst['class']}")
    assert len(page.all(".tile.weak")) == worst["weak_members"]
    assert len(page.all(".tile.outlier")) == worst["outliers"]

    def scores() -> list[float]:
        texts = [tile.text for tile in page.all(".tile > span")]
        return [float(text.split()[1]) for text in texts if text.startswith("match")]

    best_first = scores()
    assert best_first == sorted(best_first, reverse=True)
    Select(page.one("#member-sort")).select_by_value("weakest")
    assert scores() == sorted(best_first)
    Select(page.one("#member-show")).select_by_value("weak")
    assert len(page.all(".tile")) in {worst["weak_members"], worst["weak_members"] + 1}


def test_a_member_is_enlarged_and_escape_closes_only_that(page: Page) -> None:
    page.go("#/class/0")
    page.press("f")
    page.active.send_keys(Keys.ARROW_RIGHT)
    page.active.send_keys(Keys.ENTER)
    wide = page.pixels("dialog canvas")
    page.active.send_keys("2")
    lung = page.other_pixels("dialog canvas", wide)
    page.active.send_keys(Keys.ARROW_UP)
    page.other_pixels("dialog canvas", lung)
    heading = page.one("dialog h2").text
    page.active.send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.one("dialog h2").text != heading)
    page.active.send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))
    assert page.browser.current_url.endswith("#/class/0")
    assert page.active.tag_name == "button"  # the member that was open


def test_the_enlarged_member_fits_a_phone(page: Page) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for place in ("#/", "#/class/0", "#/scans", "#/compare/0/1"):
            page.go(place)
            page.wait(lambda: page.all("canvas, #map"))
            assert page.browser.execute_script("return document.body.scrollWidth") <= 390
        page.go("#/class/0")
        page.one(".tile button").click()
        close = page.one("[data-close]").rect
        assert 0 <= close["x"] <= 390 - close["width"]
        for canvas in page.all("dialog canvas"):
            assert canvas.rect["x"] + canvas.rect["width"] <= 390
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_window_and_the_order_stay_after_a_reload(page: Page) -> None:
    page.go("#/")
    page.press("3")
    Select(page.one("#sort")).select_by_value("name")
    page.browser.refresh()
    page.wait(lambda: page.all(".card"))
    assert page.one("#window [aria-checked=true]").text == "Soft tissue"
    assert Select(page.one("#sort")).first_selected_option.text == "name"


def test_marks_and_scale_bars_can_be_hidden(page: Page) -> None:
    page.go("#/class/0")
    marked = page.pixels("aside canvas")
    page.press("m")
    plain = page.other_pixels("aside canvas", marked)
    assert marked.max() >= plain.max()
    page.press("m")
    page.other_pixels("aside canvas", plain)


def test_two_classes_are_compared_side_by_side(page: Page) -> None:
    for label in (0, 2):
        page.one(f".card[data-label='{label}'] .pick").click()
    page.press("c")
    page.wait(lambda: "#/compare/" in page.browser.current_url)
    assert len(page.all(".two section .tiles")) == 2
    left, right = ".two > :first-child .tile canvas", ".two > :last-child .tile canvas"
    before = page.pixels(left), page.pixels(right)
    page.press(Keys.ARROW_UP, Keys.ARROW_UP)
    page.other_pixels(left, before[0])
    page.other_pixels(right, before[1])


def test_the_keyboard_goes_through_the_cards_and_the_classes(page: Page) -> None:
    page.press(Keys.ARROW_RIGHT)
    card = page.active
    assert "card" in str(card.get_attribute("class"))
    label = card.get_attribute("data-label")
    card.send_keys(Keys.ENTER)
    page.wait(lambda: page.browser.current_url.endswith(f"#/class/{label}"))
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: not page.browser.current_url.endswith(f"#/class/{label}"))
    page.press(Keys.ARROW_LEFT)
    page.wait(lambda: page.browser.current_url.endswith(f"#/class/{label}"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.browser.current_url.endswith("#/"))
    assert page.active.get_attribute("data-label") == label


def test_the_keys_and_terms_are_listed(page: Page) -> None:
    page.press("?")
    text = page.one("dialog").text
    assert "Compare the two selected classes" in text
    assert "Window: Lung" in text
    assert "0.5 is chance" in text


def test_colours_have_the_contrast_that_accessibility_asks_for(page: Page) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for borders of inputs."""
    for theme in ("light", "dark"):
        page.browser.execute_script("setTheme(arguments[0])", theme)
        words = ("text", "soft", "link", "good", "fair", "bad", "validation")
        for colour, back, least in (
            *((word, back, 4.5) for word in words for back in ("card", "back")),
            ("good", "good-back", 4.5), ("fair", "fair-back", 4.5), ("bad", "bad-back", 4.5),
            ("on-accent", "accent", 4.5), ("edge", "card", 3), ("edge", "back", 3),
        ):  # fmt: skip
            shown = [page.colour(name) for name in (colour, back)]
            assert contrast(*shown) >= least, (theme, colour, back)
    page.browser.execute_script("setTheme('auto')")


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Of WCAG 2."""

    def luminance(rgb: tuple[int, ...]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (value / 255 for value in rgb)]  # fmt: skip
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_hostile_name_is_shown_as_text(page: Page) -> None:
    assert HOSTILE in page.titles()
    page.go("#/class/1")
    page.wait(lambda: page.one("h2").text)
    assert page.one("h2").text.startswith(HOSTILE)
    assert "</script>" in page.one("main").text
    assert page.browser.title == "semgen: discovered classes"


def test_every_picture_has_a_text_alternative(page: Page) -> None:
    page.go("#/class/0")
    page.wait(lambda: page.all("canvas"))
    for canvas in page.all("canvas"):
        assert canvas.get_attribute("role") == "img"
        assert canvas.get_attribute("aria-label")


def test_no_number_is_minus_zero(page: Page) -> None:
    assert page.browser.execute_script("return [number(-0.001), number(-0.01), number(null)]") == [
        "0.00", "-0.01", "-"]  # fmt: skip


def test_the_page_needs_no_network_and_contains_no_name(report: Path) -> None:
    text = report.read_text()
    assert re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text) == []
    assert "secret-name" not in text
    data = json.loads(re.findall(r'id="data">(.*)</script>', text)[0])
    assert len(data["classes"]) == 4
    assert data["paths"] is None


def test_the_same_store_gives_the_same_page(report: Path, semgen: Semgen) -> None:
    again = report.with_name("again.html")
    semgen("report", report.with_name("secret-name.store"), again)
    assert again.read_bytes() == report.read_bytes()


def test_a_file_of_many_members_shows_the_doubtful_ones_and_a_sample(
    patches: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = int((patches.classes.neighbour >= 0).sum(1).argmax())
    members = patches.members(label)
    everything = choose_members(patches, label, [])
    assert everything == list(range(len(everything)))
    monkeypatch.setattr("store.report.sheets._TILES", 0)
    monkeypatch.setattr("store.report.sheets._FEWEST", 4)
    best, worst = np.nanargmax(members.scores), np.nanargmin(members.scores)
    middle = next(n for n in range(1, len(members)) if n not in {best, worst})
    shown = choose_members(patches, label, [int(members.scans[middle])])
    assert shown[0] == 0
    assert middle in shown
    assert len(shown) == 4


def test_left_is_on_the_right_and_the_head_is_up() -> None:
    crop = np.full((8, 10, 12), -1000)
    crop[7, 9, 11] = 1000  # head, back, left
    *axial, coronal, sagittal = slices(crop, {"axial": 8, "coronal": 1, "sagittal": 1})
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
