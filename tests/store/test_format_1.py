"""Stores of format 1 are still read: without scores, places in tables and body shares."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from selenium import webdriver

from pipeline.config import PrepareConfig
from pipeline.preflight import check_same_job
from store import PatchStore
from store.format import SPLITS, TABLES, StoreError, tables_of
from store.group import compute_fingerprint
from store.inspect import (
    describe_class,
    describe_classes,
    describe_store,
    format_class,
    format_classes,
    format_json,
    format_store,
)
from store.report import write_report
from store.verification import verify
from tests.support.browser import Page
from tests.support.crops import change_attribute

NEW_SETTINGS = ("place", "min_score", "max_cycle_mm", "candidates_per_member")


@pytest.fixture(scope="module")
def old(patches: PatchStore, tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    """The prepared store as format 1 would hold it."""
    path = shutil.copytree(patches.path, tmp_path_factory.mktemp("old") / "old.store")
    for name in TABLES.keys() - tables_of({"format": 1, "stages": {}}).keys():
        shutil.rmtree(path / name)
    survey = {name: fact for name, fact in patches.stages["survey"].items() if name != "version"}
    config = {name: value for name, value in patches.config.items() if name not in NEW_SETTINGS}
    change_attribute(path, "format", 1)
    change_attribute(path, "config", config)
    discover = {"classes": patches.num_classes}
    change_attribute(path, "stages", {**patches.stages, "survey": survey, "discover": discover})
    change_attribute(path, "fingerprint", compute_fingerprint(path))
    return PatchStore(path)


def test_it_is_valid_and_has_fewer_tables(old: PatchStore, patches: PatchStore) -> None:
    assert list(verify(old.path)) == []
    group = zarr.open_group(str(old.path), mode="r")
    assert {"neighbour", "distance"} < set(group["classes"].array_keys())  # type: ignore[union-attr]
    assert old.fingerprint != patches.fingerprint
    with pytest.raises(AttributeError, match="body_share"):
        _ = old.classes.body_share


@pytest.mark.parametrize("split", SPLITS)
def test_its_members_have_places_but_no_scores(
    old: PatchStore, patches: PatchStore, split: str
) -> None:
    for label in range(old.num_classes):
        members, same = old.members(label, split), patches.members(label, split)
        for name in ("scans", "distances", "places", "rows"):
            np.testing.assert_array_equal(getattr(members, name), getattr(same, name))
        assert np.isnan(members.scores).all()
        assert np.isnan(members.cycles).all()
        assert len(members.scores) == len(members.cycles) == len(members)


def test_unknown_numbers_are_dashes_and_null(old: PatchStore, patches: PatchStore) -> None:
    facts, one = describe_store(old), describe_class(old, 0)
    rows = describe_classes(old, quality=True)
    assert facts["format"] == 1
    for text in (format_store("s", facts).splitlines()[4:], format_classes(rows).splitlines()):
        head, *lines = text
        assert len(lines) == old.num_classes
        for column in ("median score", "body"):
            end = head.index(column) + len(column)
            assert {line[:end].split(" ")[-1] for line in lines} == {"-"}
    assert format_class(one).splitlines()[2].split()[2:5] == ["0", "-", "-"]
    for value in (facts, one, rows):
        assert "NaN" not in format_json(value)
    new = describe_store(patches), describe_class(patches, 0), describe_classes(patches)
    assert facts["classes"][0].keys() == new[0]["classes"][0].keys()
    assert one["members"][0].keys() == new[1]["members"][0].keys()


def test_its_report_has_no_empty_columns(
    old: PatchStore, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    page = Page(browser, (tmp_path / "page.html").as_uri())
    write_report(old, tmp_path / "page.html")
    (data,) = re.findall(r'id="data">(.*)</script>', (tmp_path / "page.html").read_text())
    assert json.loads(data)["match"] is None
    browser.get("about:blank")
    for place in ("#/", "#/class/0"):
        page.go(place)
        text = page.one("main").text
        assert "match" not in text
        assert "only just passed" not in text
        assert "Body" not in text
    page.one("details summary").click()
    assert [cell.text for cell in page.all("details th")][3:] == ["distance", ""]
    assert page.pixels(".tile canvas").max() > 0
    log = browser.get_log("browser")
    assert [entry for entry in log if "readback" not in entry["message"]] == []


def test_preparing_it_again_is_refused(old: PatchStore, config: PrepareConfig) -> None:
    with pytest.raises(StoreError, match=r"store format 1.*can be used as it is"):
        check_same_job(old, config, {})
