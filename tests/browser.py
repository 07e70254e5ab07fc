"""Debian's Chromium without a window, driven by Debian's driver: nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

DRIVER = "/usr/bin/chromedriver"  # named, so selenium does not look for one
SWITCHES = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "hide-scrollbars", "force-color-profile=srgb"),
)
LAPTOP, PHONE = (1440, 900), (390, 844)


@contextmanager
def chromium(folder: Path) -> Iterator[Chrome]:
    """A browser whose profile is a new folder within `folder`."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in (*SWITCHES, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Chrome, page: Path, size: tuple[int, int] = LAPTOP, theme: str = "light") -> None:
    """Open a page of ours, as large and as dark as asked, and wait until its rollouts are there."""
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(page.as_uri())
    ready = "const b = document.getElementById('browser'); return !b || !b.hidden"
    WebDriverWait(driver, 20, poll_frequency=0.02).until(lambda d: d.execute_script(ready))


def complaints(driver: Chrome) -> list[dict[str, Any]]:
    """What the console has said since it was last asked, policy violations included."""
    entries: list[dict[str, Any]] = driver.get_log("browser")
    return entries
