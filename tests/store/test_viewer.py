"""The 3-D viewer of `semgen browse`: a member's crop within its scan."""

import asyncio
import base64
import hashlib
import http.client
import re
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from store import PatchStore
from store.quality import load_quality
from store.report import write_report
from store.report.serve import serve
from store.report.volumes import crop_nifti, scan_nifti
from tests.support.browser import Page

LABEL = 1
NIIVUE_0_69_0 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"


# Volumes


def read(content: bytes, folder: Path) -> sitk.Image:
    (folder / "volume.nii").write_bytes(content)
    return sitk.ReadImage(str(folder / "volume.nii"))


def test_a_crop_is_a_nifti_where_it_lies_in_its_scan(patches: PatchStore, tmp_path: Path) -> None:
    split = patches.train
    image = read(crop_nifti(patches, "train", 5), tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), split.read([5])[0])
    step_mm = split.extent_mm[5] / patches.crop_shape
    np.testing.assert_allclose(image.GetSpacing()[::-1], step_mm, rtol=1e-6)
    first_mm = split.origin_mm[5] + step_mm / 2
    np.testing.assert_allclose(image.GetOrigin()[::-1], first_mm, atol=1e-3)
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)  # LPS, as SimpleITK has it


def test_a_scan_is_its_thumbnail_in_hu_and_covers_its_frame(
    patches: PatchStore, tmp_path: Path
) -> None:
    image = read(scan_nifti(patches, 2), tmp_path)
    hu = patches.thumbnails.read([2])[0] / 255 * 2000 - 1000
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), hu, atol=1e-2)
    corners = [
        image.TransformContinuousIndexToPhysicalPoint(index)[::-1]
        for index in ((-0.5, -0.5, -0.5), (127.5, 127.5, 63.5))
    ]
    np.testing.assert_allclose(corners, patches.scans.frame_mm[2], atol=1e-2)


# The server


@pytest.fixture(scope="module")
def address(patches: PatchStore) -> Iterator[str]:
    """The address of a server of `prepared`."""
    quality, found, started = load_quality(patches), [], threading.Event()
    loop = asyncio.new_event_loop()
    stop = loop.create_future()

    def show(url: str) -> None:
        found.append(url)
        started.set()

    run = serve(patches, quality, on_start=show, stop=stop)
    thread = threading.Thread(target=loop.run_until_complete, args=(run,))
    thread.start()
    assert started.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(stop.set_result, None)
    thread.join(30)
    loop.close()


