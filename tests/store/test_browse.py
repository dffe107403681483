"""`semgen browse`: the page served from the store, with editing, for those who know its address."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.keys import Keys

from store import ClassNote, PatchStore, StoreError, annotate, read_annotation
from store.quality import load_quality
from store.report.pictures import to_grey
from store.report.serve import ReportApp, serve
from tests.support.browser import Page
from tests.support.command import ROOT
from tests.support.crops import change_attribute

WIDTH_MM = "return document.querySelector('dialog canvas').extras.mm"
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
    address: str,
    path: str = "",
    method: str = "GET",
    body: str | bytes | None = None,
    **headers: str,
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


def put(address: str, changes: object, was: object = None) -> tuple[int, bytes]:
    body = json.dumps({"changes": changes, "was": {} if was is None else was})
    return ask(address, "annotation", "PUT", body, Content_Type="application/json")


@pytest.fixture
def page(browser: webdriver.Chrome, address: str, store: Path) -> Iterator[Page]:
    """The page with nothing decided and nothing remembered."""
    annotate(store, dict.fromkeys(range(4), asdict(ClassNote())))
    browser.get("about:blank")
    browser.get_log("browser")
    opened = Page(browser, address)
    opened.go("#/")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    opened.wait(lambda: opened.all(".card"))
    yield opened
    log = browser.get_log("browser")
    browser.get("about:blank")  # a page looks for changes as long as it is open
    assert [e for e in log if not re.search("readback|409|400", e["message"])] == []


def order(page: Page) -> list[int]:
    return [int(str(card.get_attribute("data-label"))) for card in page.all(".card")]


def test_one_key_excludes_or_keeps_a_class_and_goes_on(page: Page, store: Path) -> None:
    first, second, third, _ = order(page)
    page.press(Keys.ARROW_RIGHT, "x", "k")
    page.wait(lambda: read_annotation(store)[second].kept)
    assert read_annotation(store)[first].excluded
    assert page.active.get_attribute("data-label") == str(third)
    assert page.one("#decided").text == "2 of 4 decided"
    page.press("u")
    page.wait(lambda: not read_annotation(store)[second].kept)
    page.press("u")
    page.wait(lambda: not read_annotation(store)[first].excluded)
    page.press("r")
    page.wait(lambda: read_annotation(store)[first].excluded)
    assert page.one("#decided").text == "1 of 4 decided"


def test_a_class_is_decided_on_its_own_view_and_the_next_one_opens(page: Page, store: Path) -> None:
    first, second, *_ = order(page)
    page.go(f"#/class/{first}")
    page.press("k")
    page.wait(lambda: page.browser.current_url.endswith(f"#/class/{second}"))
    page.wait(lambda: read_annotation(store)[first].kept)


def test_arrow_keys_work_after_a_click_and_after_a_name(page: Page, store: Path) -> None:
    first, second, third, _ = order(page)
    page.go(f"#/class/{first}")
    page.one("#editor .exclude").click()
    page.wait(lambda: read_annotation(store)[first].excluded)
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.browser.current_url.endswith(f"#/class/{second}"))
    page.one("#name").send_keys(HOSTILE, Keys.ENTER)
    page.wait(lambda: read_annotation(store)[second].name == HOSTILE)
    assert page.one("h2").text.startswith(HOSTILE)
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.browser.current_url.endswith(f"#/class/{third}"))
    assert page.browser.title == "semgen: discovered classes"


def test_names_tags_and_notes_are_saved(page: Page, store: Path) -> None:
    page.go("#/class/2")
    page.one("#tags").send_keys("vessel, left", Keys.TAB)
    page.one("#note").send_keys("two organs", Keys.TAB)
    page.wait(lambda: read_annotation(store)[2].note == "two organs")
    assert read_annotation(store)[2].tags == ("left", "vessel")
    page.browser.refresh()
    page.wait(lambda: page.all("#note"))
    assert page.one("#note").get_attribute("value") == "two organs"
    assert page.one("#tags").get_attribute("value") == "left, vessel"


def test_many_classes_are_selected_and_decided_at_once(page: Page, store: Path) -> None:
    labels = order(page)
    page.one(f".card[data-label='{labels[0]}'] .pick").click()
    last = page.one(f".card[data-label='{labels[2]}'] .pick")
    ActionChains(page.browser).key_down(Keys.SHIFT).click(last).key_up(Keys.SHIFT).perform()
    assert "3 selected" in page.one("#selection").text
    page.press("n")
    page.press("rib", Keys.ENTER)
    page.wait(lambda: read_annotation(store)[labels[2]].name == "rib 3")
    page.press(Keys.CONTROL + "a")
    page.press("t")
    page.press("bone, left", Keys.ENTER)
    page.wait(
        lambda: all(read_annotation(store)[label].tags == ("bone", "left") for label in labels)
    )
    page.press("x")
    page.wait(lambda: read_annotation(store).excluded == (0, 1, 2, 3))
    page.press(Keys.CONTROL + "z")
    page.wait(lambda: read_annotation(store).excluded == ())


def test_all_classes_below_a_consistency_are_selected(page: Page) -> None:
    values = sorted(page.browser.execute_script("return data.classes.map((c) => c.consistency)"))
    limit = page.one("#below")
    limit.clear()
    limit.send_keys(str(values[2]))
    page.one("#select-below").click()
    below = sum(value < values[2] for value in values)
    selected = len(page.all(".card[aria-selected=true]"))
    assert selected == below


def test_dragging_around_cards_selects_them(page: Page) -> None:
    page.browser.execute_script("document.querySelector('.cards').scrollIntoView()")
    script = "const r = arguments[0].getBoundingClientRect(); return [r.left, r.top, r.width]"
    left, top, width = page.browser.execute_script(script, page.one(".card"))
    drag = ActionBuilder(page.browser)
    drag.pointer_action.move_to_location(left - 3, top + 5).pointer_down()
    drag.pointer_action.move_to_location(left + width // 2, top + 40).pointer_up()
    drag.perform()
    first = page.one(".card")
    assert page.all(".card[aria-selected=true]") == [first]


def test_a_member_is_left_out_of_training_and_taken_back(page: Page, store: Path) -> None:
    page.go("#/class/1")
    page.press("f", Keys.ARROW_RIGHT, "o")
    page.wait(lambda: len(read_annotation(store)[1].excluded_members) == 1)
    assert "left out" in page.one(".tile.left-out").text
    page.press(Keys.ENTER, "o")
    page.wait(lambda: read_annotation(store)[1].excluded_members == ())
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.all(".tile.left-out"))


def test_the_reference_cannot_be_left_out(page: Page, store: Path) -> None:
    page.go("#/class/1")
    page.wait(lambda: page.all(".tile"))
    page.press("f", "o")
    page.wait(lambda: "exclude the class instead" in page.one("#toasts").text)
    assert read_annotation(store)[1] == ClassNote()


def test_changes_by_another_program_appear_without_a_reload(page: Page, store: Path) -> None:
    annotate(store, {0: {"name": "liver"}})
    page.browser.execute_script("dispatchEvent(new Event('focus'))")
    page.wait(lambda: "liver" in page.titles())


def test_a_change_that_another_window_made_is_never_overwritten(page: Page, store: Path) -> None:
    first = order(page)[0]
    page.browser.execute_script("follow = async () => {}")  # as if it had not looked yet
    page.press(Keys.ARROW_RIGHT)
    annotate(store, {first: {"excluded": True}})
    page.press("x")
    page.wait(lambda: "Not saved" in page.one("#toasts").text)
    annotate(store, {first: {"name": "liver"}})
    assert read_annotation(store)[first].excluded
    assert read_annotation(store)[first].name == "liver"


def test_a_note_typed_while_another_one_is_saved_is_refused_and_shown(
    page: Page, store: Path
) -> None:
    page.go("#/class/2")
    page.one("#note").send_keys("mine")
    annotate(store, {2: {"note": "theirs"}})
    page.browser.execute_script("follow()")
    page.wait(lambda: page.browser.execute_script("return data.classes[2].note") == "theirs")
    page.press(Keys.TAB)
    page.wait(lambda: "You typed: mine" in page.one("#toasts").text)
    assert read_annotation(store)[2].note == "theirs"


def test_what_is_typed_survives_a_change_of_the_windows_width(page: Page, store: Path) -> None:
    page.go("#/class/2")
    note = page.one("#note")
    note.send_keys("a long text")
    page.browser.execute_script("route()")
    page.wait(lambda: read_annotation(store)[2].note == "a long text")
    page.one("#note").send_keys(", more", Keys.TAB)
    page.wait(lambda: read_annotation(store)[2].note == "a long text, more")
    page.one("#note").send_keys(" and more", Keys.TAB)
    page.wait(lambda: read_annotation(store)[2].note == "a long text, more and more")


def test_classes_of_one_place_are_suggested_for_comparison(page: Page) -> None:
    page.browser.execute_script(
        "Object.assign(data.classes[1], {overlap: 0.9, overlap_class: 2, rank: [1, 0]});"
        "data.classes[2].rank = [0, 0]; showProgress()"
    )
    text = page.one("#progress").text
    assert "Class 2 and Class 1 show the same place (90 % shared): keep one" in text
    buttons = page.all("#progress li button")
    assert "Exclude Class 1" in [button.text for button in buttons]
    next(button for button in buttons if button.text == "Compare").click()
    page.wait(lambda: page.browser.current_url.endswith("#/compare/2/1"))


def test_decisions_are_downloaded_and_imported(
    page: Page, store: Path, address: str, tmp_path: Path
) -> None:
    annotate(store, {1: {"name": "rib", "excluded": True}, 2: {"tags": ("left",)}})
    for kind in ("csv", "json"):
        status, content = ask(address, f"decisions.{kind}")
        assert status == 200
        (tmp_path / f"mine.{kind}").write_bytes(content)
        annotate(store, {1: {"name": "", "excluded": False}, 2: {"tags": ()}})
        page.browser.refresh()
        page.wait(lambda: page.all("#progress"))
        page.browser.execute_script(
            "HTMLInputElement.prototype.click = () => {}; importDecisions()"
        )
        page.one("#import").send_keys(str(tmp_path / f"mine.{kind}"))
        page.wait(lambda: read_annotation(store)[1].excluded)
        assert read_annotation(store)[2].tags == ("left",)
        page.wait(lambda: "rib" in page.titles())


def test_decisions_of_another_store_are_refused(address: str, store: Path) -> None:
    status, content = ask(address, "decisions.csv")
    before = read_annotation(store)
    other = content + b"0,0123456789abcdef,liver,,,False,False,\n"
    status, told = ask(
        address, "decisions.csv", "PUT", other.decode(), Content_Type="application/octet-stream"
    )
    assert status == 400
    assert len(told.splitlines()) == 1
    assert ask(address, "decisions.csv", "PUT", "x", Content_Type="text/plain")[0] == 415
    assert read_annotation(store) == before


def test_decisions_that_are_not_utf_8_are_refused(address: str, store: Path) -> None:
    _, content = ask(address, "decisions.csv")
    changed = content.decode() + "größer"
    before = read_annotation(store)
    status, told = ask(
        address, "decisions.csv", "PUT", changed.encode("cp1252"),
        Content_Type="application/octet-stream",
    )  # fmt: skip
    assert (status, told) == (400, b"the file: is not UTF-8 text; save it as CSV UTF-8 or JSON")
    assert read_annotation(store) == before


def test_a_store_that_was_prepared_again_is_not_changed(prepared: Path, tmp_path: Path) -> None:
    store = shutil.copytree(prepared, tmp_path / "s")
    opened = PatchStore(store)

    async def change_another_store() -> tuple[int, bytes]:
        started, stop = asyncio.Queue[str](), asyncio.Event()
        serving = asyncio.create_task(
            serve(opened, load_quality(opened), on_start=started.put_nowait, stop=stop.wait())
        )
        address = await started.get()
        change_attribute(store, "fingerprint", "0" * 64)
        answer = await asyncio.to_thread(put, address, {"0": {"excluded": True}})
        stop.set()
        await serving
        return answer

    status, told = asyncio.run(change_another_store())
    assert (status, told[:29]) == (400, b"the store was prepared again;")
    assert not read_annotation(store).excluded


def test_all_slices_of_a_member_are_shown_at_every_scale(page: Page, patches: PatchStore) -> None:
    page.go("#/class/1")
    page.wait(lambda: page.all(".tile button"))
    page.one(".tile button").click()
    base = page.pixels("dialog canvas")
    assert "9 of 16" in page.one("dialog").text
    page.press(Keys.ARROW_UP)
    turned = page.other_pixels("dialog canvas", base)
    assert "10 of 16" in page.one("dialog").text
    width = page.browser.execute_script(WIDTH_MM)
    page.one("dialog [data-value='1']").click()
    page.other_pixels("dialog canvas", turned)
    row = patches.rows("train", 1, 1)[0]
    base = patches.rows("train", 1, 0)[0]
    shares = patches.train.extent_mm[[base, row], 2]
    assert page.browser.execute_script(WIDTH_MM) / width == pytest.approx(
        shares[1] / shares[0], abs=2e-3
    )


def test_volumes_are_the_crops_in_grey_levels(store: Path, address: str) -> None:
    opened = PatchStore(store)
    status, content = ask(address, "crop/train-3")
    assert status == 200
    crop = to_grey(opened.train.read([3])[0])
    np.testing.assert_array_equal(np.frombuffer(content, np.uint8).reshape(crop.shape), crop)
    status, content = ask(address, "volumes/2-0")
    rows = [*opened.members(2).rows]
    found = np.frombuffer(content, np.uint8).reshape(-1, *opened.crop_shape)
    np.testing.assert_array_equal(found[: len(rows)], to_grey(opened.train.read(rows)))
    assert len(found) == len(rows) + len(opened.members(2, "validation").rows)


def test_the_owner_sees_file_names_only_when_asked(store: Path, address: str) -> None:
    _, content = ask(address)
    assert b'"paths":null' in content
    app = ReportApp(PatchStore(store), load_quality(PatchStore(store)), any_host=False,
                    paths={0: "/archive/one.nii.gz"})  # fmt: skip
    assert "/archive/one.nii.gz" in app.page()


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
    ["sheet/cards-99", "crop/train-99999", "volumes/99-0", "volumes/0-99", "volumes/99-mean",
     "class/1", "sheet/class-0", "crop/test-0"],
)  # fmt: skip
def test_unknown_pictures_are_not_found(address: str, path: str) -> None:
    assert ask(address, path)[0] in {403, 404, 405}


@pytest.mark.parametrize(
    "path", ["../zarr.json", "sheet/../../zarr.json", "sheet/%2e%2e/zarr.json"]
)
def test_no_path_opens_a_file(address: str, path: str) -> None:
    status, content = ask(address, path)
    assert status in {403, 404}
    assert b"zarr" not in content


@pytest.mark.parametrize(
    "change",
    [{"names": "x"}, {"name": 3}, {"name": "x" * 201}, {"excluded": 1}, {"tags": "x"},
     {"tags": [3]}, {"excluded_members": ["0"]}, {"excluded_members": [True]}, ["name"], "name",
     None],
)  # fmt: skip
def test_a_request_without_a_valid_change_is_refused(
    address: str, store: Path, change: object
) -> None:
    before = read_annotation(store)
    assert put(address, {"1": change})[0] == 400
    assert read_annotation(store) == before


@pytest.mark.parametrize("changes", [[], "1", {"-1": {}}, {"one": {}}, {"99": {"name": "x"}}])
def test_a_change_of_no_class_is_refused(address: str, store: Path, changes: object) -> None:
    before = read_annotation(store)
    assert put(address, changes)[0] == 400
    assert read_annotation(store) == before


def test_a_form_of_another_site_cannot_change_anything(address: str) -> None:
    body = '{"changes": {"1": {"name": "x"}}, "was": {}}'
    assert ask(address, "annotation", "PUT", body, Content_Type="text/plain")[0] == 415


@pytest.mark.parametrize(
    "body",
    ["{", "[" * 30_000, '{"name": ' * 5_000,
     '{"was": {}, "changes": {"1": {"name": "\\ud800"}}}',
     '{"was": {}, "changes": {"1": {"name": "two\\nlines"}}}'],
    ids=["half", "deep list", "deep object", "half a character", "two lines"],
)  # fmt: skip
def test_a_malformed_change_is_refused(address: str, store: Path, body: str) -> None:
    before = read_annotation(store)
    status, _ = ask(address, "annotation", "PUT", body, Content_Type="application/json")
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
