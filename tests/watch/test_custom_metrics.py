"""Custom metrics: recorded as their function says, kept in runs, drawn; what they may not do."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, at, close, data, sgd
from tiny_training import train
from typer.testing import CliRunner

import resdiag
from resdiag.catalog.custom import custom_metrics, known_metrics, metric, scope, unregister_metric
from resdiag.catalog.table import METRICS, RECORDED
from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.plots.drawing import draw
from resdiag.plots.kinds import find_kind
from resdiag.runs.folder import load_frame
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach


@pytest.fixture(autouse=True)
def _scoped():
    with scope():
        yield


def register(function, site="output", **options):
    return metric(site=site, id=options.pop("id", "mine"), **options)(function)


def once(model, **options):
    x, y = data(seed=0)
    with attach(model, **options) as monitor:
        F.cross_entropy(model(x), y).backward()
        monitor.step()
    return monitor


def twin_pass():
    """Inputs, branches and sums of the blocks of a fresh network, with gradients."""
    model, (x, y) = Net(), data(seed=0)
    sums, inputs, branches = [], [], []
    h = model.stem(x)
    for block in model.blocks:
        h.retain_grad()
        inputs.append(h)
        branches.append(F.elu(block.layer(h)))
        h = h + branches[-1]
        h.retain_grad()
        sums.append(h)
    F.cross_entropy(model.head(h), y).backward()
    return {
        "input": inputs, "branch": branches, "shortcut": inputs, "sum": sums, "output": sums,
        "grad_input": [t.grad for t in inputs], "grad_sum": [t.grad for t in sums],
        "grad_output": [t.grad for t in sums],
    }  # fmt: skip


@pytest.mark.parametrize("site", list(twin_pass()))
def test_a_metric_gets_the_tensor_of_its_site(site):
    register(lambda x: (x**3).sum(), site=site)
    expected = [float((t.detach().double() ** 3).sum()) for t in twin_pass()[site]]
    assert at(once(Net()), "mine") == close(expected)


def test_metrics_are_recorded_once_a_block_and_step_by_the_schedule():
    calls = []
    register(lambda x: (calls.append(len(x)), x.mean())[1])
    model = Net()
    with attach(model, every=2) as monitor:
        for step in range(5):
            model(data(seed=step)[0]).mean().backward()
            monitor.step()
    assert calls == [5] * 6
    frame = monitor.to_frame()
    assert frame.mine.to_list() == close(frame.output_mean.to_list())


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_a_metric_of_a_gradient_gets_it_without_the_loss_scale(scale):
    register(lambda g: g.abs().amax(), site="grad_output")
    model, (x, y) = Net(), data(seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with attach(model, scaler=scaler) as monitor:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        monitor.step()
    assert at(monitor, "mine") == close([float(g.abs().max()) for g in twin_pass()["grad_output"]])


def test_the_core_set_has_custom_metrics_where_it_looks_and_a_reason_elsewhere():
    register(lambda x: x.mean(), id="seen")
    register(lambda g: g.norm(), site="grad_sum", id="unseen")
    model = Net()
    with attach(model, metrics="core") as monitor:
        for step in range(2):
            model(data(seed=step)[0]).mean().backward()
            monitor.step()
    assert monitor.to_frame().seen.notna().all()
    assert monitor.to_frame().unseen.isna().all()
    assert "core" in next(e["reason"] for e in monitor.unavailable if e["metric"] == "unseen")
    assert not monitor.warnings


def test_training_with_custom_metrics_ends_in_the_same_bits():
    register(lambda x: x.std(), id="one")
    register(lambda g: g.norm(), site="grad_input", id="two")
    ends = []
    for watched in (False, True):
        model = Net()
        optimizer = sgd(model)
        monitor = attach(model, optimizer=optimizer) if watched else None
        for step in range(4):
            x, y = data(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if monitor:
                monitor.step()
        if monitor:
            monitor.close()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))
    assert monitor.to_frame()[["one", "two"]].notna().all(axis=None)


def test_the_decorated_function_stays_what_it_was():
    @resdiag.metric(site="sum", label="share of zeros", unit="1", source="a paper")
    def zero_share(x):
        """share of u = 0"""
        return (x == 0).double().mean()

    entry = custom_metrics()["zero_share"].entry
    assert float(zero_share(torch.zeros(3))) == 1.0
    assert (entry.label, entry.formula, entry.source) == (
        "share of zeros",
        "share of u = 0",
        "a paper",
    )
    assert known_metrics()["zero_share"] is entry
    assert "zero_share" not in METRICS
    assert at(once(Net()), "zero_share") == [0, 0]
    resdiag.unregister_metric("zero_share")
    assert "zero_share" not in once(Net()).to_frame()


# -- refusals --------------------------------------------------------------------------------------


def test_what_could_not_be_recorded_is_refused_when_it_is_registered():
    with pytest.raises(ValueError, match="unknown site 'outptu'; did you mean 'output'"):
        register(torch.mean, site="outptu")
    with pytest.raises(ValueError, match="'grad_output' is a column of resdiag"):
        register(torch.mean, id="grad_output")
    with pytest.raises(ValueError, match="'step' is a column of resdiag"):
        register(torch.mean, id="step")
    with pytest.raises(ValueError, match="'Mean of x' is not a valid column name"):
        register(torch.mean, id="Mean of x")
    with pytest.raises(TypeError, match="must be a function, not int"):
        register(3)
    with pytest.raises(TypeError, match="must take one tensor: missing a required argument: 'y'"):
        register(lambda x, y: x)
    register(lambda x: x.mean())
    with pytest.raises(
        ValueError, match=r"'mine' is there already: unregister_metric\('mine'\) first"
    ):
        register(lambda x: x.std())
    with pytest.raises(ValueError, match="unknown custom metric 'mien'; did you mean 'mine'"):
        unregister_metric("mien")


def _raises(x):
    raise ZeroDivisionError("planted")


STOPPED = {
    "an_exception": (_raises, "ZeroDivisionError: planted"),
    "a_number": (lambda x: x.sum().item(), "TypeError: it must return a 0-d tensor, not float"),
    "a_vector": (lambda x: x[0], r"ValueError: .* not one of shape \(6,\)"),
    "complex": (lambda x: x.sum() * 1j, "ValueError: it must return a real number"),
    "in_place": (lambda x: x.mul_(2).sum(), "ValueError: it changes its argument"),
    "random": (lambda x: torch.rand(()) + x.sum(), "ValueError: it draws random numbers"),
}


@pytest.mark.parametrize("what", STOPPED)
@pytest.mark.parametrize("site", ["branch", "grad_sum"])
def test_a_metric_that_does_not_behave_is_stopped_and_the_training_is_not(what, site):
    function, reason = STOPPED[what]
    register(function, site=site, id="bad")
    register(lambda x: x.mean(), id="good")
    state, model, (x, y) = torch.get_rng_state(), Net(), data(seed=0)
    with attach(model) as monitor:
        before = torch.get_rng_state()
        F.cross_entropy(model(x), y).backward()
        with pytest.warns(WatchWarning, match=f"custom metric 'bad' stopped: {reason}"):
            monitor.step()
        assert torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(state)
    twin = Net()
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    frame = monitor.to_frame()
    assert frame.bad.isna().all()
    assert frame[["good", "grad_output"]].notna().all(axis=None)
    assert "stopped" in next(e["reason"] for e in monitor.unavailable if e["metric"] == "bad")


def test_an_exception_in_a_later_step_keeps_the_earlier_ones():
    register(lambda x: x.mean() if x.abs().amax() < 1000 else _raises(x))
    model = Net()
    with attach(model) as monitor:
        for step, factor in enumerate((1.0, 1e6)):
            model(factor * torch.ones(2, 3)).mean().backward()
            with pytest.warns(WatchWarning, match="stopped") if step else _nothing():
                monitor.step()
    frame = monitor.to_frame()
    assert frame.mine.isna().to_list() == [False, False, True, True]


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


# -- runs, tables and plots ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs with a custom metric that is not registered any more."""
    root = tmp_path_factory.mktemp("custom")
    with scope():
        metric(site="output", label="kurtosis of the output", source="textbook")(kurtosis)
        for seed in (0, 1):
            train(root, seed=seed)
    assert "kurtosis" not in known_metrics()
    return root


