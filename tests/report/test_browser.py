"""The report in a real browser: no script, no request, no serious finding of axe, any scheme.

Needs Chromium, its driver, and from Python selenium and axe-core-python; `$AXE` names another
axe.min.js than the one that comes with the latter.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import HOSTILE
from made_studies import GRID, make_results, make_study

from resdiag.report.figures import draw_figures
from resdiag.report.render import to_html
from resdiag.report.sections import write_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium with its driver: apt-get install chromium-driver"
)


@pytest.fixture(scope="module")
def driver():
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    opened.set_script_timeout(120)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def axe():
    package = pytest.importorskip("axe_core_python")
    path = os.environ.get("AXE") or Path(package.__file__).parent / "axe.min.js"
    return Path(path).read_text("utf-8")


@pytest.fixture(scope="module")
def html():
    results = make_results(missing=(1,), failed=(2,))
    page = write_page(results, list(draw_figures(results)))
    return to_html(replace(page, made="Made now."))


@pytest.fixture
def page(html, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html, "utf-8")
    return path.as_uri()


def visit(driver, uri):
    """Open a page; returns what the console said and what was requested."""
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(uri)
    return console(driver), requests(driver)


def console(driver):
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver):
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith("data:")]


def show(driver, *, width=1200, scheme="light"):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def run(driver, script):
    return driver.execute_script(f"return {script}")


def test_nothing_is_asked_of_the_network_and_nothing_is_refused(driver, page):
    said, asked = visit(driver, page)
    assert said == []
    assert asked == [page]
    assert run(driver, "document.scripts.length") == 0


def test_a_script_and_a_request_would_be_seen(driver, html, tmp_path):
    path = tmp_path / "bad.html"
    bad = '<script>document.title = "bad"</script><img src="http://127.0.0.1:9/x.png" alt="">'
    path.write_text(html.replace("<h1>", f"{bad}<h1>"), "utf-8")
    said, asked = visit(driver, path.as_uri())
    assert len([line for line in said if "Content Security Policy" in line]) == 2
    assert asked == [path.as_uri(), "http://127.0.0.1:9/x.png"]  # also what the policy refused
    assert driver.title.startswith("made: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_axe_has_no_serious_finding(driver, page, axe, width, scheme):
    visit(driver, page)
    show(driver, width=width, scheme=scheme)
    run(driver, "document.querySelectorAll('details').forEach(d => d.open = true)")
    driver.execute_script(axe)
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(r => done(r.violations))"
    )
    serious = [
        (f["id"], f["nodes"][0]["html"][:200])
        for f in found
        if f["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_axe_would_find_what_cannot_be_read(driver, html, axe, tmp_path):
    path = tmp_path / "pale.html"
    pale = html.replace('<p class="headline">', '<svg role="img"></svg><p class="headline">')
    path.write_text(pale, "utf-8")
    visit(driver, path.as_uri())
    driver.execute_script(axe)
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(r => done(r.violations.map(v => v.id)))"
    )
    assert "svg-img-alt" in found


def test_a_narrow_screen_scrolls_tables_and_not_the_page(driver, page):
    visit(driver, page)
    show(driver, width=400)
    run(driver, "document.querySelectorAll('details').forEach(d => d.open = true)")
    assert run(driver, "document.documentElement.scrollWidth") <= 400
    wide = "[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
    assert run(driver, wide)


COLOUR = "getComputedStyle(document.body).backgroundColor"
TITLE = "getComputedStyle(document.querySelector('svg text')).fill"


def test_light_and_dark_follow_the_system_until_the_reader_chooses(driver, page):
    visit(driver, page)
    seen = {}
    for scheme in ("light", "dark"):
        show(driver, scheme=scheme)
        seen[scheme] = run(driver, COLOUR), run(driver, TITLE)
    assert seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1]  # figures follow, too
    run(driver, "document.getElementById('theme-light').click()")
    assert (run(driver, COLOUR), run(driver, TITLE)) == seen["light"]
    show(driver, scheme="light")
    run(driver, "document.getElementById('theme-dark').click()")
    assert (run(driver, COLOUR), run(driver, TITLE)) == seen["dark"]


def test_the_keyboard_reaches_everything(driver, page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    visit(driver, page)
    driver.switch_to.active_element.send_keys(keys.TAB)
    assert driver.switch_to.active_element.text == "To the answer"
    driver.switch_to.active_element.send_keys(keys.ENTER)
    assert run(driver, "document.activeElement.id") == "main"
    kinds = set()
    for _ in range(60):
        driver.switch_to.active_element.send_keys(keys.TAB)
        element = driver.switch_to.active_element
        if element.tag_name == "body":  # round
            break
        kinds.add(element.tag_name)
        if element.tag_name == "summary":
            element.send_keys(keys.SPACE)
            assert run(driver, "document.activeElement.parentElement.open")
    assert {"a", "summary", "div"} <= kinds  # links, what is folded, what scrolls


@pytest.mark.parametrize("words", HOSTILE[:6], ids=range(6))
def test_hostile_words_run_nothing(driver, words, tmp_path):
    study = make_study(GRID)
    document = study.file.model_copy(update={"question": words, "expects": words, "source": words})
    results = make_results(study.__class__(study.name, study.document, document, study.cells))
    path = tmp_path / "hostile.html"
    path.write_text(to_html(replace(write_page(results, []), made=words)), "utf-8")
    said, asked = visit(driver, path.as_uri())
    assert said == []
    assert asked == [path.as_uri()]
    heading = run(driver, "document.querySelector('h1').textContent")
    assert heading == words
    assert run(driver, "document.scripts.length + document.images.length") == 0
