"""`resdiag watch`: runs on disk as panels, lines or JSON."""

import json

import pytest
import torch

import resdiag
from resdiag.cli.main import app


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("slow", 0.01), ("fast", 100.0)):
        torch.manual_seed(0)
        model = resdiag.build_model("elu_pre", 8, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        with resdiag.attach(model, optimizer) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                monitor.step(loss)
        resdiag.save(monitor, folder / name)
    return folder


def test_json_has_every_run_the_newest_first(runs, capsys):
    assert app.run(["watch", str(runs), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["step"], run["status"]) for run in shown] == [
        ("fast", 3, "diverged"),
        ("slow", 3, "done"),
    ]


def test_once_prints_a_panel_for_each(runs, capsys):
    assert app.run(["watch", str(runs), "--once"]) == 0
    text = capsys.readouterr().out
    assert text.count("╭") == 2
    assert "! lr_too_high" in text


def test_it_ends_when_every_run_has_ended_and_a_pipe_gets_lines(runs, capsys):
    assert app.run(["watch", str(runs)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("fast: lr_too_high") for line in lines)
    assert any(line.startswith("slow: done  step 3") for line in lines)


def test_one_run_is_named_by_its_folder(runs, capsys):
    assert app.run(["watch", str(runs / "slow"), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["slow"]


def test_a_folder_that_is_not_there_is_one_line(runs, capsys):
    for options in ([], ["--http"], ["--json"]):
        assert app.run(["watch", str(runs / "nowhere"), *options]) == 2
        captured = capsys.readouterr()
        assert "no folder" in captured.out + captured.err