def kurtosis(x):
    """E[(H - mean)^4] / Var[H]^2"""
    centred = x - x.mean()
    return centred.pow(4).mean() / centred.square().mean().square()


def test_a_run_keeps_a_custom_metric_and_who_reads_it_needs_no_registration(runs):
    frame = load_frame(runs)
    assert frame["kurtosis"].between(1, 1000).all()  # at least 1 by Jensen
    assert set(RECORDED) < set(frame.columns)
    run = resdiag.load_run(sorted(p for p in runs.iterdir() if p.is_dir())[0])
    (entry,) = run.custom_metrics
    assert (entry["id"], entry["label"], entry["site"]) == (
        "kurtosis", "kurtosis of the output", "output",
    )  # fmt: skip
    assert "kurtosis" in run.metrics()


def test_runs_with_and_without_a_custom_metric_are_read_together(runs, tmp_path):
    plain = train(tmp_path, seed=7)[2]
    assert "kurtosis" not in plain.metrics()
    assert plain.custom_metrics == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_custom_metric_is_drawn_by_its_name(runs, count, tmp_path):
    opened = [resdiag.load_run(p) for p in sorted(runs.iterdir()) if p.is_dir()][:count]
    figure = draw("kurtosis", opened)
    assert figure.get_label().startswith("Kurtosis of the output: from ")
    values = opened[0].metrics().query("step == 0")["kurtosis"].to_list()
    lines = [line for part in figure.subfigs for a in part.axes for line in a.get_lines()]
    if count == 1:
        assert any(list(line.get_ydata()) == pytest.approx(values) for line in lines)
    paths = [str(run.path) for run in opened]
    done = CliRunner().invoke(
        app, ["plot", "kurtosis", *paths, "--json", "-f", "png", "-o", str(tmp_path / "k")]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kind"] == "kurtosis"
    assert (tmp_path / "k.png").stat().st_size > 10_000


def test_any_built_in_metric_per_block_is_drawn_too(runs):
    opened = [resdiag.load_run(p) for p in sorted(runs.iterdir()) if p.is_dir()][:1]
    for name in ("output_mean", "grad_growth", "negative_fraction"):
        label = METRICS[name].label
        assert draw(name, opened).get_label().startswith(f"{label[:1].upper()}{label[1:]}: from ")
    with pytest.raises(UsageError, match="dead_fraction is exactly 0 in every block"):
        draw("dead_fraction", opened)


def test_a_plot_that_is_not_there_names_the_nearest_kind_or_metric(runs, tmp_path):
    with pytest.raises(UsageError, match="unknown plot 'kurtosi'; did you mean 'kurtosis'"):
        find_kind("kurtosi", [{"id": "kurtosis", "label": "k"}])
    for root in (runs, tmp_path):
        done = CliRunner().invoke(app, ["plot", "gradnorm", "--runs", str(root)])
        assert isinstance(done.exception, UsageError)
        assert "did you mean 'gradnorms'" in done.exception.message


def test_registered_metrics_are_in_the_table():
    register(lambda x: x.mean(), label="a mean", reading="just a mean")
    rows = json.loads(CliRunner().invoke(app, ["metrics", "mine", "--json"]).stdout)
    assert [(row["name"], row["site"], row["reading"]) for row in rows] == [
        ("mine", "output", "just a mean")
    ]


@pytest.mark.parametrize("name", ["custom-metrics", "loops"])
def test_the_pages_about_loops_and_custom_metrics_print_what_they_show(name, capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "howto" / f"{name}.md").read_text(
        "utf-8"
    )
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(body for kind, body in fences if kind == "python"), name, "exec"), {})
    shown = "".join(body for kind, body in fences if kind == "text")
    assert capsys.readouterr().out.split() == shown.split()


def test_every_test_that_the_page_about_loops_names_is_there():
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "howto" / "loops.md").read_text("utf-8")
    tests = "".join(file.read_text("utf-8") for file in root.glob("tests/watch/test_*.py"))
    named = re.findall(r"`(test_\w+?)_?\.\.\.`", page)
    assert len(named) > 15
    for name in named:
        assert f"def {name}" in tests, name


def test_custom_metrics_of_a_network_without_additions_are_those_of_its_units():
    register(lambda x: x.abs().mean())
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 4), torch.nn.Tanh(),
        torch.nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.randn(8, 4)
    with attach(model) as monitor:
        for _ in range(2):
            model(x).sum().backward()
            monitor.step()
    expected = [float(model[:n](x).abs().mean().detach()) for n in (2, 4)]
    assert monitor.to_frame().mine.to_list() == close(expected * 2)
