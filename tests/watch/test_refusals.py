"""Every refusal and every reason of the watching has a test that provokes it.

The last test collects the texts from the source; a new one fails it until a test provokes it.
"""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from small_nets import Net, data
from torch import nn

import resdiag
from resdiag.errors import ResdiagError
from resdiag.integrations import session
from resdiag.probe.critical_rate import largest_curvature
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop import ranks as distributed
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure import skip_path
from resdiag.watch.record.graph_placement import CUSTOM, HIDDEN, SPLIT

ROOT = Path(__file__).parents[1]


def reasons(watched):
    return {entry["reason"] for entry in watched.unavailable}


def once(model, x=None, **options):
    """One recorded step."""
    given, y = data()
    with attach(model, **options) as watched:
        F.cross_entropy(model(given if x is None else x), y).backward()
        watched.step()
    return watched


# -- frameworks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("accelerate", "accelerate"),
        ("lightning", "lightning.pytorch"),
        ("transformers", "transformers"),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"resdiag.integrations.{name}", raising=False)
    says = f"{name} is missing: pip install 'resdiag[{name}]'"
    with pytest.raises(ImportError, match=re.escape(says)):
        importlib.import_module(f"resdiag.integrations.{name}")


def test_a_lightning_module_without_an_optimizer_is_refused():
    pytest.importorskip("lightning")
    from resdiag.integrations.lightning import ResdiagCallback

    with pytest.raises(ValueError, match="the LightningModule has no optimizer to watch"):
        ResdiagCallback().on_train_start(SimpleNamespace(optimizers=[]), None)


