"""What the first objects of a session show when they are printed or displayed in a notebook."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import resdiag
from resdiag.diagnose.text import render
from resdiag.summary import Summary, by_reason
from resdiag.watch.loop.attach import WatchWarning


@pytest.fixture(scope="module")
def monitor():
    model = resdiag.build_model("original", 8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with resdiag.attach(model, optimizer) as monitor:
        loss = model(torch.randn(4, 3, 32, 32)).square().mean()
        loss.backward()
        optimizer.step()
        monitor.step(loss)
    return monitor


def test_a_printed_monitor_has_each_block_with_the_numbers_of_its_last_step(monitor):
    text = str(monitor)
    frame = monitor.to_frame()
    assert text.startswith("ResNet: 3 blocks, 1 step, 1 recorded, SGD, closed; numbers of step 0")
    for block, (_, row) in zip(monitor.blocks, frame.iterrows(), strict=True):
        line = next(line for line in text.splitlines() if f" {block.name} " in line)
        shown = [float(word) for word in line.split()[-5:]]
        names = "grad_output", "output_second_moment", "branch_ratio", "output_bias", "update_ratio"
        assert shown == pytest.approx([row[name] for name in names], rel=5e-3)


def test_a_run_says_the_same_as_its_monitor(monitor, tmp_path):
    run = resdiag.load_run(resdiag.save(monitor, tmp_path / "mine"))
    table = str(monitor).splitlines()[1:5]
    assert str(run).splitlines()[1:5] == table
    assert str(resdiag.load_run(monitor)).splitlines()[1:5] == table
    assert resdiag.load_run(run) is run
    assert "done after 1 step, 3 blocks, verdict undetermined" in repr(run)
    assert repr(run).count("\n") == 0


def test_judge_takes_a_path_a_run_or_a_monitor(monitor, tmp_path):
    path = resdiag.save(monitor, tmp_path / "mine")
    expected = resdiag.judge(monitor)
    assert resdiag.judge(path).name == resdiag.judge(str(path)).name == expected.name
    assert resdiag.judge(resdiag.load_run(path)).summary == expected.summary


def test_a_list_of_blocks_is_a_list_and_shows_a_table(monitor):
    blocks = monitor.blocks
    assert isinstance(blocks, list)
    assert repr(blocks).splitlines()[0] == "3 blocks"
    assert len(repr(blocks).splitlines()) == 2 + len(blocks)
    where = "relu after the addition, stage 1, shape 32x16x16"
    assert repr(blocks[1]) == f"<Block 1 'stages.1.0': identity shortcut, {where}>"


def test_what_is_unavailable_is_said_once_per_reason():
    model = resdiag.build_model("original", 8, seed=0)
    with resdiag.attach(model) as monitor:
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        monitor.step()
    lines = repr(monitor.unavailable).splitlines()
    assert len(lines) == len({entry["reason"] for entry in monitor.unavailable})
    assert any("head_kick, lr, momentum, weight_decay (no optimizer was seen" in i for i in lines)


def test_html_escapes_what_a_model_calls_its_modules():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)

    text = Summary("<script>", ("<b>",), [("<img src=x>",)], ["<i>"])._repr_html_()
    tags = Tags()
    tags.feed(text)
    assert tags.seen <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;script&gt;" in text
    assert "&lt;img src=x&gt;" in text


def test_a_long_table_keeps_both_ends_and_counts_the_rest():
    rows = [(str(i), f"block {i}") for i in range(100)]
    lines = str(Summary("many", ("block", "name"), rows)).splitlines()
    assert len(lines) == 2 + 16 + 1 + 16
    assert "... 68 more" in lines[18]
    assert lines[-1].split() == ["99", "block", "99"]


def test_reasons_name_runs_of_blocks():
    entry = {"metric": "skip_gain", "blocks": [0, 1, 2, 5], "reason": "gated"}
    assert by_reason([entry]) == ["not recorded: skip_gain of blocks 0-2, 5 (gated)"]


def test_attach_takes_the_optimizer_second_and_names_what_is_no_model():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with resdiag.attach(model, optimizer) as monitor:
        assert monitor.metadata["optimizer"] == "SGD"
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not the string 'resnet'$"):
        resdiag.attach("resnet")
    with pytest.raises(TypeError, match="not an optimizer: Linear"):
        resdiag.attach(model, model)


def test_a_warning_points_at_the_line_of_the_loop():
    model = nn.Linear(2, 2)
    with resdiag.attach(model) as monitor, pytest.warns(WatchWarning) as caught:
        monitor.step()  # no forward pass: here
    (warning,) = caught
    assert warning.filename == __file__
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert "no forward pass: here" in lines[warning.lineno - 1]


def test_inspect_takes_a_module_its_inputs_or_a_name():
    model = resdiag.build_model("original", 8, seed=0).train()
    found = resdiag.inspect(model)
    assert [block.name for block in found.blocks] == ["stages.0.0", "stages.1.0", "stages.2.0"]
    assert model.training
    small = resdiag.inspect(model, example_inputs=torch.zeros(1, 3, 16, 16))
    assert small.blocks[0].shape == (16, 16, 16)
    named = str(resdiag.inspect("torchvision:resnet18"))
    assert re.match(r"torchvision:resnet18: 8 blocks, 11\.7 M", named)
    plain = resdiag.inspect(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    assert "modules without a residual addition" in str(plain)


def test_a_verdict_is_text_a_line_or_html_and_comes_back_from_its_file(monitor, tmp_path):
    verdict = resdiag.judge(monitor)
    assert str(verdict) == render(verdict)
    assert repr(verdict).startswith("<Verdict undetermined. ")
    assert "\n" not in repr(verdict)
    html = verdict._repr_html_()
    assert "undetermined" in html
    assert "<details>" in html
    again = resdiag.load_run(resdiag.save(monitor, tmp_path / "mine")).verdict
    assert again.to_dict() == resdiag.judge(tmp_path / "mine").to_dict()
    assert str(again) == str(resdiag.judge(tmp_path / "mine"))


def test_a_verdict_of_another_version_is_read_as_far_as_it_goes():
    old = resdiag.Verdict.from_dict({"name": "exploded", "evidence": [{"value": "inf"}], "x": 1})
    assert (old.name, old.evidence[0].value, old.checks) == ("exploded", float("inf"), (0, 0))
    assert old._repr_html_()
    assert str(old).startswith("Verdict   exploded")


def test_html_of_a_verdict_escapes_what_it_quotes():
    finding = resdiag.Verdict(name="<script>", summary="<b>", why="<i>", next=("<u>",))
    assert not re.search("<(script|b|i|u)>[^<]*$", finding._repr_html_())
    assert "&lt;script&gt;" in finding._repr_html_()
