"""Models whose parts are frozen, shared, copied, saved, recomputed or of other types."""

import copy
import io
import pickle  # noqa: TID251 - what a user may do with a model
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import (
    Unwatched,
    first_gradients,
    g1,
    g2,
    norm,
    per_step,
    walk,
    with_optimizer,
)
from small_nets import CLASSES, Net, at, close, data
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach

# -- models of other kinds -------------------------------------------------------------------------


def backward_once(model, x, y=None, loss=F.cross_entropy, **options):
    y = data(len(x))[1] if y is None else y
    with attach(model, **options) as monitor:
        loss(model(x), y).backward()
        monitor.step()
    return monitor


def test_frozen_parts_are_nan_with_a_reason_and_the_rest_is_there():
    model = Net()
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    monitor = with_optimizer(model, attach, steps=2)
    assert np.isnan(at(monitor, "grad_param")[0])
    assert np.isnan(at(monitor, "grad_output")[0])
    assert min(at(monitor, "grad_param")[1], at(monitor, "grad_output")[1]) > 0
    assert at(monitor, "update_ratio")[0] == 0
    reasons = {(e["metric"], e["reason"]) for e in monitor.unavailable if e["blocks"] == [0]}
    assert ("grad_param", "no parameter of it has a gradient") in reasons
    assert ("grad_output", "this tensor does not require a gradient") in reasons
    assert not monitor.warnings


class Shared(Net):
    """The same block three times."""

    times = 3

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.times):
            x = self.blocks[0](x)
        return self.head(x)


def test_a_block_called_several_times_is_a_block_each_time():
    monitor, twin, (x, y) = backward_once(Shared(), data()[0]), Shared(), data()
    h, sums = twin.stem(x), []
    for _ in range(3):
        h = h + F.elu(twin.blocks[0].layer(h))
        h.retain_grad()
        sums.append(h)
    F.cross_entropy(twin.head(h), y).backward()
    assert [block.name for block in monitor.blocks] == ["blocks.0", "blocks.0#1", "blocks.0#2"]
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(
        [norm([p.grad for p in twin.blocks[0].parameters()])] * 3
    )


def test_blocks_that_a_later_pass_left_out_are_reported():
    model, (x, y) = Shared(), data()
    with attach(model) as monitor:
        for times in (3, 2):
            model.times = times
            F.cross_entropy(model(x), y).backward()
            with (
                pytest.warns(
                    WatchWarning, match=r"did not run in a later one and are NaN there: blocks\.0#2"
                )
                if times == 2
                else nullcontext()
            ):
                monitor.step()
    assert np.isnan(monitor.to_frame().output_mean).to_list() == [False] * 5 + [True]


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Wrapped(Net):
    """Returns its logits in a container, and takes its input in one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        logits = super().forward(batch["x"])
        loss = F.cross_entropy(logits, batch["y"])
        return {
            "tuple": (logits, loss), "dict": {"logits": logits, "loss": loss},
            "dataclass": Output(logits, loss), "loss": loss,
        }[self.kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "loss"])
def test_containers_go_in_and_out_and_a_model_may_return_its_loss(kind):
    model, twin, (x, y) = Wrapped(kind), Net(), data(seed=0)
    with attach(model) as monitor:
        out = model({"x": x, "y": y})
        loss = {
            "tuple": lambda: out[1], "dict": lambda: out["loss"],
            "dataclass": lambda: out.loss, "loss": lambda: out,
        }[kind]()  # fmt: skip
        loss.backward()
        monitor.step()
    assert at(monitor, "grad_output") == close(g2(first_gradients(twin)))
    assert not monitor.warnings


class Dataclassed(nn.Module):
    """A block that is given and returns a dataclass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, state):
        return Output(state.logits + F.elu(self.layer(state.logits)))


def test_a_block_may_take_and_return_a_dataclass():
    model = nn.Sequential(Dataclassed(), Dataclassed())
    x = data()[0]
    with attach(model) as monitor:
        model(Output(x)).logits.square().mean().backward()
        monitor.step()
    assert len(monitor.blocks) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_measured_in_full(dtype):
    model, twin, (x, y) = Net().to(dtype), Net().to(dtype), data()
    monitor = backward_once(model, x.to(dtype), y)
    sums, logits = walk(twin, x.to(dtype))
    F.cross_entropy(logits, y).backward()
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "output_mean") == close([u.double().mean().item() for u in sums])
    assert at(monitor, "grad_param") == close(g1(twin))


