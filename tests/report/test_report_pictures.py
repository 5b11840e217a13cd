"""Pictures of the reports: both, on wide and narrow screens, dark, and printed.

They are kept below `$RESDIAG_SCREENSHOTS` if it is set: look at them after a change of the pages.
"""

import base64
import re
import zlib

import numpy as np
import pytest
from browser import HEIGHT, box_of, ink_share, needs_browser, paper_of, run, show, take_picture
from made_pages import run_html, study_html

pytestmark = needs_browser
PAGES = {"study": study_html, "run": run_html}
LOOKS = {
    "wide": {"width": 1280},
    "narrow": {"width": 400},
    "dark": {"width": 1280, "scheme": "dark"},
    "print": {"width": 794, "height": 1123, "scheme": "dark", "media": "print"},  # A4 at 96 dpi
}


@pytest.fixture(params=PAGES)
def name(request):
    return request.param


@pytest.fixture
def page(driver, name, tmp_path):
    """The browser with one of the reports opened; the screen is as before afterwards."""
    path = tmp_path / "report.html"
    path.write_text(PAGES[name](), "utf-8")
    show(driver)
    driver.get(path.as_uri())
    yield driver
    show(driver)


def part_of(box):
    """The pixels of a box of the page that is not scrolled."""
    top, bottom, left, right = (round(box[side]) for side in ("top", "bottom", "left", "right"))
    return slice(top, bottom), slice(left, right)


def photograph(driver, pictures, name, look):
    show(driver, **LOOKS[look])
    return take_picture(driver, pictures / f"{name}-{look}.png")


@pytest.mark.parametrize("look", LOOKS)
def test_a_picture_shows_the_whole_page_at_its_width(page, pictures, name, look):
    picture = photograph(page, pictures, name, look)
    height, width, _ = picture.shape
    assert width == LOOKS[look]["width"]
    assert height == run(page, "document.documentElement.scrollHeight")
    assert height > HEIGHT
    assert 0.02 < ink_share(picture) < 0.6
    screens = [picture[y : y + HEIGHT] for y in range(0, height - HEIGHT, HEIGHT)]
    assert min(map(ink_share, screens)) > 0.01  # no screen of nothing


def test_an_empty_page_is_blank(driver, pictures):
    driver.get("data:text/html,<title>empty</title>")
    assert ink_share(take_picture(driver, pictures / "empty.png")) == 0


def test_the_figure_of_the_answer_is_in_the_first_screen(page, pictures, name):
    picture = photograph(page, pictures, name, "wide")
    box = box_of(page, ".answer svg")
    assert 0 <= box["top"] < box["bottom"] <= HEIGHT
    figure = picture[part_of(box)]
    assert ink_share(figure) > 0.02
    assert len(np.unique((figure // 64).reshape(-1, 3), axis=0)) > 5  # lines have colours


OVERFLOW = """[...document.querySelectorAll('main *')].filter(e => e.checkVisibility()
    && !e.closest('.scroll, svg, pre, .unseen')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"""


def test_nothing_leaves_a_narrow_screen(page, pictures, name):
    photograph(page, pictures, name, "narrow")
    assert run(page, "document.documentElement.scrollWidth") == 400
    assert run(page, OVERFLOW) == []


def test_what_leaves_a_narrow_screen_would_be_seen(page):
    show(page, **LOOKS["narrow"])
    run(page, "document.querySelector('h2').style.width = '500px'")
    assert len(run(page, OVERFLOW)) == 1


FIGURES = """[...document.querySelectorAll('figure svg')]
    .map(e => e.getBoundingClientRect().toJSON())"""


def test_the_dark_page_is_dark_with_light_ink_and_paper_is_white(page, pictures, name):
    dark = photograph(page, pictures, name, "dark")
    assert paper_of(dark).max() < 40
    assert (dark.min(axis=-1) > 200).mean() > 0.002
    for box in run(page, FIGURES):
        assert (dark[part_of(box)].min(axis=-1) > 250).mean() < 0.001  # no figure is left white
    printed = photograph(page, pictures, name, "print")
    assert paper_of(printed).min() == 255
    assert (printed.max(axis=-1) < 60).mean() > 0.002


def test_a_printed_report_is_a_few_full_pages_of_a4(page, pictures, name):
    show(page)
    printed = page.execute_cdp_cmd(
        "Page.printToPDF", {"preferCSSPageSize": True, "paperWidth": 8.27, "paperHeight": 11.69}
    )
    data = base64.b64decode(printed["data"])
    (pictures / f"{name}.pdf").write_bytes(data)
    sizes = re.findall(rb"/MediaBox ?\[([^\]]+)\]", data)
    assert 2 <= len(sizes) <= 12
    for size in sizes:
        assert [float(x) for x in size.split()] == pytest.approx([0, 0, 595, 842], abs=1)  # A4
    assert all(len(content) > 500 for content in page_contents(data))


SPLIT = """[...document.querySelectorAll('thead th')].filter(e => {
    const words = document.createRange(); words.selectNodeContents(e);
    return !e.textContent.includes(' ') && words.getClientRects().length > 1;
}).map(e => e.textContent)"""


def test_no_word_of_a_printed_head_is_split(page):
    show(page, **LOOKS["print"])
    assert run(page, "document.querySelectorAll('thead th').length") > 5
    assert run(page, SPLIT) == []


def page_contents(data):
    """What the pages of a PDF draw."""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        try:
            content = zlib.decompress(stream)
        except zlib.error:
            continue
        if b" Tf" in content:
            yield content