def ask(address: str, path: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    place = urlsplit(address)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request("GET", place.path + path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_the_server_sends_volumes_and_the_viewer(address: str, patches: PatchStore) -> None:
    assert ask(address, "volume/train-5.nii")[::2] == (200, crop_nifti(patches, "train", 5))
    assert ask(address, "volume/scan-2.nii")[::2] == (200, scan_nifti(patches, 2))
    status, headers, content = ask(address, "niivue.js")
    assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
    assert hashlib.sha256(content).hexdigest() == NIIVUE_0_69_0
    for path in ("volume/train-99999.nii", "volume/scan-5.nii", "volume/test-1.nii", "other.js"):
        assert ask(address, path)[0] in {403, 404}


def test_the_viewer_has_its_licence_beside_it() -> None:
    text = (files("store.report") / "vendor" / "niivue.LICENSE").read_text("utf-8")
    assert "@niivue/niivue 0.69.0, unchanged" in text
    assert "BSD 2-Clause License" in text


def test_a_report_in_one_file_has_no_viewer(patches: PatchStore, tmp_path: Path) -> None:
    write_report(patches, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "function openViewer" not in page
    assert "script-src 'unsafe-inline'\"" in page


# The viewer


@pytest.fixture
def viewer(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    """The viewer of the second member of a class, opened with the button of the page."""
    browser.get("about:blank")
    browser.get_log("browser")
    size = browser.get_window_size()
    browser.set_window_size(800, 700)  # less to draw
    page = Page(browser, address)
    page.go(f"#/class/{LABEL}")
    browser.execute_script("localStorage.clear()")
    page.wait(lambda: len(page.all(".tile button")) > 1)
    assert page.all("script[src]") == []  # not loaded yet
    page.all(".tile button")[1].click()
    page.wait(lambda: page.all("#in-3d"))
    page.one("#in-3d").click()
    wait_until_drawn(page, "scan")
    yield page
    browser.get("about:blank")
    browser.set_window_size(size["width"], size["height"])
    log = browser.get_log("browser")
    assert [entry for entry in log if not re.search("GPU|GL Driver", entry["message"])] == []


def wait_until_drawn(page: Page, view: str) -> None:
    page.wait(lambda: page.all(f"#viewer canvas[data-drawn='{view}']"))


def pixels(page: Page) -> NDArray[np.uint8]:
    """(height, width, 3) what the canvas shows."""
    script = """
        const { viewer } = document.getElementById("viewer"), { gl } = viewer;
        viewer.drawScene();
        const width = gl.drawingBufferWidth, height = gl.drawingBufferHeight;
        const rgba = new Uint8Array(4 * width * height);
        gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
        let text = "";
        for (let i = 0; i < rgba.length; i += 4096)
            text += String.fromCharCode(...rgba.subarray(i, i + 4096));
        return [width, height, btoa(text)];
    """
    width, height, text = page.browser.execute_script(script)
    found = np.frombuffer(base64.b64decode(text), np.uint8)
    return found.reshape(height, width, 4)[::-1, :, :3]


def ask_viewer(page: Page, expression: str) -> Any:
    """A value that NiiVue knows; `v` is its viewer."""
    return page.browser.execute_script(
        f"const v = document.getElementById('viewer').viewer; return {expression}"
    )


def place_of(page: Page, patches: PatchStore) -> tuple[int, NDArray[np.float64]]:
    """Scan and centre (z, y, x) of the member that the viewer shows."""
    scan_id = page.one("#viewer h2").text.split()[-1]
    scan = [f"{int(number):016x}" for number in patches.scans.id].index(scan_id)
    split = ("train", "validation")[patches.scans.split[scan]]
    members = patches.members(LABEL, split)
    return scan, members.places[members.scans.tolist().index(scan)]


def test_the_crosshair_is_on_the_centre_of_the_class(viewer: Page, patches: PatchStore) -> None:
    scan, (z, y, x) = place_of(viewer, patches)
    right, front, head, _ = ask_viewer(viewer, "Array.from(v.frac2mm(v.scene.crosshairPos))")
    np.testing.assert_allclose((-right, -front, head), (x, y, z), atol=0.1)
    assert f"{x:.1f} mm to the left" in viewer.one("#viewer output").text

    # and so it is in the picture: the axial plane from the feet, the patient's left on the right
    low, high = patches.scans.frame_mm[scan]
    share = (np.array([y, x]) - low[1:]) / (high - low)[1:]
    axial = next(
        tile["leftTopWidthHeight"]
        for tile in ask_viewer(viewer, "v.screenSlices.map((s) => ({...s}))")
        if tile["axCorSag"] == 0
    )
    left, top, width, height = map(round, axial)
    shown = pixels(viewer)[top : top + height, left : left + width].astype(int)
    red, green, blue = np.moveaxis(shown, -1, 0)
    yellow = (red > 120) & (red - blue > 80) & (green > 0.6 * red)  # a line is longer than the crop
    assert abs(yellow.sum(1).argmax() / height - share[0]) < 0.03
    assert abs(yellow.sum(0).argmax() / width - share[1]) < 0.03


def test_the_crop_is_coloured_within_the_grey_scan(viewer: Page) -> None:
    shown = pixels(viewer).astype(int)
    spread = np.ptp(shown, axis=-1)
    grey = (spread < 4) & (shown[..., 0] > 60)
    coloured = (spread > 30) & (shown[..., 0] > shown[..., 2])
    assert grey.mean() > 0.05
    assert 0.002 < coloured.mean() < grey.mean()


def test_a_window_changes_the_picture_and_the_crop_is_shown_alone(viewer: Page) -> None:
    first = viewer.one("#viewer [aria-label='Window'] [aria-checked='true']")
    before = pixels(viewer)
    viewer.one("#viewer [aria-label='Window'] [data-value='4']").click()
    assert ask_viewer(viewer, "v.volumes.map((o) => [o.cal_min, o.cal_max])") == [[-500, 1300]] * 2
    assert not np.array_equal(pixels(viewer), before)
    viewer.press(str(first.get_attribute("data-value")))
    np.testing.assert_array_equal(pixels(viewer), before)
    low = ask_viewer(viewer, "v.volumes[0].cal_min")
    viewer.one("#viewer [data-value='crop']").click()
    wait_until_drawn(viewer, "crop")
    assert ask_viewer(viewer, "v.volumes.map((o) => [o.name, o.cal_min])") == [["crop.nii", low]]


def test_escape_closes_the_viewer_alone(viewer: Page) -> None:
    viewer.browser.find_element(By.CSS_SELECTOR, "#viewer canvas").send_keys(Keys.ESCAPE)
    viewer.wait(lambda: not viewer.all("#viewer"))
    assert len(viewer.all("dialog[open]")) == 1
    viewer.one("#in-3d").click()
    wait_until_drawn(viewer, "scan")
