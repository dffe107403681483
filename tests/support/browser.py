"""A real browser, headless, and what a person does with a page in it."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL without a GPU
)  # fmt: skip


def start_browser() -> Iterator[webdriver.Chrome]:
    """Chromium; the test is skipped where there is none, but under CI it fails."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        if os.environ.get("CI"):
            pytest.fail("Debian's chromium and chromium-driver are not installed")
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.set_window_size(1200, 900)
        yield chrome


class Page:
    """What a person does with the page."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser, self.address = browser, address

    def go(self, place: str) -> None:
        """Open a place of the page, and wait until it is shown."""
        self.browser.get(f"{self.address}{place}")
        self.browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    @property
    def active(self) -> WebElement:
        """The element that has the keyboard."""
        return self.browser.switch_to.active_element

    def press(self, *keys: str) -> None:
        for key in keys:
            self.active.send_keys(key)

    def colour(self, variable: str) -> tuple[int, ...]:
        """Red, green and blue of a colour of the style sheet, in the present theme."""
        script = (
            "const node = el('i', { style: `color: var(--${arguments[0]})` }); main.append(node);"
            "const shown = getComputedStyle(node).color; node.remove(); return shown"
        )
        found = self.browser.execute_script(script, variable)
        return tuple(int(part) for part in re.findall(r"\d+", found)[:3])

    def wait(self, holds: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 10).until(lambda _: holds())

    def pixels(self, selector: str) -> np.ndarray:
        """Grey levels of a canvas, once it is drawn."""
        self.wait(lambda: self.one(selector).get_attribute("data-drawn"))
        script = (
            "const c = document.querySelector(arguments[0]);"
            "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        )
        return np.array(self.browser.execute_script(script, selector)).reshape(-1, 4)[:, 0]

    def other_pixels(self, selector: str, before: np.ndarray) -> np.ndarray:
        """Grey levels of a canvas as soon as they are no longer those."""

        def differ() -> bool:
            return not np.array_equal(self.pixels(selector), before)

        self.wait(differ)
        return self.pixels(selector)

    def titles(self) -> list[str]:
        script = "return [...document.querySelectorAll('.card .name')].map((e) => e.textContent)"
        return list(self.browser.execute_script(script))
