"""The reports in a real browser: no request, no finding of axe, any scheme, and the heat map.

Needs Chromium, its driver, and from Python selenium and axe-core-python; `$AXE` names another
axe.min.js than the one that comes with the latter.
"""

import json
import time
from dataclasses import replace

import pytest
import synthetic_runs
from browser import needs_browser, run, show, violations
from hostile import HOSTILE
from made_pages import run_html, study_html
from made_studies import GRID, make_results, make_study

from resdiag.report.render import to_html
from resdiag.report.runpage import write_run_page
from resdiag.report.sections import write_page

pytestmark = needs_browser


@pytest.fixture(scope="module")
def html():
    return study_html()


@pytest.fixture
def page(html, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html, "utf-8")
    return path.as_uri()


@pytest.fixture
def run_page(tmp_path):
    path = tmp_path / "run.html"
    path.write_text(run_html(), "utf-8")
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
    for _ in range(100):  # the log of a busy browser comes late
        if len(said) >= 2 and len(asked) >= 2:
            break
        time.sleep(0.1)
        said, asked = said + console(driver), asked + requests(driver)
    assert len([line for line in said if "Content Security Policy" in line]) == 2
    assert asked == [path.as_uri(), "http://127.0.0.1:9/x.png"]  # also what the policy refused
    assert driver.title.startswith("made: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("which", ["page", "run_page"])
def test_axe_finds_nothing(driver, request, axe, which, width, scheme):
    visit(driver, request.getfixturevalue(which))
    show(driver, width=width, scheme=scheme)
    assert violations(driver, axe) == []


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


HINTED = """[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => getComputedStyle(e.parentElement, '::before').content)"""


@pytest.mark.parametrize("which", ["page", "run_page"])
def test_a_narrow_screen_scrolls_tables_with_a_hint_and_not_the_page(driver, request, which):
    visit(driver, request.getfixturevalue(which))
    show(driver, width=400)
    run(driver, "document.querySelectorAll('details').forEach(d => d.open = true)")
    assert run(driver, "document.documentElement.scrollWidth") <= 400
    hints = run(driver, HINTED)
    assert hints
    assert all("Scroll sideways" in hint for hint in hints)


@pytest.mark.parametrize("which", ["page", "run_page"])
def test_answer_and_figure_stand_on_the_first_screen(driver, request, which):
    visit(driver, request.getfixturevalue(which))
    show(driver, width=1280)
    for what in (".headline", ".answer svg"):
        box = run(driver, f"document.querySelector('{what}').getBoundingClientRect().toJSON()")
        assert 0 <= box["top"] < box["bottom"] <= 900


def test_print_shows_all_on_white_and_no_controls(driver, run_page):
    visit(driver, run_page)
    show(driver, scheme="dark")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        for what in (".theme", "nav", "#every-cell"):
            assert run(driver, f"getComputedStyle(document.querySelector('{what}')).display") == (
                "none"
            )
        ink = run(driver, "getComputedStyle(document.querySelector('.headline')).color")
        assert ink == "rgb(27, 29, 34)"
        folded = "document.querySelector('details > :not(summary)').checkVisibility()"
        assert run(driver, folded)
        assert len(driver.print_page()) > 10_000
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


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


# -- the heat map ----------------------------------------------------------------------------------

VALUE = "document.getElementById('heat-value').textContent"
PIXEL = """(() => {
    const canvas = document.getElementById('heat-canvas'), pen = canvas.getContext('2d');
    const [steps, blocks, b, s] = [%d, %d, %d, %d];
    const x = (s + .5) * canvas.width / steps, y = (blocks - b - .5) * canvas.height / blocks;
    return [...pen.getImageData(x, y, 1, 1).data];
})()"""


def heat_data(driver):
    return json.loads(run(driver, "document.getElementById('heat-data').textContent"))[0]


def press(driver, *names):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    for name in names:
        driver.switch_to.active_element.send_keys(getattr(keys, name))
    return run(driver, VALUE)


def test_the_heat_map_is_walked_by_keys_and_says_each_value(driver, run_page):
    said, asked = visit(driver, run_page)
    assert said == []
    assert asked == [run_page]
    data = heat_data(driver)
    metric, last = data["metrics"][0], len(data["blocks"]) - 1
    run(driver, "document.getElementById('heat-grid').focus()")
    start = f"step 0, block 0 ({data['blocks'][0]}): {metric['label']} "
    assert run(driver, VALUE).startswith(start)
    shown = float(run(driver, VALUE).removeprefix(start))
    assert shown == pytest.approx(metric["values"][0][0], rel=6e-3)
    assert press(driver, "LEFT", "DOWN").startswith(start)  # the edge
    assert press(driver, "RIGHT").startswith(f"step {data['steps'][1]}, block 0 ")
    assert press(driver, "UP").startswith(f"step {data['steps'][1]}, block 1 ")
    found = press(driver, "END", "PAGE_UP")
    assert found.startswith(f"step {data['steps'][-1]}, block {last} ")
    assert found.endswith(" not finite")
    assert press(driver, "HOME", "PAGE_DOWN").startswith(start)
    live = "document.getElementById('heat-value').getAttribute('aria-live')"
    assert run(driver, live) == "polite"


def test_another_metric_keeps_the_cell_and_shows_its_values(driver, run_page):
    visit(driver, run_page)
    data = heat_data(driver)
    run(driver, "document.getElementById('heat-grid').focus()")
    press(driver, "RIGHT", "UP", "UP")
    for place, metric in enumerate(data["metrics"]):
        run(driver, f"document.getElementById('heat-metric').value = {place}")
        run(driver, "document.getElementById('heat-metric').dispatchEvent(new Event('change'))")
        said = run(driver, VALUE)
        assert f"step {data['steps'][1]}, block 2 " in said
        value = metric["values"][2][1]
        words = said.partition(f": {metric['label']} ")[2]
        assert float(words) == pytest.approx(value, rel=6e-3)


def test_colours_tell_values_and_what_is_not_finite_is_striped(driver, run_page):
    visit(driver, run_page)
    show(driver, width=1280)
    data = heat_data(driver)
    values, size = data["metrics"][0]["values"], (len(data["steps"]), len(data["blocks"]))
    finite = {(b, s): v for b, row in enumerate(values) for s, v in enumerate(row)
              if isinstance(v, float) and (b, s) != (0, 0)}  # fmt: skip
    low, high = min(finite, key=finite.get), max(finite, key=finite.get)
    dark, light = (sum(run(driver, PIXEL % (*size, *place))[:3]) for place in (low, high))
    assert dark < light
    lost = next((b, s) for b, row in enumerate(values) for s, v in enumerate(row) if v == "x")
    assert run(driver, PIXEL % (*size, *lost))[3] == 255
    area = """(() => {
        const canvas = document.getElementById('heat-canvas'), pen = canvas.getContext('2d');
        const data = pen.getImageData(canvas.width - 40, 5, 30, 30).data, seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 3).join());
        return [...seen];
    })()"""
    colours = run(driver, area)
    assert {"255,255,255", "166,58,0"} <= set(colours)  # white and the colour of the stripes


def test_the_pointer_picks_a_cell(driver, run_page):
    chains = pytest.importorskip("selenium.webdriver").ActionChains
    visit(driver, run_page)
    show(driver, width=1280)
    canvas = driver.find_element("id", "heat-canvas")
    run(driver, "document.getElementById('heat-canvas').scrollIntoView({block: 'center'})")
    chains(driver).move_to_element_with_offset(canvas, 3, 0).perform()
    data = heat_data(driver)
    middle = data["steps"][len(data["steps"]) // 2]
    assert run(driver, VALUE).startswith(f"step {middle}, block {len(data['blocks']) // 2} ")


def test_runs_side_by_side_are_chosen_from(driver, tmp_path):
    runs = [synthetic_runs.make_run("elu", 20), synthetic_runs.make_run("elu", 56)]
    path = tmp_path / "two.html"
    path.write_text(to_html(write_run_page(runs, [])), "utf-8")
    visit(driver, path.as_uri())
    assert run(driver, "document.getElementById('heat-run').options.length") == 2
    assert "(stages.0.0)" in run(driver, VALUE)
    run(driver, "document.getElementById('heat-run').value = 1")
    run(driver, "document.getElementById('heat-run').dispatchEvent(new Event('change'))")
    run(driver, "document.getElementById('heat-grid').focus()")
    assert "block 26 " in press(driver, "PAGE_UP")
