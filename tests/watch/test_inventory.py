"""What a model, its optimizers and its loop consist of, and what one traced pass shows of parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resdiag
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach


def small():
    return build_model("elu", 14, width=0.25, seed=0)


def train(model, optimizer, steps=3, *, draw=lambda: torch.randn(8, 3, 8, 8), **options):
    """Train, watched; the inventory."""
    with attach(model, optimizer=optimizer, **options) as monitor:
        for _ in range(steps):
            out = model(draw())
            out = out if isinstance(out, torch.Tensor) else out[0]
            if optimizer is not None:
                optimizer.zero_grad()
            out.float().square().mean().backward()
            if optimizer is not None:
                optimizer.step()
            monitor.step()
    return monitor.inventory


def last_of(model):
    """Weight and bias of the classifier."""
    return [*model.parameters()][-2:]


def sgd(parameters, lr=0.01):
    return torch.optim.SGD(parameters, lr)


def test_before_the_first_step_it_is_known_which_parameters_no_optimizer_holds():
    model = small()
    with attach(model, optimizer=sgd(last_of(model))) as monitor:
        about = monitor.inventory["parameters"]
    every = [name for name, _ in model.named_parameters()]
    body = every[:-2]
    assert about["unheld"] == len(body)
    assert about["names"] == body[:8]
    assert (about["trainable"], about["foreign"], about["copies"]) == (len(every), 0, False)


@pytest.mark.parametrize(("other", "copies"), [(small, True), (lambda: nn.Linear(3, 4), False)])
def test_an_optimizer_of_another_model_holds_none(other, copies):
    model = small()
    with attach(model, optimizer=sgd(other().parameters())) as monitor:
        about = monitor.inventory["parameters"]
    assert about["unheld"] == about["trainable"]
    assert about["foreign"] > 0
    assert about["copies"] is copies


def test_what_is_frozen_on_purpose_is_not_missed():
    model = small()
    for parameter in model.stages[0].parameters():
        parameter.requires_grad = False
    found = train(model, sgd(p for p in model.parameters() if p.requires_grad))
    assert found["parameters"]["unheld"] == 0
    assert found["trainable"] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_updates_are_counted_and_those_in_evaluation_mode_apart():
    model = small()
    optimizer = sgd(model.parameters())
    with attach(model, optimizer=optimizer) as monitor:
        for step in range(5):
            model.train(step < 2)
            model(torch.randn(4, 3, 8, 8)).sum().backward()
            if step != 1:
                optimizer.step()
            monitor.step()
    assert monitor.inventory["events"] == {
        "update": {"count": 4, "first": 0, "last": 4},
        "update_in_evaluation": {"count": 3, "first": 2, "last": 4},
        "no_update": {"count": 1, "first": 1, "last": 1},
    }
    assert monitor.inventory["evaluating"] == ["BatchNorm2d"]


def test_an_evaluation_between_the_steps_is_none():
    model = small()
    optimizer = sgd(model.parameters())
    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(3):
            model.eval()
            with torch.no_grad():
                model(torch.randn(4, 3, 8, 8))
            model.train()
            model(torch.randn(4, 3, 8, 8)).sum().backward()
            optimizer.step()
            monitor.step()
    assert "update_in_evaluation" not in monitor.inventory["events"]


def test_groups_have_their_rates_and_places():
    model = small()
    parameters = [*model.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 3.0}], 0.01
    )
    one, two = train(model, optimizer)["groups"]
    assert (one["lr"], two["lr"], two["parameters"], two["blocks"]) == (0.01, 3.0, 2, [])
    assert one["size"] + two["size"] == sum(p.numel() for p in parameters)
    assert one["blocks"] == [0, 1, 2, 3, 4, 5]


def test_a_batch_norm_whose_statistics_do_not_move_is_stuck():
    model = small()
    norm = next(m for m in model.stages[1].modules() if isinstance(m, nn.BatchNorm2d))
    norm.momentum = 0.0
    (stuck,) = train(model, sgd(model.parameters()))["stuck"]
    assert (stuck["momentum"], stuck["block"]) == (0.0, 2)


class Attention(nn.Module):
    """One head, spelled in one of three ways; the logits are multiplied by a factor."""

    def __init__(self, how, factor):
        super().__init__()
        self.how, self.factor = how, factor
        self.qkv = nn.Linear(8, 24)

    def logits(self, x):
        q, k, _ = self.qkv(x).chunk(3, -1)
        return self.factor * q @ k.transpose(1, 2) / math.sqrt(8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "product":
            q = self.factor * q
            return F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v)))[:, 0]
        return self.logits(x).softmax(-1) @ v


class Layer(nn.Module):
    """A pre-norm layer without a multilayer perceptron."""

    def __init__(self, how="softmax", factor=1.0):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention(how, factor)

    def forward(self, x):
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize("factor", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("how", ["softmax", "product"])
def test_the_entropy_of_attention_is_that_of_its_weights(how, factor):
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(how, factor), Layer(how)), torch.randn(3, 5, 8)
    first = model[0]
    logits = first.attention.logits(first.norm(x)).detach().double()
    p = logits.softmax(-1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).mean() / math.log(5)
    spread = (logits.amax(-1) - logits.amin(-1)).mean()
    seen = train(model, sgd(model.parameters()), 1, draw=lambda: x)["attentions"]
    assert [entry["block"] for entry in seen] == [0, 1]
    assert seen[0]["entropy"] == pytest.approx(entropy.item(), rel=1e-4, abs=1e-6)
    assert seen[0]["spread"] == pytest.approx(spread.item(), rel=1e-4, abs=1e-6)


def test_torchs_own_attention_and_causal_masks_are_read():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    module = nn.MultiheadAttention(8, 2, batch_first=True)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = module, nn.Linear(8, 8)

        def forward(self, x):
            q = self.attention(x, x, x)[0]
            return x + self.out(F.scaled_dot_product_attention(q, q, q, is_causal=True))

    model = Wrapped()
    weights = module(x, x, x, average_attn_weights=False)[1].double()
    expected = -(weights * weights.log()).sum(-1).mean().item() / math.log(5)
    own, causal = train(model, sgd(model.parameters()), 1, draw=lambda: x)["attentions"]
    assert own["entropy"] == pytest.approx(expected, rel=1e-4)
    q = module(x, x, x)[0].detach().double()
    rows = []
    for i in range(1, 5):  # a query that sees one key has no entropy
        p = (q[:, i : i + 1] @ q[:, : i + 1].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        rows.append(-(p * p.log()).sum(-1).mean().item() / math.log(i + 1))
    assert causal["entropy"] == pytest.approx(sum(rows) / 4, rel=1e-4)


def test_attention_is_looked_at_again_in_the_ninth_recorded_pass():
    model = nn.Sequential(Layer(), Layer())
    with attach(model, optimizer=(optimizer := sgd(model.parameters()))) as monitor:
        for step in range(12):
            assert ("later_attentions" in monitor.inventory) is (step > 8)
            model(torch.randn(3, 5, 8)).square().mean().backward()
            optimizer.step()
            monitor.step()
            with torch.no_grad():
                model[0].attention.qkv.weight.zero_()
                model[0].attention.qkv.bias.zero_()
    assert monitor.inventory["attentions"][0]["spread"] > 0
    assert monitor.inventory["later_attentions"][0]["spread"] == 0


def test_of_each_normalisation_the_variance_and_the_epsilon():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4, 6, 5, 5)
    model = nn.Sequential(
        nn.BatchNorm2d(6, eps=0.5), nn.GroupNorm(2, 6), nn.Flatten(1), nn.LayerNorm(150)
    )
    nn.init.zeros_(model[1].weight)
    seen = train(model, sgd(model.parameters()), 1, draw=lambda: x, blocks=["1"])
    batch, group, layer = seen["normalisations"]
    assert [n["kind"] for n in (batch, group, layer)] == ["batch_norm", "group_norm", "layer_norm"]
    assert [n["count"] for n in (batch, group, layer)] == [100, 75, 150]
    expected = x.transpose(0, 1).flatten(1).var(1, correction=0).median()
    assert batch["variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert (batch["eps"], group["gain"], layer["gain"]) == (0.5, 0.0, 1.0)


def test_a_block_without_its_skip_is_missed_and_one_that_is_skipped_is_not():
    model = small()
    lost, idle = model.stages[1][1], model.stages[2][1]
    lost.forward = lambda x: lost.branch(x) - x
    idle.forward = lambda x: x  # as a layer that is dropped at random
    found = train(model, sgd(model.parameters()), 1)["lacking"]
    assert [(entry["name"], entry["block"]) for entry in found] == []  # two likes are too few
    model = build_model("elu", 20, width=0.25, seed=0)
    lost, idle = model.stages[1][1], model.stages[2][1]
    lost.forward = lambda x: lost.branch(x) - x
    idle.forward = lambda x: x
    found = train(model, sgd(model.parameters()), 1)["lacking"]
    assert [(entry["name"], entry["block"]) for entry in found] == [("stages.1.1", 4)]


def test_weights_whose_units_are_equal_are_named():
    model = small()
    with torch.no_grad():
        for parameter in model.stages[1][0].parameters():
            if parameter.dim() > 1:
                parameter.fill_(0.01)
        last_of(model)[0].zero_()  # a design: zero initialisation of the last layer
    constant = train(model, sgd(model.parameters()), 2)["constant"]
    assert {entry["block"] for entry in constant} == {2}
    assert len(constant) >= 2


def test_dropout_on_a_shortcut_is_in_its_path():
    model = small()
    model.stages[0][0].shortcut = nn.Dropout(0.3)
    model.stages[0][1].shortcut = nn.Dropout(0.0)
    with attach(model) as monitor:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        monitor.step()
    assert [b.shortcut_path for b in monitor.blocks][:2] == [("dropout",), ()]


def test_recurrent_modules_are_named_and_an_optimizer_of_another_model_is_warned_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    model = Net()
    found = train(model, sgd(model.parameters()), 1, draw=lambda: torch.randn(2, 4, 8))
    assert found["recurrent"] == ["lstm"]
    with attach(Net(), sgd(model.parameters())) as monitor:
        pass
    assert monitor.warnings == [
        "the optimizer holds no parameter of the model, and cannot train it"
    ]
    with attach(model, sgd(model.lstm.parameters())) as monitor:
        model(torch.randn(2, 4, 8)).sum().backward()
        monitor.step()
    assert not any("holds no parameter" in text for text in monitor.warnings)
    unjudged = resdiag.judge(monitor).not_judged
    assert "vanishing: gradients over time inside lstm are not recorded" in unjudged


def test_what_a_pass_cannot_show_is_said():
    """Of an input of one number a sample; columns about tokens and last activations are not due."""
    model = nn.Sequential(nn.Unflatten(0, (5, 8)), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with attach(model) as monitor:
        model(torch.randn(40)).sum().backward()
        monitor.step()
    reasons = {item["metric"]: item["reason"] for item in monitor.unavailable}
    assert reasons["data_between"] == "the model has no input with several samples"
    assert not {"label_copies", "output_loss"} & set(reasons)
