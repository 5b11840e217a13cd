"""The live page: who may read it, what it is told, and how it looks in a real browser."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from browser import ink_share, needs_browser, paper_of, run, show, take_picture, violations

import resdiag
from resdiag.live.runs import FollowedRuns
from resdiag.live.server import serve

ROOT = Path(__file__).parents[2]


def train(steps=3, rate=0.01):
    """A monitor of a small network that has trained."""
    torch.manual_seed(0)
    model = resdiag.build_model("elu_pre", 20, seed=0, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    monitor = resdiag.attach(model, optimizer)
    advance(monitor, model, optimizer, steps)
    return monitor, model, optimizer


def advance(monitor, model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        monitor.step(loss)


@pytest.fixture
def folder(tmp_path):
    monitor, *_ = train()
    resdiag.save(monitor, tmp_path / "runs" / "<b>one</b>")
    return tmp_path / "runs"


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, *, token=None, host=None, **query):
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    query["token"] = server.token if token is None else token
    headers = {} if host is None else {"Host": host}
    connection.request("GET", f"{path}?{urlencode(query)}", headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize("path", ["/", "/events", "/plot", "/elsewhere"])
def test_without_the_token_or_under_another_name_nothing_is_told(server, path):
    for wrong in ({"token": ""}, {"token": server.token[:-1]}, {"host": "evil.example:80"}):
        status, _, body = ask(server, path, **wrong)
        assert (status, body) == (403, b"the address needs its token\n")


def test_the_page_loads_nothing_from_elsewhere(server):
    status, headers, body = ask(server, "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not re.findall(rb"(?:src|href)=.(?:https?:)?//", body)


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_plot_is_svg_and_a_plot_that_cannot_be_drawn_is_words(server):
    status, headers, body = ask(server, "/plot", run="<b>one</b>", kind="gradnorms")
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
    assert b"<svg" in body
    status, _, body = ask(server, "/plot", run="<b>one</b>", kind="nonsense")
    assert status == 422
    assert b"nonsense" in body
    assert ask(server, "/plot", run="no", kind="gradnorms")[0] == 404


def test_the_state_is_strict_json_and_grows_with_a_commit(server, folder):
    monitor, model, optimizer = train()
    resdiag.save(monitor, folder / "two")
    version, state = server.state()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert [run["name"] for run in state["runs"]] == ["two", "<b>one</b>"]
    assert state["runs"][0]["step"] == 2
    assert server.state()[0] == version
    advance(monitor, model, optimizer, 2)
    resdiag.save(monitor, folder / "two")
    later, state = server.state()
    assert later > version
    assert state["runs"][0]["step"] == 4
    assert len(state["runs"][0]["losses"]) == 5


def test_a_run_that_exploded_has_infinities_and_no_nan(tmp_path):
    monitor, *_ = train(8, rate=100.0)
    resdiag.save(monitor, tmp_path / "run")
    (seen,) = FollowedRuns(tmp_path).look()
    assert "inf" in seen.snapshot.to_dict()["gradients"]
    assert None not in seen.snapshot.to_dict()["gradients"]
    assert "not finite" in seen.snapshot.worst


def test_a_damaged_run_hides_no_other(folder):
    shutil.copytree(folder / "<b>one</b>", folder / "bad")
    (folder / "bad" / "COMMIT.json").write_text("{")
    assert [one.name for one in FollowedRuns(folder).look()] == ["<b>one</b>"]


LOOP = """
import sys, torch, resdiag
model = resdiag.build_model("elu_pre", 8, seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with resdiag.attach(model, optimizer, live="http") as monitor:
    for step in range(10**6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8))
        loss.backward()
        optimizer.step()
        monitor.step(loss)
"""


def test_a_training_that_is_killed_leaves_neither_server_nor_folder(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOOP]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) as process:
        line = process.stderr.readline()
        port, token = re.search(r"127\.0\.0\.1:(\d+)/\?token=(\S+)", line).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
        connection.request("GET", f"/?token={token}")
        assert connection.getresponse().status == 200
        assert [*tmp_path.glob("resdiag-live-*")]
        process.kill()
    _wait_for(lambda: not [*tmp_path.glob("resdiag-live-*")])
    _wait_for(lambda: not _answers(int(port)))


def _answers(port):
    try:
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()
    except OSError:
        return False
    return True


def _wait_for(condition):
    while not condition():  # pytest's timeout ends what never comes
        time.sleep(0.1)


LOOKS = {
    "wide": {"width": 1280},
    "narrow": {"width": 400},
    "dark": {"width": 1280, "scheme": "dark"},
}


@pytest.fixture
def two(folder):
    """A second run, newer than the first, that a test can let grow."""
    monitor, model, optimizer = train()
    resdiag.save(monitor, folder / "two")

    def grow(steps):
        advance(monitor, model, optimizer, steps)
        resdiag.save(monitor, folder / "two")

    return grow


@pytest.fixture
def page(driver, server, two):
    """The browser on the live page, its first plot drawn."""
    driver.get_log("browser")
    show(driver, width=1280)
    driver.get(server.url)
    _wait_for(lambda: driver.find_element("id", "plot").is_displayed())
    yield driver
    driver.get("about:blank")  # the page would go on asking a server that is away
    show(driver)


def shown(driver, name):
    return driver.find_element("id", name).text


@needs_browser
def test_in_a_browser_numbers_and_plots_grow_without_an_error(page, two, pictures, axe):
    _wait_for(lambda: "step\n2" in shown(page, "numbers"))
    before = page.find_element("id", "plot").get_attribute("alt")
    first = take_picture(page, pictures / "before.png")
    two(3)
    _wait_for(lambda: "step\n5" in shown(page, "numbers"))
    _wait_for(lambda: page.find_element("id", "plot").get_attribute("alt") != before)
    second = take_picture(page, pictures / "after.png")
    height = min(len(first), len(second))
    assert (first[:height] != second[:height]).any(axis=-1).mean() > 1e-3  # it is seen to grow
    select = page.find_element("id", "run")
    assert [o.text for o in select.find_elements("tag name", "option")] == ["two", "<b>one</b>"]
    page.execute_script(
        "document.getElementById('run').value = '<b>one</b>'; "
        "document.getElementById('run').dispatchEvent(new Event('change'))"
    )
    _wait_for(lambda: "step\n2" in shown(page, "numbers"))
    assert violations(page, axe) == []
    assert "verdict\nundetermined" in shown(page, "numbers")  # not "so far": the run has ended
    assert page.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("look", LOOKS)
def test_the_live_page_fits_its_screen_in_light_and_dark(page, pictures, axe, look):
    show(page, **LOOKS[look])
    picture = take_picture(page, pictures / f"{look}.png")
    assert picture.shape[1] == LOOKS[look]["width"]
    assert run(page, "document.documentElement.scrollWidth") == LOOKS[look]["width"]
    assert 0.02 < ink_share(picture) < 0.6
    if look == "dark":
        assert paper_of(picture).max() < 40
        assert (picture.min(axis=-1) > 230).mean() < 0.01  # the plot is not left white
    else:
        assert paper_of(picture).min() == 255
    assert violations(page, axe) == []
