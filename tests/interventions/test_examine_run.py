"""`resdiag explain --ask`: a recorded run is built again and examined."""

import json

import pytest
import torch
from small_nets import Net, data, sgd
from tiny_training import run_tiny_cell, tiny_data, train

import resdiag
from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.interventions.examine_run import examine_run
from resdiag.interventions.starts import VariantStart, last_checkpoint


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A tiny run at a rate at which nothing moves."""
    return run_tiny_cell(tmp_path_factory.mktemp("runs"), steps=4, lr=1e-6, depth=8).run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = app.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_the_verdict_and_then_the_experiments(slow_run, call):
    code, out, _ = call("explain", slow_run.path, "--ask")
    assert code == 0
    assert out.startswith("Verdict")
    assert out.index("Verdict") < out.index("Examined") < out.index("Rates")
    assert "At your rate of 1e-06 the loss stays" in out
    assert "the learning rate is too low" in " ".join(out.split())
    assert "the run at step 4" in out


def test_the_json_has_experiments_and_conclusions(slow_run, call):
    code, out, _ = call("explain", slow_run.path, "--ask", "--json", "--from", "init")
    document = json.loads(out)
    assert code == 0
    assert {"verdict", "findings", "examination"} <= document.keys()
    found = document["examination"]
    names = [one["name"] for one in found["experiments"]]
    assert names == ["optimizer", "guessing", "inputs", "samples", "gradients", "one_batch",
                     "rates", "shuffled_labels"]  # fmt: skip
    assert "rate_too_low" in [one["name"] for one in found["conclusions"]]
    assert found["notes"][0].startswith("the run at its initialisation;")


def test_it_begins_at_the_last_checkpoint_with_the_runs_own_batch_and_momenta(tmp_path):
    _, _, run = train(tmp_path, steps=4, commit_every=2)
    found = examine_run(run, tiny_data(), steps=2)
    arm = VariantStart(run.config, tiny_data(), last_checkpoint(run)).prepare()
    arm.model.train()
    with torch.no_grad():
        loss, _ = arm.loss(4)
    assert found["guessing"].numbers["loss"] == pytest.approx(float(loss.value), rel=1e-5)
    first = found["one_batch"].numbers["trainings"][0]
    assert first["lr"] == run.config.lr
    arm.optimizer.zero_grad()
    loss, _ = arm.loss(4)
    torch.autograd.backward(loss.value)
    arm.optimizer.step()
    images = found["one_batch"].numbers["trainings"][0]["losses"][1]
    assert images == pytest.approx(float(arm.loss(4)[0].value.detach()), rel=1e-4)


def test_a_run_that_is_not_finite_is_examined_at_its_initialisation(tmp_path):
    _, status, run = train(tmp_path, steps=8, variant="elu_pre", lr=1e12)
    assert status == "diverged"
    found = examine_run(run, tiny_data(), steps=4)
    assert "is not finite" in found.notes[0]
    with pytest.raises(UsageError, match="not finite"):
        examine_run(run, tiny_data(), start="checkpoint")


def test_a_run_of_another_model_names_the_call_in_python(tmp_path, call):
    model = Net()
    optimizer = sgd(model)
    x, y = data()
    with resdiag.attach(model, optimizer=optimizer) as monitor:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.step()
    folder = resdiag.save(monitor, tmp_path / "run", model="Net")
    code, out, err = call("explain", folder, "--ask")
    assert code == 2
    assert "a run of Net, which its record does not build again" in err
    assert "resdiag.examine(model, batch, optimizer=optimizer)" in err
    assert out == ""


def test_several_runs_and_an_unknown_start_are_refused(slow_run, call):
    code, _, err = call("explain", slow_run.path, "--ask", "--from", "checkpont")
    assert code == 2
    assert "unknown start 'checkpont'; did you mean 'checkpoint'? known: init, checkpoint" in err