def test_the_memory_format_changes_no_number():
    frames = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = Convolutional().to(memory_format=layout)
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=layout)
        monitor = backward_once(model, x)
        frames.append(monitor.to_frame().drop(columns=["point"]))
    np.testing.assert_allclose(*frames, rtol=1e-4, atol=1e-6)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.layer(x), inplace=True)
        return self.head(x.mean((2, 3)))


def test_batches_of_other_sizes_and_empty_ones_are_recorded():
    model, twin = Net(), Net()
    with attach(model) as monitor:
        for n in (5, 2, 0):
            model.zero_grad()
            model(data(n)[0]).square().sum().backward()
            monitor.step()
    sums, logits = walk(twin, data(2)[0])
    logits.square().sum().backward()
    assert at(monitor, "grad_output", 1) == close(g2(sums))
    assert np.isnan(at(monitor, "output_mean", 2)).all()
    assert at(monitor, "grad_param", 2) == [0, 0]
    assert not monitor.warnings


def test_functional_calls_are_recorded_but_for_parameters_that_are_not_the_models():
    model, twin, (x, y) = Net(), Net(), data(seed=0)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with attach(model) as monitor:
        F.cross_entropy(functional_call(model, weights, (x,)), y).backward()
        with pytest.warns(WatchWarning, match="no gradient was left"):
            monitor.step()
    assert at(monitor, "grad_output") == close(g2(first_gradients(twin)))
    assert np.isnan(at(monitor, "grad_param")).all()


def test_a_function_transform_is_left_alone_and_reported():
    model, (x, y) = Net(), data()
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights):
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    expected = grad(loss)(weights)
    with attach(model) as monitor, pytest.warns(WatchWarning, match=r"inside a torch\.func"):
        found = grad(loss)(weights)
    assert all(torch.equal(expected[name], found[name]) for name in weights)
    assert len(monitor.to_frame()) == 0


def test_a_copy_of_a_watched_model_is_not_watched():
    model, (x, y) = Net(), data(seed=0)
    with attach(model) as monitor:
        average = copy.deepcopy(model)
        F.cross_entropy(average(x + 1), y).backward()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(average(x + 1), y).backward()
        monitor.step()
    assert not monitor.warnings
    assert at(monitor, "grad_output") == close(g2(first_gradients(Net())))


def test_a_watched_model_can_be_saved_by_its_state_and_whole_and_copied_unwatched():
    model, inputs = Net(), torch.randn(5, 3)
    keys = list(model.state_dict())
    file = io.BytesIO()
    with attach(model) as monitor:
        for _ in range(2):
            model(inputs).square().mean().backward()
            monitor.step()
        rows = len(monitor.to_frame())
        assert list(model.state_dict()) == keys
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)  # noqa: TID251 - saved above
        for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert type(other) is Net
            other(inputs).sum().backward()
        assert monitor.warnings == []
        model(inputs).square().mean().backward()
        monitor.step()
        assert len(monitor.to_frame()) == rows * 3 // 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Checkpointed(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_recomputed_blocks_are_counted_once_in_a_whole_training():
    plain_frame, frame = (
        with_optimizer(model, attach).to_frame().drop(columns="point")
        for model in (Net(), Checkpointed())
    )
    np.testing.assert_array_equal(plain_frame, frame)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_language_model_that_returns_its_loss_is_recorded(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tokens = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
        with attach(model) if watched else nullcontext(Unwatched()) as monitor:
            model(input_ids=tokens, labels=tokens).loss.backward()
            monitor.step()
        ends.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *ends))
    assert not monitor.warnings
    assert len(monitor.blocks) == 4
    frame = monitor.to_frame()
    assert frame[["grad_param", "output_mean"]].notna().all(axis=None)
    assert frame.grad_output.isna().all() == bool(reentrant)  # runs `forward` again, no module
    hidden = [e for e in monitor.unavailable if e["metric"] == "grad_output"]
    assert [e["blocks"] for e in hidden] == ([[0, 1, 2, 3]] if reentrant else [])
    assert all("use_reentrant=False" in e["reason"] for e in hidden)
    assert per_step(monitor, "grad_norm")[0] == close(norm(ends[0]))
