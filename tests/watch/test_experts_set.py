"""Routers are found by what they do, and their numbers are those of counting."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resdiag.catalog.set_metrics import EXPERTS
from resdiag.watch.loop.attach import attach

WIDTH, EXPERT_COUNT, CLASSES = 6, 4, 3
COLUMNS = [metric.id for metric in EXPERTS]


class Mixture(nn.Module):
    """A mixture of experts, in one of several spellings; keeps what it chose, and its logits."""

    def __init__(self, spelling, k=2):
        super().__init__()
        self.spelling, self.k, self.apart = spelling, k, spelling == "apart"
        self.gate = Router(k) if self.apart else nn.Linear(WIDTH, EXPERT_COUNT)
        if spelling == "stacked":
            self.weights = nn.Parameter(torch.randn(EXPERT_COUNT, WIDTH, WIDTH) / 3)
        else:
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERT_COUNT))

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        if self.apart:
            weights, chosen, logits = self.gate(tokens)
        else:
            logits = self.gate(tokens)
            weights, chosen = self.choose(logits)
        self.chosen, self.logits = chosen.detach().clone(), logits.detach().clone()
        out = torch.zeros_like(tokens)
        for expert in range(EXPERT_COUNT):
            rows, place = torch.where(chosen == expert)
            out = out.index_add(
                0, rows, self.run(expert, tokens[rows]) * weights[rows, place, None]
            )
        return out.view_as(x)

    def choose(self, logits):
        if self.spelling == "switch":  # argmax, as Switch Transformers do
            p = logits.softmax(-1)
            chosen = torch.argmax(p, dim=-1, keepdim=True)
            return p.gather(1, chosen), chosen
        if self.spelling == "biased":  # a sigmoid, and a bias that only the choice sees
            p = logits.sigmoid()
            chosen = torch.topk(p + torch.tensor([0.3, 0.0, 0.0, -0.3]), self.k, dim=-1)[1]
            return p.gather(1, chosen), chosen
        if self.spelling == "method":
            best, chosen = logits.topk(self.k)
            return best.softmax(-1), chosen
        return torch.topk(F.softmax(logits, dim=1), self.k, dim=1)

    def run(self, expert, x):
        return x @ self.weights[expert] if self.spelling == "stacked" else self.experts[expert](x)


class Router(nn.Module):
    """As in transformers: the map and the choice in a module of their own."""

    def __init__(self, k):
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.randn(EXPERT_COUNT, WIDTH)), k

    def forward(self, x):
        logits = F.linear(x, self.weight)
        best, chosen = torch.topk(logits.float(), self.k, dim=-1)
        return best.softmax(-1), chosen, logits


class Unit(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def network(*branches, seed=0):
    torch.manual_seed(seed)
    units = [Unit(Mixture(one) if isinstance(one, str) else one) for one in branches]
    return nn.Sequential(nn.Linear(3, WIDTH), *units, nn.Linear(WIDTH, CLASSES))


def record(model, x=None, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, 3, generator=generator) if x is None else x
    y = torch.randint(CLASSES, (x.shape[0] * x.shape[1],), generator=generator)
    with attach(model, **{"metrics": {"experts": 1}, **options}) as monitor:
        F.cross_entropy(model(x).flatten(0, 1), y).backward()
        monitor.step()
    return monitor


def row(monitor, block=0):
    return monitor.to_frame().iloc[block]


def slow_columns(mixture):
    counts = Counter(mixture.chosen.flatten().tolist())
    total = sum(counts.values())
    shares = [counts[expert] / total for expert in range(EXPERT_COUNT)]
    squares = [
        math.log(math.fsum(math.exp(z) for z in logits)) ** 2 for logits in mixture.logits.tolist()
    ]
    k, entropy = mixture.chosen.shape[-1], -sum(f * math.log(f) for f in shares if f)
    return {
        "expert_load": max(shares),
        "expert_busiest": shares.index(max(shares)),
        "expert_entropy": (entropy - math.log(k)) / (math.log(EXPERT_COUNT) - math.log(k)),
        "expert_dead": shares.count(0) / EXPERT_COUNT,
        "expert_tokens": total / EXPERT_COUNT,
        "router_logit_z": math.sqrt(sum(squares) / len(squares)),
    }


@pytest.mark.parametrize("spelling", ["list", "stacked", "apart", "switch", "biased", "method"])
def test_every_spelling_has_the_numbers_of_counting(spelling):
    model = network("list", spelling)
    monitor = record(model)
    for block in (0, 1):
        twin = slow_columns(model[1 + block].branch)
        for column in COLUMNS:
            assert row(monitor, block)[column] == pytest.approx(twin[column], rel=1e-5)


def test_experts_that_get_no_token_are_counted():
    model = network("list")
    with torch.no_grad():
        model[1].branch.gate.bias += torch.tensor([50.0, 40.0, 0.0, 0.0])
    found = row(record(model))
    assert found["expert_dead"] == 0.5
    assert found["expert_load"] == 0.5
    assert found["expert_entropy"] == pytest.approx(0, abs=1e-6)


class Largest(nn.Module):
    """A top-k over as many numbers as other modules have members, but not of experts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.layer(x)
        best, place = y.topk(2, dim=-1)
        return torch.zeros_like(y).scatter(-1, place, best)


def test_a_choice_without_experts_is_no_router_and_is_said_only_if_asked():
    assert "expert_load" not in record(network(Largest())).to_frame()
    asked = [one["reason"] for one in record(network(Largest())).unavailable
             if one["metric"] == "expert_load"]  # fmt: skip
    assert asked == [
        "no top-k or argmax over as many numbers as a module around it has experts was seen in its "
        "branch"
    ]
    silent = record(network(Largest()), metrics="full").unavailable
    assert not [one for one in silent if one["metric"] == "expert_load"]


@pytest.mark.parametrize("change", [lambda z: z.softmax(-1), lambda z: z.mul_(2).softmax(-1)])
def test_logits_that_are_gone_at_the_choice_have_no_z_and_a_reason(change):
    class Freed(Mixture):
        def __init__(self):
            super().__init__("list")
            self.other, self.change = nn.Linear(WIDTH, WIDTH), change

        def forward(self, x):
            tokens = x.reshape(-1, WIDTH)
            p = self.change(self.gate(tokens))
            tokens = self.other(tokens)  # a tracer holds the output of the last linear map
            best, chosen = p.topk(self.k, dim=-1)
            every = torch.stack([expert(tokens) for expert in self.experts], 1)
            picked = every.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
            return (picked * best[..., None]).sum(1).view_as(x)

    monitor = record(network(Freed()))
    assert "router_logit_z" not in monitor.to_frame()
    assert row(monitor)["expert_load"] > 0
    (reason,) = [one["reason"] for one in monitor.unavailable if one["metric"] == "router_logit_z"]
    assert reason == "the router's logits were freed or overwritten before its choice"


def test_mixtral_is_found_without_being_asked_for():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=30,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    tokens = torch.randint(30, (3, 10))
    with attach(model) as monitor:
        out = model(tokens, labels=tokens, output_router_logits=True)
        out.loss.backward()
        monitor.step()
    frame = monitor.to_frame()
    for layer, logits in enumerate(out.router_logits):
        counts = logits.topk(2)[1].flatten().bincount(minlength=4)
        found = frame.iloc[2 * layer + 1]
        assert found["expert_load"] == pytest.approx(counts.max().item() / counts.sum().item())
        assert found["expert_dead"] == (counts == 0).float().mean().item()
    assert frame["attention_entropy"].notna().tolist() == [True, False, True, False]
