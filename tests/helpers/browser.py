"""A browser without a window, and what tests ask of it: pages, pictures, what axe finds."""

import base64
import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium with its driver: apt-get install chromium-driver"
)

WORDS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--hide-scrollbars",
)  # fmt: skip
HEIGHT = 900
"""Pixels of the first screen."""
SIDES = ("clientWidth", "scrollHeight")
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@contextlib.contextmanager
def open_browser():
    """Chromium under its driver, with the logs of its console and of the network."""
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for word in WORDS:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        opened.set_script_timeout(120)
        yield opened
    finally:
        opened.quit()


def read_axe():
    """The text of axe.min.js: of `$AXE`, or the one that comes with axe-core-python."""
    package = pytest.importorskip("axe_core_python")
    return Path(os.environ.get("AXE") or Path(package.__file__).parent / "axe.min.js").read_text(
        "utf-8"
    )


def violations(driver, axe):
    """Everything that axe finds, of any impact, with all that is folded opened."""
    run(driver, OPEN_ALL)
    driver.execute_script(axe)
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(r => done(r.violations))"
    )
    return [(f["id"], f["nodes"][0]["html"][:200]) for f in found]


def run(driver, script):
    """The value of an expression in the page."""
    return driver.execute_script(f"return {script}")


def show(driver, *, width=1200, height=HEIGHT, scheme="light", media=""):
    """Set the size of the screen, the scheme of colours and the medium."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features, "media": media})


def box_of(driver, what):
    """Where the first element of a CSS selector lies on the screen."""
    return run(driver, f"document.querySelector({what!r}).getBoundingClientRect().toJSON()")


def take_picture(driver, path):
    """Write the whole page, also below the screen, as PNG; returns it as (y, x, RGB)."""
    width, height = (run(driver, f"document.documentElement.{side}") for side in SIDES)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
    )
    data = base64.b64decode(shot["data"])
    path.write_bytes(data)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def paper_of(picture):
    """The colour of a picture that most pixels have."""
    packed = picture.astype(np.uint32) @ np.array([1, 256, 65536], dtype=np.uint32)
    colours, counts = np.unique(packed, return_counts=True)
    most = int(colours[counts.argmax()])
    return np.array([most % 256, most // 256 % 256, most // 65536])


def ink_share(picture):
    """Share of the pixels that clearly differ from the background."""
    apart = np.abs(picture.astype(np.int16) - paper_of(picture).astype(np.int16)).max(axis=-1)
    return float((apart > 24).mean())
