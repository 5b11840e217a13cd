"""Planted faults do what they say: nothing before they begin, and what their names promise then."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from resdiag.pathologies.architectures import SETS, traits_of
from resdiag.pathologies.grammar import KINDS, Case, draw
from resdiag.pathologies.kinds import MIDWAY
from resdiag.pathologies.optimizers import Lion
from resdiag.pathologies.result import prepare
from resdiag.pathologies.tasks import IGNORED, TASKS
from resdiag.pathologies.train import Loop, train_unwatched
from resdiag.pathologies.trial import norms_in

CASE = Case(set="quick", drawn=0, architecture="residual-mlp", optimizer="sgd", seed=4)


def planted(kind, **about):
    place = {"extent": "one", "at": (1,)} if KINDS[kind].place else {}
    row = KINDS[kind]
    about = {"onset": row.onsets[0], "strength": row.strengths[0], **place, **about}
    return prepare(replace(CASE, kind=kind, **about))


def losses(trial, steps):
    trial.steps = steps
    return train_unwatched(trial)


def cheap_case(kind):
    """A case of this kind that begins midway, in the cheapest network that it fits."""
    cases = [c for c in draw("development", 0) if c.kind == kind and c.onset == MIDWAY]
    cheap = ("residual-mlp", "plain-mlp-bn", "residual-mlp-dropout", "plain-mlp", "gpt-tied")
    return min(cases, key=lambda c: (c.architecture not in cheap, c.architecture))


@pytest.mark.parametrize(
    "kind", [k.name for k in KINDS.values() if MIDWAY in k.onsets and k.finding != "fp16_overflow"]
)
def test_a_fault_that_begins_midway_changes_nothing_before(kind):
    """Bit for bit; only a gradient scaler, which multiplies by a power of two, is there before."""
    case = cheap_case(kind)
    before, healthy = (losses(prepare(c), MIDWAY) for c in (case, replace(case, kind="")))
    assert before == healthy
    ill, well = (losses(prepare(c), MIDWAY + 8) for c in (case, replace(case, kind="")))
    assert ill[:MIDWAY] == healthy
    assert ill != well or kind == "every sample the same"


def test_the_same_case_is_the_same_training_twice():
    case = cheap_case("branch scaled")
    assert losses(prepare(case), 25) == losses(prepare(case), 25)


def test_a_branch_is_scaled_by_the_strength():
    trial, healthy = planted("branch scaled", strength=60.0), prepare(CASE)
    x = torch.randn(3, 48)
    for one, factor in ((1, 60.0), (2, 1.0)):
        units = [t.model.get_submodule(t.blocks[one].owner) for t in (trial, healthy)]
        ill, well = (unit.branch(x) for unit in units)
        torch.testing.assert_close(ill, factor * well)


def test_an_addition_is_lost_or_becomes_a_difference():
    x = torch.randn(3, 48)
    for kind, expected in (
        ("addition lost", lambda f: f),
        ("branch minus shortcut", lambda f: f - x),
    ):
        trial = planted(kind)
        owner = trial.owners[0]
        torch.testing.assert_close(owner(x), expected(owner.branch(x)))


def gradients(trial):
    trial.model.train()
    inputs, targets = trial.batch(0)
    trial.loss(trial.model(inputs), targets, 0).backward()
    return dict(trial.model.named_parameters())


@pytest.mark.parametrize("kind", ["output detached", "block without gradients"])
def test_nothing_before_a_detached_output_gets_a_gradient(kind):
    trial = planted(kind, at=(2,))
    owner = int(trial.blocks[2].owner)
    for name, parameter in gradients(trial).items():
        before = int(name.split(".")[0]) <= owner
        assert (parameter.grad is None) == before, name


def test_equal_weights_give_equal_units():
    trial = planted("all weights constant", architecture="plain-mlp", extent="", at=())
    grad = gradients(trial)[f"{trial.blocks[2].owner}.0.weight"].grad
    assert grad.any()
    torch.testing.assert_close(grad, grad[:1].expand_as(grad))


def test_a_large_epsilon_shrinks_what_a_norm_returns():
    """By sqrt(1 + strength): epsilon is so many times the variance of the input."""
    for strength in (10.0, 100.0):
        trial, healthy = planted("large epsilon", strength=strength), prepare(CASE)
        x = torch.randn(64, 48)
        ill, well = (
            next(
                m
                for m in t.model.get_submodule(t.blocks[1].owner).modules()
                if norms_in(m)[:1] == [m]
            )
            for t in (trial, healthy)
        )
        shrunk = float((well(x).std() / ill(x).std()).detach())
        assert shrunk == pytest.approx((1 + strength) ** 0.5, rel=0.02)


def test_a_skipped_step_changes_no_weight():
    trial = planted("every step skipped")
    before = [p.clone() for p in trial.model.parameters()]
    losses(trial, 3)
    assert all(map(torch.equal, before, trial.model.parameters()))


@pytest.mark.parametrize(
    ("kind", "moves"),
    [
        ("optimizer holds the head only", {"head"}),
        ("optimizer holds all but the head", {"body"}),
        ("optimizer holds another model's parameters", set()),
        ("optimizer holds copies of the parameters", set()),
        ("optimizer holds the parameters of the model before", set()),
        ("optimizer never steps", set()),
    ],
)
def test_the_optimizer_moves_what_it_holds(kind, moves):
    trial = planted(kind, optimizer="adam")
    last = list(trial.model.parameters())[-2:]
    before = {name: p.clone() for name, p in trial.model.named_parameters()}
    losses(trial, 2)
    moved = {
        "head" if any(p is q for q in last) else "body"
        for name, p in trial.model.named_parameters()
        if not torch.equal(before[name], p)
    }
    assert moved == moves


def test_one_group_has_its_own_rate():
    trial = planted("rate of a block too high", strength=300.0)
    groups = Loop(trial).optimizers[0].param_groups
    inside = {id(p) for p in trial.owners[0].parameters()}
    assert [{id(p) for p in g["params"]} == inside for g in groups] == [False, True]
    assert groups[1]["lr"] == pytest.approx(300 * groups[0]["lr"])
    assert sum(len(g["params"]) for g in groups) == len(list(trial.model.parameters()))


def test_gradients_pile_up_where_they_are_not_zeroed():
    trial, healthy = planted("gradients not zeroed"), prepare(CASE)
    for one in (trial, healthy):
        one.lr = 0.0
        losses(one, 2)
    first, second = (one.model[1].weight.grad for one in (trial, healthy))
    one_step = prepare(CASE)
    one_step.lr = 0.0
    losses(one_step, 1)
    torch.testing.assert_close(first, second + one_step.model[1].weight.grad)


def test_clipping_leaves_a_norm_of_1e_7():
    trial = planted("gradients clipped to nothing")
    norms = []
    trial.before_update.append(
        lambda step: norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in trial.model.parameters()))
        )
    )
    losses(trial, 2)
    assert norms == pytest.approx([1e-7] * 2, rel=1e-3)


def test_broken_targets_are_what_their_names_say():
    for kind, check in (
        ("constant labels", lambda b, was: (b[1] == 3).all()),
        ("every label ignored", lambda b, was: (b[1] == IGNORED).all()),
        ("every sample the same", lambda b, was: (b[0] == was[0][:1]).all()),
        ("labels permuted", lambda b, was: torch.equal(b[1].sort()[0], was[1].sort()[0])),
        ("blank inputs", lambda b, was: not b[0].any()),
    ):
        was = prepare(CASE).batch(3)
        assert check(planted(kind).batch(3), was), kind
    words = planted("targets not shifted", architecture="gpt", optimizer="adam").batch(0)
    assert torch.equal(*words)


def test_a_norms_gain_of_zero_stays_zero():
    trial = planted("gain of zero")
    losses(trial, 3)
    norm = next(m for m in trial.owners[0].modules() if isinstance(m, nn.LayerNorm))
    assert not norm.weight.any()


def test_lion_moves_every_weight_by_the_rate():
    weight = nn.Parameter(torch.randn(5))
    before = weight.detach().clone()
    optimizer = Lion([weight], lr=0.01)
    (weight * torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])).sum().backward()
    optimizer.step()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(weight.detach(), before - 0.01 * signs)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(name):
    task = TASKS[name]
    one, same, other = task.batch(1, 2, 8), task.batch(1, 2, 8), task.batch(1, 3, 8)
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("row", [r for rows in SETS.values() for r in rows], ids=lambda r: r.name)
def test_an_architecture_builds_and_has_blocks(row):
    traits = traits_of(row)
    assert traits.blocks
    assert set(traits.spots.get("own", ())) <= {block.index for block in traits.blocks}
    model, (inputs, targets) = row.build(), row.learns.batch(0, 0, row.samples)
    assert row.learns.loss(model(inputs), targets).isfinite()
