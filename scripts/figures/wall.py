"""The wall of classes, as a browser shows it."""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from store import PatchStore
from store.report import write_report

SIZE = {"width": 1200, "height": 850, "deviceScaleFactor": 1, "mobile": False}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


def photograph_wall(store: PatchStore, _label: int | None) -> Image.Image:
    """The first screen of `semgen report`, in light colours."""
    options, driver = (
        webdriver.ChromeOptions(),
        webdriver.ChromeService(shutil.which("chromedriver")),
    )
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder, webdriver.Chrome(options, driver) as chrome:
        page = Path(folder) / "classes.html"
        write_report(store, page)
        light = [{"name": "prefers-color-scheme", "value": "light"}]
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
        chrome.get(page.as_uri())
        drawn = "return document.querySelectorAll('canvas').length > 0"
        WebDriverWait(chrome, 60).until(lambda _: chrome.execute_script(drawn))
        chrome.execute_async_script("setTimeout(arguments[0], 1500)")  # pictures are drawn idly
        return Image.open(io.BytesIO(chrome.get_screenshot_as_png()))
