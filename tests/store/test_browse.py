"""`semgen browse`: the page served from the store, with editing, for those who know its address."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from store import PatchStore, StoreError, annotate, read_annotation
from store.report.build import crop_sheet
from store.report.pictures import to_grey
from store.report.serve import serve
from tests.support.browser import Page
from tests.support.command import ROOT

HOSTILE = "<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def store(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(prepared, tmp_path_factory.mktemp("browse") / "mine.store")


@pytest.fixture(scope="module")
def address(store: Path) -> Iterator[str]:
    job = subprocess.Popen(
        [sys.executable, "-m", "cli", "browse", str(store), "--no-open"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert job.stdout is not None
    yield job.stdout.readline().strip()
    job.send_signal(signal.SIGINT)
    _, told = job.communicate(timeout=30)
    assert job.returncode == 0, told
    assert "Traceback" not in told


def ask(
    address: str, path: str = "", method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, bytes]:
    """Status and answer, of a path as it is written."""
    place = urlsplit(address)
    assert place.hostname == "127.0.0.1"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(
        http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    ) as connection:
        connection.request(method, path if path.startswith("/") else place.path + path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.read()


def put(address: str, label: object, change: object) -> tuple[int, bytes]:
    return ask(
        address, f"class/{label}", "PUT", json.dumps(change), Content_Type="application/json"
    )


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    browser.get("about:blank")
    browser.get_log("browser")
    opened = Page(browser, address)
    opened.go("#/classes")
    yield opened
    log = browser.get_log("browser")
    assert [entry for entry in log if "readback" not in entry["message"]] == []


def test_names_notes_and_exclusions_are_saved(page: Page, store: Path) -> None:
    page.go("#/class/2")
    page.one("#name").send_keys(HOSTILE, Keys.TAB)
    page.wait(lambda: page.one("[role=status]").text == "Saved")
    page.one("#note").send_keys("two organs", Keys.TAB)
    page.one("#exclude").click()
    page.wait(lambda: read_annotation(store)[2].excluded)
    assert page.one("h2").text.startswith(HOSTILE)
    page.browser.refresh()
    page.wait(lambda: page.all("#name"))
    assert page.one("#name").get_attribute("value") == HOSTILE
    assert page.one("#note").get_attribute("value") == "two organs"
    assert page.one("#exclude").is_selected()
    assert page.browser.title == "semgen: discovered classes"


def test_changes_by_another_program_are_shown_after_a_reload(page: Page, store: Path) -> None:
    annotate(store, {0: {"name": "liver"}})
    page.browser.refresh()
    page.wait(lambda: "liver" in page.titles())


def test_all_slices_of_a_member_are_shown(page: Page, store: Path) -> None:
    page.go("#/class/1")
    page.wait(lambda: page.all(".member button"))
    page.one(".member button").click()
    first = page.pixels("dialog canvas")
    slider = page.one("dialog input")
    assert slider == page.browser.switch_to.active_element
    slider.send_keys(Keys.ARROW_RIGHT)
    page.other_pixels("dialog canvas", first)
    assert "10 of 16" in page.one("dialog").text
    slider.send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.all("dialog"))


def test_pictures_are_loaded_when_they_become_visible(page: Page) -> None:
    assert page.pixels(".card canvas").max() > 50


def test_full_crops_are_compressed_without_loss(store: Path, address: str) -> None:
    import io

    from PIL import Image

    status, content = ask(address, "sheet/crop-train-3")
    assert status == 200
    assert content == crop_sheet(PatchStore(store), "train", 3)
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    crop = to_grey(PatchStore(store).train.read([3])[0])
    np.testing.assert_array_equal(sheet[:32, :32], crop[0])
    np.testing.assert_array_equal(sheet[32:64, 32:64], crop[9])


@pytest.mark.parametrize(
    "path",
    ["/", "/wrong-token/", "/wrong-token/sheet/class-0", "/..%2f..%2fetc/passwd",
     "/../../etc/passwd", "//etc/passwd"],
)  # fmt: skip
def test_requests_without_the_token_are_refused(address: str, path: str) -> None:
    assert ask(address, path)[0] == 403


def test_another_host_name_is_refused(address: str) -> None:
    assert ask(address, Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    "path",
    ["sheet/class-99", "sheet/crop-train-99999", "sheet/cards-4", "class/1"],
)
def test_unknown_pictures_are_not_found(address: str, path: str) -> None:
    assert ask(address, path)[0] in {404, 405}


@pytest.mark.parametrize(
    "path", ["../zarr.json", "sheet/../../zarr.json", "sheet/%2e%2e/zarr.json"]
)
def test_no_path_opens_a_file(address: str, path: str) -> None:
    status, content = ask(address, path)
    assert status in {403, 404}
    assert b"zarr" not in content


@pytest.mark.parametrize(
    "change",
    [{"names": "x"}, {"name": 3}, {"name": "x" * 201}, {"excluded": 1}, ["name"], "name", None],
)
def test_a_request_without_a_valid_change_is_refused(
    address: str, store: Path, change: object
) -> None:
    before = read_annotation(store)
    assert put(address, 1, change)[0] == 400
    assert ask(address, "class/1", "PUT", "{", Content_Type="application/json")[0] == 400
    assert read_annotation(store) == before


def test_a_form_of_another_site_cannot_change_anything(address: str) -> None:
    assert ask(address, "class/1", "PUT", '{"name": "x"}', Content_Type="text/plain")[0] == 415


def test_an_unknown_class_cannot_be_named(address: str) -> None:
    assert put(address, 99, {"name": "x"})[0] == 404


@pytest.mark.parametrize(
    "body",
    ["[" * 30_000, '{"name": ' * 5_000, '{"name": "\\ud800"}', '{"name": "two\\nlines"}'],
    ids=["deep list", "deep object", "half a character", "two lines"],
)
def test_a_malformed_change_is_refused(address: str, store: Path, body: str) -> None:
    before = read_annotation(store)
    status, _ = ask(address, "class/1", "PUT", body, Content_Type="application/json")
    assert status == 400
    assert read_annotation(store) == before


@pytest.mark.skipif(not socket.has_ipv6, reason="this system has no IPv6")
def test_an_ipv6_address_is_printed_in_brackets(store: Path) -> None:
    told: list[str] = []
    stop = asyncio.sleep(0)
    asyncio.run(serve(PatchStore(store), [], host="::1", on_start=told.append, stop=stop))
    assert told[0].startswith("http://[::1]:")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_the_error_for_a_port_in_use_names_the_port(store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StoreError, match=f"port {port}: .*give another --host or --port"):
            asyncio.run(serve(PatchStore(store), [], port=port, on_start=print))
    gc.collect()  # tornado leaves the socket that it could not bind
