"""The panel of a training: what stands in it, at every width, on a terminal, a pipe, a notebook."""

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from resdiag.live.panel import LogLines, draw_panel, to_html
from resdiag.live.snapshot import Snapshot, thin

ROOT = Path(__file__).parents[2]

SNAPSHOT = Snapshot(
    label="ResNet-20 with a long name " + "x" * 60,
    status="running",
    step=119,
    steps=400,
    losses=tuple((step, 2.3 - 0.01 * step) for step in range(120)),
    gradients=(1.0, 10.0, 100.0, math.inf, math.nan) * 30,
    names=("stages.0.0",) * 150,
    worst="block 3: gradient x25 since step 0",
    verdict="dead_block",
    findings=("dead_block (step 40, block 3): " + "all units are 0 " * 20,) * 9,
)


def text_of(snapshot, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(draw_panel(snapshot, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_panel_fits_and_says_step_loss_and_findings(width):
    text = text_of(SNAPSHOT, width)
    assert max(map(len, text.splitlines())) <= width
    for words in ("step 119 of 400", "loss 1.11", "! dead_block (step 40", "and 3 more"):
        assert words in text
    assert "×" in text


def test_a_loss_that_falls_is_drawn_from_the_top_to_the_bottom():
    line = next(line for line in text_of(SNAPSHOT, 80).splitlines() if "loss █" in line)
    bars = re.search(r"loss ([▁-█]+)", line)[1]
    assert (bars[0], bars[-1]) == ("█", "▁")
    assert list(bars) == sorted(bars, reverse=True)


def test_before_the_first_record_it_says_so():
    empty = Snapshot(label="net", status="running", step=-1, steps=0, losses=(), gradients=(),
                     names=(), worst="")  # fmt: skip
    assert "no step recorded yet" in text_of(empty, 60)


def test_a_notebook_gets_html_without_what_a_model_calls_itself():
    html = to_html(SNAPSHOT)
    assert html.startswith("<pre")
    assert "&lt;" not in html
    assert "<script" not in to_html(
        Snapshot(**{**SNAPSHOT.__dict__, "findings": ("<script>alert(1)</script>",)})
    )


def test_a_pipe_gets_each_finding_once(capsys):
    lines = LogLines()
    for _ in range(3):
        lines.show(SNAPSHOT, None)
    assert capsys.readouterr().err.count("dead_block") == 1


def test_thinned_losses_keep_the_last():
    points = [(i, float(i)) for i in range(10_001)]
    kept = thin(points)
    assert len(kept) <= 400
    assert kept[-1] == points[-1]
    assert thin(points[:7]) == tuple(points[:7])


LOOP = """
import torch, resdiag
model = resdiag.build_model("elu_pre", 8, seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
with resdiag.attach(model, optimizer, live=True) as monitor:
    for step in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8))
        loss.backward()
        optimizer.step()
        monitor.step(loss)
        if step == 1:
            print("hello from the loop")
"""


def test_on_a_terminal_the_loop_prints_above_the_panel():
    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=follower, stderr=follower, cwd=ROOT, env=env
    ) as process:
        os.close(follower)
        said = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            said += part
    os.close(leader)
    assert process.returncode == 0
    text = said.decode()
    assert "hello from the loop" in text
    last = text.rpartition("╭")[2]
    assert "step 3" in last
    assert "lr_too_high" in last
    assert "hello" not in last


def test_in_a_pipe_there_are_plain_lines():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOP], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    assert done.stdout == "hello from the loop\n"
    assert "resdiag: lr_too_high" in done.stderr
    assert "done  step 3" in done.stderr
    assert "\x1b" not in done.stderr
