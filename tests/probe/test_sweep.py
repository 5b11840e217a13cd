"""`resdiag probe --sweep`: linear residual networks, whose laws are known, and the command."""

import json
import math
import sys

import pytest

from resdiag.errors import UsageError
from resdiag.probe.sweep import sweep_model

MODEL = '''
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width, scale):
        super().__init__()
        self.branch = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.branch.weight, std=scale / width**0.5)

    def forward(self, x):
        return x + self.branch(x)

class Net(nn.Module):
    """x + W x, with E[|W x|^2] = scale^2 |x|^2."""

    def __init__(self, depth, width, power):
        super().__init__()
        blocks = [Block(width, depth**-power) for _ in range(depth)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, 5)
        self.input_size = (width,)

    def forward(self, x):
        return self.head(self.blocks(x))

def make(depth=4, width=256, power=0.0):
    return Net(depth, width, power)
'''


@pytest.fixture
def linear(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swept_net.py").write_text(MODEL)
    yield "swept_net:make"
    sys.modules.pop("swept_net", None)


def test_an_unscaled_sum_doubles_its_square_per_block(linear):
    found = sweep_model(linear, "depth", [2, 4, 8, 12])
    signal = found.trends["signal"]
    assert found.is_depth
    assert signal.kind == "exponential"
    # E[|H'|^2] = 2 E[|H|^2]: the root of 2 per block
    assert math.exp(signal.slope) == pytest.approx(math.sqrt(2), rel=0.03)
    assert found.trends["gradient"].kind == "exponential"
    assert "normalise the branches" in found.findings()[0]


def test_branches_scaled_by_the_root_of_the_depth_keep_it(linear):
    """(1 + 1/L)^(L/2) goes from 1.5 at L = 2 to the root of e, 1.65."""
    found = sweep_model(linear, "depth", [2, 4, 8, 16], arguments={"power": 0.5})
    assert found.trends["signal"].kind == "flat"
    for point in found.points:
        theory = (1 + 1 / point.blocks) ** (point.blocks / 2)
        assert point.numbers["signal"] == pytest.approx(theory, rel=0.1)
    assert found.findings()[0] == "The signal does not depend on depth."


def test_without_more_blocks_it_is_a_width_and_adam_moves_wide_networks_further(linear):
    found = sweep_model(linear, "width", [64, 128, 256, 512], seeds=3)
    assert not found.is_depth
    assert set(found.trends) == {"output", "change"}
    # Adam moves each weight alike, so the output changes with the width itself (Yang & Hu 2021)
    assert found.trends["change"].slope == pytest.approx(1.0, abs=0.25)
    assert "1/width (muP)" in found.findings()[1]


def test_the_command_writes_numbers_and_a_plot(linear, call, tmp_path):
    code, out, _ = call("probe", linear, "--sweep", "depth=2,4,6", "--seeds", "1", "--json",
                        "--arg", "width=32", "--out", "swept")  # fmt: skip
    assert code == 0
    document = json.loads(out, parse_constant=pytest.fail)
    assert document["by"] == "depth"
    assert [point["blocks"] for point in document["points"]] == [2, 4, 6]
    assert json.loads((tmp_path / "swept" / "sweep.json").read_text())["trends"].keys() == {
        "signal", "gradient", "change",
    }  # fmt: skip
    assert (tmp_path / "swept" / "sweep.png").stat().st_size > 5000
    code, text, _ = call("probe", linear, "--sweep", "depth=2,4,6", "--arg", "width=32")
    assert code == 0
    assert "The signal grows" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "depth=4"],
        ["--sweep", "depth=4,4"],
        ["--sweep", "depth=4,x"],
        ["--sweep", "=4,8"],
        ["--sweep", "depth=-4,8"],
        ["--sweep", "depth=4,8", "--blocks", "blocks.*"],
        ["--sweep", "nothing=4,8"],
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(linear, call, words):
    code, out, err = call("probe", linear, *words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_a_depth_that_is_no_whole_number_is_refused(call):
    code, _, err = call("probe", "resdiag:d-8", "--sweep", "depth=8,8.5", "--arg", "width=0.25")
    assert code == 2
    assert "depth 8.5 is not a whole number" in err


def test_one_value_is_no_sweep(linear):
    with pytest.raises(UsageError, match="two different values"):
        sweep_model(linear, "depth", [4])
