"""`resdiag watch` in a real terminal, tmux, whose screen is kept as text, colours included."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import resdiag

ROOT = Path(__file__).parents[2]
HEIGHT = 30
pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux: apt-get install tmux")
UNSET = ("TMUX", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
CODES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: one that explodes, and one that goes on."""
    root = tmp_path_factory.mktemp("watched")
    for name, rate in (("healthy", 0.01), ("exploded", 100.0)):
        torch.manual_seed(0)
        model = resdiag.build_model("elu_pre", 20, seed=0, width=0.25)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        monitor = resdiag.attach(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.step(loss)
        resdiag.save(monitor, root / name)
    return root


@pytest.fixture
def tmux(tmp_path):
    """A function that talks to a tmux of this test's own."""
    socket = str(tmp_path / "tmux")
    env = {key: value for key, value in os.environ.items() if key not in UNSET}
    env |= {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}

    def call(*words):
        done = subprocess.run(
            ["tmux", "-S", socket, "-f", "/dev/null", *words],
            capture_output=True, text=True, check=True, env=env, cwd=ROOT,
        )  # fmt: skip
        return done.stdout

    yield call
    call("kill-server")


def screen_of(tmux, folder, width):
    """What `resdiag watch` shows, once both runs are there."""
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "resdiag", "watch", str(folder)]
    size = ("-x", str(width), "-y", str(HEIGHT))
    tmux("new-session", "-d", *size, *command, ";", "set", "remain-on-exit", "on")
    while True:  # pytest's timeout ends what never comes
        screen = tmux("capture-pane", "-e", "-p")
        if screen.count("╰") >= 2:
            return screen
        assert "Traceback" not in screen
        time.sleep(0.2)


@pytest.mark.parametrize("width", [80, 120])
def test_watch_fills_a_terminal_with_panels_whose_borders_stand(tmux, folder, pictures, width):
    screen = screen_of(tmux, folder, width)
    (pictures / f"watch-{width}.txt").write_text(screen, "utf-8")
    lines = CODES.sub("", screen).rstrip().split("\n")
    assert len(lines) <= HEIGHT
    panels = [line.rstrip() for line in lines if line[:1] in ("╭", "│", "╰")]
    assert {len(line) for line in panels} == {width}
    assert {(line[0], line[-1]) for line in panels} == {("╭", "╮"), ("│", "│"), ("╰", "╯")}
    text = "\n".join(panels)
    assert sorted(re.findall(r"resdiag  (\w+)  ResNet", text)) == ["exploded", "healthy"]
    assert text.count("step 3 ") == 2
    assert re.search(r"step 3   loss \S+ at step 1 ", text)  # no later one was finite
    assert "not finite" in text
    assert "verdict: undetermined" in text  # not "so far": the run has ended
    assert re.search(r"loss [▁-█×]+", text)
    faults = [line for line in screen.split("\n") if "! " in line]
    assert faults
    assert all(re.search(r"\x1b\[[0-9;]*31m", line) for line in faults)  # in red
