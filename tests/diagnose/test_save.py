"""Any model's training as a run: in memory, as a folder, drawn, judged; no theory where none is."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resdiag
from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.plots.kinds import KINDS
from resdiag.runs.watched import as_run
from resdiag.runs.watched_config import WatchedConfig, read_config


class Unit(nn.Module):
    def __init__(self, width, gain):
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.inner.weight, gain)

    def forward(self, x):
        return x + self.inner(x)


def make_net(blocks=10, width=64, gain=0.1):
    torch.manual_seed(0)
    return nn.Sequential(*[Unit(width, gain) for _ in range(blocks)], nn.Linear(width, 5))


def train(net, steps=3, lr=0.01, optimizer=torch.optim.SGD):
    torch.manual_seed(1)
    x, y = torch.randn(32, 64), torch.randint(5, (32,))
    optimizer = optimizer(net.parameters(), lr=lr)
    losses = []
    with resdiag.attach(net, optimizer=optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            monitor.step()
            losses.append(loss.item())
    return monitor, losses


@pytest.fixture
def saved(tmp_path):
    monitor, losses = train(make_net())
    curve = {"loss": losses}
    return (
        monitor,
        losses,
        resdiag.save(
            monitor, tmp_path / "mine", model="my net", data="noise", classes=5, curve=curve
        ),
    )


def test_what_was_recorded_comes_back_from_the_folder_number_for_number(saved):
    monitor, losses, folder = saved
    run = resdiag.load_run(folder)
    recorded, read = monitor.to_frame().drop(columns="point"), run.metrics()
    for name in recorded:
        expected = recorded[name].to_numpy(float)
        np.testing.assert_allclose(read[name].to_numpy(float), expected, rtol=1e-6)
    assert run.curve()["loss"].tolist() == losses
    assert run.curve()["lr"].to_numpy() == pytest.approx(0.01)
    assert (run.label, run.status, run.steps) == ("my net", "done", 3)
    assert run.data == {"name": "noise", "classes": 5}
    assert run.config.optimizer == "SGD"
    assert run.config.lr == pytest.approx(0.01)
    assert [block["name"] for block in run.blocks] == [str(i) for i in range(10)]
    assert run.environment["torch"] == torch.__version__
    assert not list(folder.glob("ckpt*"))


def test_the_tidy_frame_of_a_foreign_run_stands_beside_ours(saved):
    _, _, folder = saved
    frame = resdiag.load_frame(folder.parent)
    assert set(frame["variant"]) == {"my net"}
    assert set(frame["depth"]) == {10}
    assert len(frame) == 3 * 10


def test_a_folder_is_replaced_by_its_own_monitor_only(saved, tmp_path):
    monitor, losses, folder = saved
    again = resdiag.save(monitor, folder, model="my net", curve={"loss": losses[:2]})
    assert resdiag.load_run(again).curve()["loss"].count() == 2
    other, _ = train(make_net())
    with pytest.raises(UsageError, match="holds a run already"):
        resdiag.save(other, folder)
    resdiag.save(other, folder, overwrite=True)
    assert resdiag.load_run(folder).label == "Sequential"


def test_a_monitor_is_judged_and_drawn_without_a_folder(saved):
    monitor, _, folder = saved
    verdict = resdiag.judge(monitor)
    assert not verdict.findings
    assert resdiag.judge(resdiag.load_run(folder)).name == verdict.name == "undetermined"
    figure = resdiag.draw("gradnorms", monitor)
    assert figure.get_label().endswith("Sequential")


@pytest.mark.filterwarnings("ignore::resdiag.watch.base.safety.WatchWarning")
def test_a_monitor_that_has_seen_nothing_is_undetermined():
    net = make_net()
    with resdiag.attach(net) as monitor:
        verdict = resdiag.judge(monitor)
        assert verdict.name == "undetermined"
        assert "no steps were recorded" in verdict.why
        assert "the loss is not known" in verdict.why
        assert verdict.checks[0] == 0
    net.eval()
    with resdiag.attach(net) as monitor:
        for _ in range(25):
            loss = F.cross_entropy(net(torch.ones(4, 64)), torch.zeros(4, dtype=torch.long))
            loss.backward()
            monitor.step(loss)
    verdict = resdiag.judge(monitor)
    assert verdict.name == "undetermined"
    assert "in eval mode" in verdict.why


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_plot_draws_a_foreign_run_without_theory(saved, kind):
    _, _, folder = saved
    if kind == "depth":
        with pytest.raises(UsageError, match="no error was evaluated"):
            resdiag.draw(kind, folder)
        return
    figure = resdiag.draw(kind, resdiag.load_run(folder))
    words = {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}
    assert not any("theory" in word for word in words)


def test_commands_read_the_folder(saved, capsys):
    _, _, folder = saved
    assert app.run(["explain", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["name"] == "undetermined"
    assert app.run(["plot", "signal", str(folder), "--format", "svg", "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert "my net" in Path(file).read_text("utf-8")


def test_geometric_growth_is_found_in_any_model_and_additive_growth_is_not():
    # E[H^2] x2 per block with an orthogonal branch as large as its shortcut: E|x + Wx|^2 = 2 E|x|^2
    exploding, _ = train(make_net(gain=1.0), steps=1)
    verdict = resdiag.judge(exploding)
    assert verdict.name == "grows_at_init"
    assert verdict.evidence[0].value == pytest.approx(2, rel=0.15)
    assert not any("resdiag run" in line for line in verdict.next)

    class Normed(Unit):
        def forward(self, x):  # a branch of unit size: E[H^2] = 1, 2, 3, ...
            return x + self.inner(F.layer_norm(x, x.shape[-1:]))

    torch.manual_seed(0)
    additive = nn.Sequential(*[Normed(64, 1.0) for _ in range(8)], nn.Linear(64, 5))
    assert not resdiag.judge(train(additive, steps=1)[0]).findings


def test_a_loss_that_nobody_told_is_no_explosion_and_a_lost_one_is():
    monitor, losses = train(make_net())
    assert not resdiag.judge(monitor).findings
    partly = as_run(monitor, curve={"step": [0, 2], "loss": [losses[0], losses[2]]})
    assert not resdiag.judge(partly).findings
    lost = as_run(monitor, curve={"loss": [losses[0], losses[1], math.nan]})
    assert lost.status == "diverged"
    verdict = resdiag.judge(lost)
    assert (verdict.name, verdict.step) == ("loss_fault", 2)
    assert "exploded" in {finding.name for finding in verdict.findings}


def test_a_learning_rate_is_not_judged_by_a_rule_of_other_networks():
    monitor, _ = train(make_net(), steps=1, lr=100.0, optimizer=torch.optim.AdamW)
    verdict = resdiag.judge(monitor)
    assert "at_risk" not in [finding.name for finding in verdict.findings]
    assert any(line.startswith("at_risk: observed on CIFAR") for line in verdict.not_judged)


def test_a_model_that_is_called_like_a_variant_gets_no_theory_of_it():
    monitor, _ = train(make_net(), steps=1)
    run = as_run(monitor, model="plain")
    assert (run.config.model, run.config.variant, run.label) == ("plain", "", "plain")
    resdiag.draw("signal", run)


def test_configs_of_both_kinds_are_read_back_and_mistakes_are_named():
    config = WatchedConfig(model="a/b c", kind="probe", lr=0.5, settings={"x": "1"})
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config
    assert config.name.startswith("probe-a-b-c-s0-")
    for wrong, words in (
        ({"model": "m", "sed": 1}, "unknown config key 'sed'; did you mean 'seed'"),
        ({"model": "m", "seed": "1"}, "config key 'seed' cannot be '1'"),
        ({"model": ""}, "needs the name of its model"),
    ):
        with pytest.raises(UsageError, match=words):
            read_config(wrong)


def test_a_curve_that_does_not_fit_is_refused():
    monitor, _ = train(make_net(), steps=1)
    with pytest.raises(UsageError, match="unknown column of the curve 'los'; did you mean 'loss'"):
        resdiag.save(monitor, "unused", curve={"los": [1.0]})
    with pytest.raises(UsageError, match="curve: "):
        resdiag.save(monitor, "unused", curve={"loss": [1.0], "error": [1.0, 2.0]})