def test_a_run_that_cannot_be_saved_ends_no_training(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise ResdiagError("no space left")

    monkeypatch.setattr(session, "save", full)
    watched = SimpleNamespace(warnings=[], to_frame=lambda _: pd.DataFrame())
    part = SimpleNamespace(_losses={}, monitor=watched, _folder=None, _name="net")
    session.Session._save(part)
    assert watched.warnings == ["the run was not saved: no space left"]
    assert "the run was not saved: no space left" in capsys.readouterr().err


# -- attach and monitor ----------------------------------------------------------------------------


def test_a_closed_monitor_refuses_to_step():
    watched = attach(Net())
    watched.close()
    with pytest.raises(RuntimeError, match="the monitor is closed; attach again"):
        watched.step()


def test_an_unknown_frame_is_refused():
    with attach(Net()) as watched, pytest.raises(ValueError, match="per must be 'block' or 'step'"):
        watched.to_frame("epoch")


def test_without_an_optimizer_the_update_ratio_says_what_it_needs():
    assert "attach(optimizer=...) is needed to see updates" in reasons(once(Net()))


# -- compiled passes -------------------------------------------------------------------------------


class Doubled(nn.Module):
    """The block's input and its sum pass through operations that are not told apart."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x) * 2
        y = torch.stack([x, torch.exp(self.layer(x))]).sum(0)
        return self.head(torch.sin(y))


def test_what_a_compiled_pass_hides_is_said():
    x, y = data()
    torch._dynamo.reset()

    @resdiag.metric(site="output")
    def largest(output: torch.Tensor) -> torch.Tensor:
        return output.abs().max()

    try:
        model = Doubled()
        with attach(model, example_inputs=(x,)) as watched:
            F.cross_entropy(torch.compile(model, backend="eager")(x), y).backward()
            watched.step()
    finally:
        resdiag.unregister_metric("largest")
    assert {CUSTOM, HIDDEN, SPLIT} <= reasons(watched)


# -- blocks ----------------------------------------------------------------------------------------


class Shortcut(Net):
    """One block with a given shortcut, and something between the blocks."""

    def __init__(self, shortcut):
        super().__init__()
        self.shortcut, self.between, self.deep = shortcut, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        x = self.shortcut(x) + self.deep(F.elu(self.blocks[0].layer(x)))
        return self.head(self.blocks[1](self.between(x)))


class InsideAStage(Shortcut):
    """The given shortcut is that of the second block."""

    def forward(self, x):
        x = self.blocks[1](self.stem(x))
        return self.head(self.shortcut(x) + self.deep(F.elu(self.blocks[0].layer(x))))


def test_reasons_of_the_skip_path():
    assert skip_path.MIXED in reasons(once(InsideAStage(nn.Linear(6, 6))))
    assert skip_path.BROKEN in reasons(once(Shortcut(nn.Identity())))
    says = "no gradient leads from the shortcut back to the block's input"
    assert says in reasons(once(Shortcut(torch.detach)))


class Freed(nn.Module):
    """Nobody holds the block's input when the addition comes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 4)
        # frozen, or autograd would keep its input
        self.weight = nn.Parameter(torch.eye(6), requires_grad=False)

    def forward(self, x):
        x = self.stem(x) * 1.0  # the last linear layer's output is held
        h, f = x * 0.5, torch.tanh(torch.matmul(x, self.weight))
        del x
        return self.head(h + f)


def test_an_input_that_is_gone_is_said():
    assert "the block's input was freed before its addition" in reasons(once(Freed()))


class Overflowing(Net):
    """The variance in a BatchNorm overflows, and its output is overwritten by the sum."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.stem(x)
        out = self.norm(F.elu(self.blocks[0].layer(x)) * 1e30)
        out += x
        return self.head(out)


def test_a_normalised_branch_that_is_gone_is_said():
    says = "it was overwritten, and its batch variance overflowed"
    assert says in reasons(once(Overflowing()))


def test_a_unit_without_a_floating_point_input_is_said():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(6, 4))
    watched = once(model, torch.arange(5).unsqueeze(1), blocks=["0"])
    assert "the module has no floating-point input" in reasons(watched)


class Overwriting(nn.Module):
    """A plain network that doubles a layer's output in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self.stem(x).mul_(2))))


def test_a_custom_metric_of_an_overwritten_output_says_that_later_steps_have_it():
    @resdiag.metric(site="output")
    def largest(output: torch.Tensor) -> torch.Tensor:
        return output.abs().max()

    try:
        says = "overwritten before it was known to be a unit's; later steps have it"
        assert says in reasons(once(Overwriting()))
    finally:
        resdiag.unregister_metric("largest")


# -- curvature -------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return Stubborn.apply(2 * g * ctx.saved_tensors[0])


class Stubborn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("not here")


def test_why_a_curvature_is_not_a_number():
    x = torch.ones(3, requires_grad=True)
    once_only = largest_curvature(Once.apply(x).square().sum(), [x])
    assert once_only.reason == "no second derivative: not here"
    huge = largest_curvature((x.square() * 1e30 * 1e30).sum(), [x])
    assert huge.reason == "its numbers are beyond the range of the weights' type"


# -- ranks -----------------------------------------------------------------------------------------


def test_a_first_step_that_not_every_rank_recorded_is_nan_and_said(monkeypatch):
    """Shown without other ranks: their meeting answers that not all have recorded yet."""
    ranks = SimpleNamespace(
        size=2, rank=0, sharded=False, is_open=True,
        meet=lambda *args: None, check=list, close=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr("resdiag.watch.loop.attach.find_ranks", lambda model: ranks)
    net = Net()
    with attach(net) as watched:
        F.cross_entropy(net(data()[0]), data()[1]).backward()
        with pytest.warns(WatchWarning, match="not recorded by every rank"):
            watched.step()
        frame = watched.to_frame()
    assert "step 0 was not recorded by every rank: its numbers are NaN" in watched.warnings
    assert frame[["output_mean", "grad_output", "grad_param"]].isna().all(axis=None)


def test_reasons_of_a_model_without_activations_or_classifier():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(torch.sin(x + self.layer(x)))

    found = reasons(once(Linear()))
    assert "no known activation inside the block" in found
    assert "no linear layer with a gradient ends the forward pass" in reasons(once(Scores()))


class Scores(nn.Module):
    """Ends in a product with its weights, no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        x = x.unsqueeze(-1)
        return (x + self.conv(x)).squeeze(-1).matmul(self.weight)


def test_ranks_that_count_different_steps_are_named():
    ranks = distributed.Ranks.__new__(distributed.Ranks)
    ranks.size, ranks.sharded = 2, False
    ranks._headers = [(3, torch.tensor([1.0, 3, 1, 1, 4, 1]))]
    (text,) = ranks.check()
    assert text.startswith("the ranks count different steps: call monitor.step() equally often")


def test_a_mesh_of_two_dimensions_that_leaves_ranks_out_is_refused(monkeypatch):
    mesh = SimpleNamespace(size=lambda: 4, ndim=2)
    monkeypatch.setattr(distributed, "mesh_of", lambda parameter: mesh)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 8)
    with pytest.raises(ValueError, match="mesh has two dimensions and leaves ranks out"):
        distributed.find_ranks(nn.Linear(2, 2))


# -- the guard -------------------------------------------------------------------------------------

PROVOKED = {
    # what a text says, as the test that provokes it has it
    "accelerate is missing": "is missing: pip install 'resdiag[",
    "lightning is missing": "is missing: pip install 'resdiag[",
    "transformers is missing": "is missing: pip install 'resdiag[",
    "the training has not begun": "has not begun",
    "watching stopped at step {}: ": "watching stopped at step",
    "was not recorded by every rank": "was not recorded by every rank",
    "was recorded alike by": "not by rank 1",
    "the gradients differ from rank to rank": "no_sync()",
    "{} on rank {}": "rank 0, ",
    "torch.compile ran the forward pass without its hooks": "example_inputs=(...)",
    "no module takes or returns this tensor": "CUSTOM, HIDDEN, SPLIT} <= reasons",
    "its gradient comes together where no": "CUSTOM, HIDDEN, SPLIT} <= reasons",
    "custom metrics are computed in compiled": "CUSTOM, HIDDEN, SPLIT} <= reasons",
    "a compiled function around the model hides": "missing(seen, INSIDE)",
    "did other operations than the pass": "missing(seen, CHANGED)",
    "no gradient came to this tensor": "missing(seen, UNREACHED)",
    "its forward ran without gradients": "NO_BACKWARD}",
    "a projection or a gate is on the shortcut": "skip_path.MIXED in reasons",
    "something stands between the blocks": "skip_path.BROKEN in reasons",
    "DataParallel runs copies": "use DistributedDataParallel",
    "FullyShardedDataParallel (FSDP1)": "use torch.distributed.fsdp.fully_shard (FSDP2)",
    "; blocks=[...] names others": "no residual addition: 3 modules are",
    "no residual addition: {} recorded as blocks": "no residual addition: 3 modules are",
    "no residual addition was found": 'match="no residual addition"',
    "custom metric '{}' stopped": "custom metric 'bad' stopped",
    "came without a step of the optimizer": 'match="once per update, aft"',
    "the optimizer stepped twice": "without monitor.step",
    "had no backward pass through the blocks": 'match="no backward pass"',
    "no second derivative: {}": "no second derivative: not here",
    "no positive curvature was found": "no positive curvature",
    "DeepSpeed reduces gradients": "DistributedDataParallel or fully_shard",
    "not an optimizer: {}": "not an optimizer: GradScaler",
    "the model is already compiled": "before torch.compile, with example_inputs",
    "custom metric '{}' is there already": "'mine' is there already",
    "it draws random numbers": "it draws random numbers",
    "inside a torch.func transform": "inside a torch.func",
    "autocast to float16 without scaler=": "float16 without scaler=",
    "{} failed, and gets no further records": "gets no further records",
    "not in the core set": '"core" in next(e["reason"]',
    "no known activation inside the block": "no known activation inside the block",
    "no linear layer with a gradient ends": "no linear layer with a gradient ends",
    "forward passes in one step: the": "forward passes in one step: the",
    "no gradient leads through all blocks": None,  # on an accelerator
    "nothing shows the {} of": "nothing shows the operands",
    "takes another tensor of": "takes another tensor of the pass",
    "step{}, {} recorded": "3 blocks, 1 step, 1 recorded",
    "monitor.py: {}: {} blocks": "3 blocks, 1 step, 1 recorded",
    "stage {}, shape {}": "stage 1, shape 32x16x16",
    "<Block {}": "<Block 1 'stages.1.0': identity shortcut",
    "the training stops: {}": "training stops: {told[0].name}",
    "stands for an operation that cannot be repeated": None,  # never called: a placeholder
}
"""Texts of which tests have other words than the text itself; None: no user can cause it."""


def said():
    """Texts of four words and more in the code of the watching, gaps as {}."""
    for room in ("watch", "integrations"):
        for path in sorted((ROOT.parent / "resdiag" / room).rglob("*.py")):
            if path.name not in ("catalog.py", "site_metrics.py"):  # the metrics' descriptions
                yield from (f"{path.name}: {text}" for text in texts(ast.parse(path.read_text())))


def texts(tree):
    parts, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.add(node.value)  # a docstring
        elif isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            pieces = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            found.append("".join(pieces))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            found.append(node.value)
    return [text for text in found if len(text.split()) >= 4]


def provoking():
    """All tests as one text, without escapes and joints of strings."""
    files = (*ROOT.rglob("test_*.py"), ROOT / "helpers" / "two_ranks.py")
    guard = "# -- the guard"
    joined = "\n".join(path.read_text().split(guard)[0] for path in files)
    return re.sub(r'"\s*\n\s*[rf]*"', "", joined.replace("\\", ""))


def is_provoked(text, tests):
    """Whether three words of it in a row, or what `PROVOKED` says, stand in a test."""
    for says, words in PROVOKED.items():
        if says in text:
            return words is None or words in tests
    words = text.split(": ", 1)[1].split()
    runs = (words[i : i + 4] for i in range(len(words) - 2))
    return any("{}" not in "".join(run) and " ".join(run) in tests for run in runs)


def test_every_text_of_the_watching_is_provoked_by_a_test():
    tests = provoking()
    assert [text for text in said() if not is_provoked(text, tests)] == []
