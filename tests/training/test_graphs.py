"""The backend `graph`, rehearsed on the CPU, where a tape of operations stands for a CUDA graph."""

import numpy as np
import pytest
import torch
from captures import ASKED, Tape, TapeCapture
from tiny_training import tiny_config, tiny_data, train, weights

from resdiag.cli.main import app
from resdiag.runs.environment import environment
from resdiag.runs.folder import read_run
from resdiag.runs.store import RunWriter
from resdiag.training import loop
from resdiag.training.display import Silent
from resdiag.training.interrupt import Interrupt
from resdiag.training.loop import Training


class StopAt(Silent):
    """Asks for an end after so many steps."""

    def __init__(self, interrupt, step):
        self.interrupt, self.step = interrupt, step

    def show(self, standing):
        self.interrupt.signal = int(standing.done == self.step)


def rehearse(root, monkeypatch, data=None, stop=0, **changes):
    config, data = tiny_config(backend="graph", **changes), data or tiny_data()
    capture, interrupt = TapeCapture(monkeypatch), Interrupt()
    described = environment(config.device, config.dtype)
    with RunWriter.open(root, config, environment=described, data=data.identity) as writer:
        training = Training(config, data, writer, capture=capture)
        status = training.run(StopAt(interrupt, stop), interrupt)
    return training, status, read_run(writer.folder), capture


@pytest.mark.parametrize("variant", ["elu", "original", "elu_pre", "plain"])
def test_graphs_train_bit_for_bit_what_eager_does_and_record_it_to_rounding(
    tmp_path, monkeypatch, variant
):
    """96 images in batches of 36: the third is smaller and runs eagerly, recorded or not."""
    asked = {**ASKED, "variant": variant}
    eager, _, run = train(tmp_path / "a", **asked)
    graphs, status, other, capture = rehearse(tmp_path / "b", monkeypatch, **asked)
    assert status == "done"
    assert len(capture.tapes) == 2  # with the recorder and without; 40 test images are no batch
    assert len(capture.tapes[0].operations) > len(capture.tapes[1].operations)
    assert weights(graphs.model) == weights(eager.model)
    assert not graphs.monitor.warnings
    columns = ["loss", "error", "lr", "test_error", "train_error"]
    np.testing.assert_array_equal(other.curve()[columns], run.curve()[columns])
    seen, wanted = other.metrics(), run.metrics()
    assert seen["step"].tolist() == wanted["step"].tolist()
    for name in ("grad_output", "grad_param", "output_second_moment", "perturbation", "skip_gain",
                 "update_ratio", "saturated_fraction", "output_mean"):  # fmt: skip
        np.testing.assert_allclose(seen[name], wanted[name], rtol=2e-3, atol=1e-6, err_msg=name)


def test_a_training_that_stops_and_goes_on_captures_anew_and_ends_with_the_same_bits(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "_REPORT_EVERY_S", 0)
    whole, _, run, _ = rehearse(tmp_path / "a", monkeypatch, **ASKED)
    _, status, _, _ = rehearse(tmp_path / "b", monkeypatch, stop=7, **ASKED)
    assert status == "stopped"
    resumed, status, other, _ = rehearse(tmp_path / "b", monkeypatch, **ASKED)
    assert status == "done"
    assert weights(resumed.model) == weights(whole.model)
    np.testing.assert_array_equal(other.metrics(), run.metrics())


def test_the_step_that_explodes_is_recorded_although_it_was_not_due(tmp_path, monkeypatch):
    asked = {
        **ASKED,
        "variant": "elu_nobn",
        "depth": 20,
        "lr": 30.0,
        "every": 50,
        "record_first": 1,
    }
    _, status, run = train(tmp_path / "a", **asked)
    _, again, other, _ = rehearse(tmp_path / "b", monkeypatch, **asked)
    assert (status, again) == ("diverged", "diverged")
    exploded = int(run.metrics()["step"].max())
    assert exploded > 0
    assert other.metrics()["step"].tolist() == run.metrics()["step"].tolist()
    np.testing.assert_array_equal(
        other.metrics()["output_nonfinite"], run.metrics()["output_nonfinite"]
    )


def test_test_batches_are_replayed_too(tmp_path, monkeypatch):
    """600 test images: two batches of 256 from a graph, 88 by Python."""
    data = tiny_data(test=600)
    _, _, run = train(tmp_path / "a", data, **ASKED)
    _, _, other, capture = rehearse(tmp_path / "b", monkeypatch, data, **ASKED)
    assert len(capture.tapes) == 3
    columns = ["test_loss", "test_error"]
    np.testing.assert_array_equal(other.curve()[columns], run.curve()[columns])


def test_a_value_that_is_looked_at_is_refused_by_the_tape_as_by_a_graph():
    tape = Tape()
    with pytest.raises(AssertionError, match="looks at a value"), tape:
        torch.ones(()).add(1).item()


def test_there_are_no_graphs_on_a_cpu(capsys):
    assert app.run(["run", "--variant", "elu", "--depth", "20", "--backend", "graph",
                    "--device", "cpu"]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "backend 'graph' replays CUDA graphs, not on cpu" in error


def test_graphs_of_a_gpu_give_the_numbers_of_eager(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    asked = {**ASKED, "device": "cuda", "record_first": 3}
    eager, _, run = train(tmp_path / "a", **asked)
    graphs, status, other = train(tmp_path / "b", backend="graph", **asked)
    assert status == "done"
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(graphs.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    for name in ("grad_output", "grad_param", "output_second_moment", "skip_gain"):
        np.testing.assert_allclose(
            other.metrics()[name], run.metrics()[name], rtol=2e-3, err_msg=name
        )
