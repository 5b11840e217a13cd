"""`resdiag.examine`: closed forms, planted faults, and that it changes nothing."""

import copy
import json
import math
import random
import threading

import numpy as np
import pytest
import torch
from small_nets import Net, data
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import resdiag
from resdiag.errors import UsageError
from resdiag.probe.experiments.copies import Copies
from resdiag.probe.experiments.default_loss import best_constant
from resdiag.probe.experiments.gradients import check_gradients
from resdiag.probe.experiments.inputs import check_inputs, check_samples
from resdiag.probe.experiments.labels import compare_neighbours
from resdiag.probe.experiments.parts import find_parts
from resdiag.probe.experiments.rates import sweep_rates
from resdiag.probe.experiments.task import open_task
from resdiag.probe.experiments.trial import open_trial, own, sgd


def nothing():
    pass


def sgd_of(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def blobs(n=24, classes=3, width=4, seed=0):
    """Inputs around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, width, generator=generator)
    y = torch.arange(n) % classes
    return centres[y] + 0.3 * torch.randn(n, width, generator=generator), y


def mlp(*middle, width=4, classes=3):
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), *middle, nn.Linear(32, classes))


def gradients_of(model, batch, loss=None):
    return check_gradients(Copies(model, None, loss), open_task(model, batch, loss), 0, nothing)


# -- the rate sweep against closed forms ---------------------------------------------------------


class Parabola(nn.Module):
    """Loss x' diag(a) x / 2, begun in the direction of the largest curvature."""

    def __init__(self, curvatures):
        super().__init__()
        self.a = nn.Buffer(torch.tensor(curvatures))
        start = torch.zeros(len(curvatures))
        start[-1] = 1.0
        self.x = nn.Parameter(start)

    def forward(self, scale):
        return scale.mean() * (self.a * self.x**2).sum() / 2


def test_the_sweep_finds_the_critical_rate_of_a_parabola():
    model, task = Parabola([1.0, 7.0]), None
    task = open_task(model, torch.ones(2), None)
    critical = 2 / 7
    factors = (0.5, 0.95, 1.05, 2.0)
    sweep = sweep_rates(Copies(model, sgd_of(model), None), task, own, critical, seed=0,
                        advance=nothing, factors=factors, given=critical)  # fmt: skip
    outcomes = [rate.outcome for rate in sweep.rates]
    assert outcomes == ["falls", "falls", "rises", "rises"]
    for rate, factor in zip(sweep.rates, factors, strict=True):
        # one step multiplies x by 1 - lr a = 1 - 2 factor
        expected = 7 / 2 * (1 - 2 * factor) ** (2 * sweep.steps)
        assert rate.last == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sweep.best.lr == pytest.approx(critical / 2)  # it goes to the bottom in one step


@pytest.mark.parametrize(
    ("factor", "answer"), [(1e-4, "too_low"), (0.5, "fits"), (30.0, "too_high")]
)
def test_a_given_rate_is_judged_beside_the_fastest(factor, answer):
    model = Parabola([1.0, 7.0])
    given = factor * 2 / 7
    sweep = sweep_rates(Copies(model, sgd_of(model), None), open_task(model, torch.ones(2), None),
                        own, given, seed=0, advance=nothing, given=given)  # fmt: skip
    assert sweep.answer == answer
    assert sweep.best.lr < 2 / 7
    assert sweep.best.lr >= 2 / 7 / 11  # the decade below the critical rate


def test_a_trial_trains_as_a_plain_loop_does_bit_for_bit():
    model = Net()
    optimizer = sgd_of(model, 0.05, momentum=0.9)
    batch = data()
    twin = copy.deepcopy(model)
    losses, plain = [], torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        plain.zero_grad()
        loss = F.cross_entropy(twin(batch[0]), batch[1])
        loss.backward()
        plain.step()
        losses.append(float(loss))
    task = open_task(model, batch, None)
    with open_trial(Copies(model, optimizer, None), task, own(0.05), 0, nothing) as trial:
        trial.train(4)
    assert trial.losses == losses


def test_a_rate_with_an_optimizer_scales_every_group_in_proportion():
    model = Net()
    groups = [{"params": model.stem.parameters(), "lr": 0.1},
              {"params": model.head.parameters(), "lr": 0.02}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=1.0)
    with Copies(model, optimizer, None).fresh() as made:
        changed = own(0.5)(made.model, made.optimizer)
    assert [group["lr"] for group in changed.param_groups] == [0.5, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]


# -- gradients -----------------------------------------------------------------------------------


class WrongBackward(torch.autograd.Function):
    """The identity, whose gradient is too large by half."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.5 * grad


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (mlp(), 1e-5),
        (nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), 1e-5),
        (nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)), 1e-5),
        # its singular vectors are constants to autograd, and one iteration behind the weight
        (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 3)),
         1e-2),
        (nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)), 1e-5),
        (nn.Sequential(nn.Linear(4, 8), Apply(lambda x: checkpoint(torch.tanh, x,
                       use_reentrant=True)), nn.Linear(8, 3)), 1e-5),
    ],
    ids=["mlp", "batchnorm", "dropout", "spectral norm", "weight norm", "checkpoint"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_right_gradients_are_ruled_out_as_the_fault(model, error):
    model(torch.randn(2, 4))  # weight_norm keeps a computed weight after a pass
    found = gradients_of(model, blobs())
    assert not found.shows
    assert found.numbers["precision"] == "float64"
    assert found.numbers["error"] < error
    assert [name for name, _ in found.rules_out] == ["gradient"]


def test_a_wrong_backward_is_named_with_its_factor_and_the_last_wrong_part():
    model = mlp(nn.Linear(32, 32), Apply(WrongBackward.apply), nn.Linear(32, 32))
    found = gradients_of(model, blobs())
    ((name, text),) = found.shows
    assert name == "gradient_wrong"
    states = {part["name"]: part["wrong"] for part in found.numbers["parts"]}
    assert states == {"0": True, "2": True, "4": False, "5": False}
    assert "a ratio of 1.5" in text
    assert "from 4 to the loss it is right, so the fault lies in 2 or just after it" in text
    last = found.numbers["parts"][1]
    assert last["autograd"] == pytest.approx(1.5 * last["numeric"], rel=1e-4)


@pytest.mark.parametrize(
    "cut", [lambda x: x.detach(), lambda x: x.data, lambda x: torch.from_numpy(x.detach().numpy())]
)
def test_a_detach_in_the_middle_is_named_between_its_neighbours(cut):
    found = gradients_of(mlp(nn.Linear(32, 32), Apply(cut), nn.Linear(32, 32)), blobs())
    ((name, text),) = found.shows
    assert name == "no_gradient"
    assert "No gradient reaches 0, 2" in text
    assert "between 2 and 4" in text


def test_one_detached_parameter_and_one_unused_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(()))
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.layer(x) * self.scale.detach()

    found = gradients_of(Two(), blobs())
    assert [name for name, _ in found.shows] == ["no_gradient"]
    assert "No gradient reaches scale, although" in found.shows[0][1]
    assert found.open == (
        ("unused", "The loss does not depend on unused: no gradient is right there."),
    )


def test_a_gradient_that_is_not_finite_is_named():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return (x[:, :3] * self.w.square().sum().sqrt()).sum(1)

    found = gradients_of(Norm(), (torch.randn(4, 4), torch.randn(4)))
    assert [name for name, _ in found.shows] == ["gradient_not_finite"]


def test_a_cast_to_float32_inside_is_checked_coarsely_and_half_precision_is_not():
    single = mlp(Apply(lambda x: x.float().tanh().double()))
    found = gradients_of(single, blobs())
    assert not found.shows
    assert found.numbers["precision"] == "float32"
    half = mlp(Apply(lambda x: x.bfloat16().tanh().to(x.dtype)))
    assert "half precision" in gradients_of(half, blobs()).reason
    refused = mlp(Apply(lambda x: x.float()))
    assert "no pass in float64" in gradients_of(refused, blobs()).reason


def test_a_model_with_random_numbers_of_its_own_is_not_checked():
    generator = torch.Generator().manual_seed(0)
    noisy = mlp(Apply(lambda x: x + torch.randn(x.shape, generator=generator).to(x)))
    assert "differ" in gradients_of(noisy, blobs()).reason


def test_parts_are_blocks_of_containers_and_shared_parameters_count_once():
    model = Net()
    assert [part.name for part in find_parts(model)] == ["stem", "blocks.0", "blocks.1", "head"]
    model.head.weight = nn.Parameter(torch.zeros(6, 6))
    model.blocks[0].layer = model.blocks[1].layer
    assert [part.name for part in find_parts(model)] == ["stem", "blocks.0", "head"]


# -- the input -----------------------------------------------------------------------------------


def test_a_model_that_ignores_its_input_is_found():
    model = mlp(Apply(lambda x: x * 0.0))
    found = check_inputs(Copies(model, None, None), open_task(model, blobs(), None), 0, nothing)
    assert [name for name, _ in found.shows] == ["ignores_input"]
    assert found.numbers["change"] == 0


@pytest.mark.parametrize(
    ("module", "name", "where"),
    [
        (Apply(lambda x: x.softmax(0)), "leak", "2"),
        (nn.BatchNorm1d(32), "", None),
        (nn.BatchNorm1d(32, track_running_stats=False), "", "2"),
        (nn.Identity(), "", None),
    ],
    ids=["softmax over the batch", "batchnorm", "batchnorm without statistics", "none"],
)
def test_outputs_that_depend_on_other_samples_are_traced_to_a_module(module, name, where):
    model = mlp(module)
    found = check_samples(Copies(model, None, None), open_task(model, blobs(), None), 0, nothing)
    assert [shown for shown, _ in found.shows] == [name] * bool(name)
    assert found.numbers["module"] == where


def test_the_loss_is_compared_with_guessing_and_a_second_softmax_is_seen():
    x, y = blobs()
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    found = resdiag.examine(zero, (x, y), lr=0.1, steps=2)["guessing"]
    assert found.numbers["loss"] == pytest.approx(math.log(3))
    assert found.numbers["best_constant"] == pytest.approx(math.log(3))  # as many of each class
    twice = resdiag.examine(mlp(nn.Linear(32, 32)).append(nn.Softmax(1)), (x, y), lr=0.1, steps=2)
    assert "softmax_twice" in twice.shown
    large = copy.deepcopy(zero)
    nn.init.normal_(large.weight, std=100)
    assert "worse_than_guessing" in resdiag.examine(large, (x, y), lr=1e-3, steps=2).shown


def test_the_best_constant_is_the_entropy_of_the_labels_or_the_variance():
    y = torch.tensor([0, 0, 0, 1])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert best_constant(y, 3, "") == pytest.approx(entropy)
    z = torch.tensor([1.0, 3.0])
    assert best_constant(z, 0, "mean square error") == pytest.approx(1.0)
    assert math.isnan(best_constant(z, 0, "my_loss"))


# -- learning ------------------------------------------------------------------------------------


def test_a_rate_that_is_far_too_low_is_told_from_a_network_that_cannot_learn():
    torch.manual_seed(0)
    model = mlp()
    low = resdiag.examine(model, blobs(), optimizer=sgd_of(model, 1e-6))
    assert list(low.shown) == ["rate_too_low"]
    assert {"network_and_loss", "gradient", "ignores_input", "leak"} <= set(low.ruled_out)
    best = low["rates"].numbers["fastest"]
    assert 0.01 <= best <= 10
    right = resdiag.examine(model, blobs(), optimizer=sgd_of(model, best))
    assert not right.shown
    assert {"network_and_loss", "rate"} <= set(right.ruled_out)
    high = resdiag.examine(model, blobs(), optimizer=sgd_of(model, 1e5))
    assert list(high.shown) == ["rate_too_high"]


def test_a_network_that_cannot_learn_one_batch_is_at_fault():
    model = mlp(Apply(lambda x: x * 0.0))
    found = resdiag.examine(model, blobs(), optimizer=sgd_of(model), steps=20)
    assert list(found.shown) == ["ignores_input", "cannot_learn"]
    assert found["one_batch"].numbers["outcome"] == "stays"
    assert "not learned at all" in found["shuffled_labels"].text


def test_labels_that_belong_to_the_inputs_cost_less_than_shuffled_ones():
    torch.manual_seed(0)
    x, y = blobs(n=48)
    x = torch.cat([x, torch.randn(48, 60)], 1)  # enough to tell the samples of a class apart
    model = mlp(width=64)
    fits = resdiag.examine(model, (x, y), optimizer=sgd_of(model, 0.3))
    assert "labels" in fits.ruled_out
    assert fits["shuffled_labels"].numbers["neighbours"]["p"] == pytest.approx(1e-3)
    own, other = (fits["shuffled_labels"].numbers[name]["steps"] for name in ("own", "shuffled"))
    assert own < other
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    shuffled = resdiag.examine(model, (x, y[order]), optimizer=sgd_of(model, 0.3))
    assert "labels" not in shuffled.ruled_out
    assert shuffled["shuffled_labels"].numbers["neighbours"]["p"] > 0.01
    assert "labels" in [one.name for one in shuffled.conclusions if one.kind == "open"]


def test_the_test_of_neighbours_is_exact_for_pairs():
    """Each sample beside one other: agreement is the share of pairs with one label."""
    x = torch.tensor([[0.0], [0.1], [10.0], [10.1], [20.0], [20.1], [30.0], [30.1]])
    y = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0])
    found = compare_neighbours(open_task(nn.Linear(1, 2), (x, y), None), 0)
    assert found.agreement == 0.75
    # 5 of 8 labels are 0: two samples agree with probability (5 4 + 3 2) / (8 7)
    assert found.expected == pytest.approx(26 / 56, abs=0.02)
    # 3 of 4 pairs agree only if one pair is mixed: 4 x 2 x 3 of 56 placements of the three ones
    assert found.p == pytest.approx(24 / 56, abs=0.05)


def test_a_last_layer_of_zeros_is_no_network_that_ignores_its_input():
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    found = check_inputs(Copies(model, None, None), open_task(model, blobs(), None), 0, nothing)
    assert found.numbers["change"] == 0
    assert not found.shows
    assert [name for name, _ in found.open] == ["ignores_input_here"]


@pytest.mark.parametrize("rate", [1e-3, 1e-4])
def test_a_usual_rate_that_is_slow_on_one_batch_is_no_fault(rate):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    found = resdiag.examine(model, (torch.randn(24, 4), Y), optimizer=optimizer)
    assert not found.shown
    assert "rate_slow" in [one.name for one in found.conclusions]


def test_an_optimizer_of_another_model_and_one_without_some_parameters_are_named():
    model = mlp()
    other = copy.deepcopy(model)
    found = resdiag.examine(model, blobs(), optimizer=sgd_of(other), steps=12)
    assert "optimizer_of_another_model" in found.shown
    part = torch.optim.SGD(model[0].parameters(), lr=0.3)
    found = resdiag.examine(model, blobs(), optimizer=part, steps=12)
    assert found["optimizer"].numbers["missing"] == ["2.weight", "2.bias"]


def test_a_loss_that_is_not_finite_is_said_and_nothing_is_trained():
    x, y = blobs()
    found = resdiag.examine(mlp(), (x * math.nan, y), lr=0.1)
    assert list(found.shown) == ["loss_not_finite"]
    assert found["guessing"].numbers == {"loss": pytest.approx(math.nan, nan_ok=True)}


def test_a_loss_without_a_graph_is_a_fault_and_not_an_error():
    found = resdiag.examine(mlp(), blobs(), loss=lambda out, y: F.cross_entropy(out.detach(), y))
    assert list(found.shown) == ["no_gradient"]
    assert "no graph" in found["one_batch"].reason


# -- forms of models, batches and losses ---------------------------------------------------------


class LikeHuggingFace(nn.Module):
    """Returns its loss where it is given labels."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, input_ids=None, labels=None):
        logits = self.head(self.embed(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class LikeNanoGpt(LikeHuggingFace):
    def forward(self, idx, targets=None):
        logits = self.head(self.embed(idx))
        if targets is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left, right):
        return self.layer(left * right)


TOKENS = torch.arange(24).reshape(4, 6) % 7
X, Y = blobs()


@pytest.mark.parametrize(
    ("make", "batch", "loss", "name"),
    [
        (LikeHuggingFace, {"input_ids": TOKENS, "labels": TOKENS}, None, "own loss"),
        (LikeNanoGpt, (TOKENS, TOKENS.roll(1, 1)), None, "own loss"),
        (TwoInputs, {"left": X, "right": X, "labels": Y}, None, "cross-entropy of 3"),
        (TwoInputs, (X, X, Y), None, "cross-entropy of 3"),
        (TwoInputs, ((X, X), Y), F.cross_entropy, "cross_entropy"),
        (TwoInputs, ({"left": X, "right": X}, Y), nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (mlp, [X, Y], lambda out, y: F.cross_entropy(out, y), "the loss given"),
        (mlp, [X, Y], lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), "given"),
        (mlp, X, lambda out: out.square().mean(), "the loss given"),
        (mlp, (X, X[:, :3]), None, "mean square error"),
        (lambda: nn.Linear(4, 1), (X, X[:, 0]), None, "mean square error"),
        (lambda: nn.Linear(4, 1), (X, (Y > 0).long()), None, "one logit"),
    ],
)
def test_models_batches_and_losses_of_many_forms(make, batch, loss, name):
    torch.manual_seed(0)
    found = resdiag.examine(make(), batch, loss, lr=0.1, steps=12)
    assert name in found.loss
    assert found["gradients"].numbers["error"] < 1e-3
    assert len(found["rates"].numbers["rates"]) > 2
    json.dumps(found.to_dict(), allow_nan=False)
    assert max(map(len, str(found).splitlines())) <= 100
    assert repr(found).startswith("<Examination of ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_trained_in_it_and_checked_in_float64(dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    found = resdiag.examine(model, (X.to(dtype), Y), optimizer=sgd_of(model, 0.3))
    assert found["gradients"].numbers["precision"] == "float64"
    assert found["one_batch"].numbers["outcome"] == "memorised"


def test_updates_below_the_rounding_of_bfloat16_are_told_from_a_fault_of_the_network():
    torch.manual_seed(0)
    model = mlp().bfloat16()
    found = resdiag.examine(model, (X.bfloat16(), Y), optimizer=sgd_of(model, 1e-5))
    assert "rate_too_low" in found.shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 3}, "a batch is"),
        ({"batch": (X[:, :2], Y)}, "does not run on this batch"),
        ({"batch": (X,)}, "no target"),
        ({"batch": (X, Y + 7)}, "label 9, the output 3 classes"),
        ({"batch": (X, Y[:5])}, "no cross-entropy"),
        ({"loss": "mse"}, "must be a function, not str"),
        ({"loss": lambda out, y: out}, "one floating number, not float32 24x3"),
        ({"loss": lambda model, batch: torch.zeros(())}, "does not call the model"),
        ({"optimizer": "adam"}, "not str"),
        ({"lr": 0.0}, "must be positive"),
        ({"steps": 0}, "steps must be"),
        ({"model": nn.LazyLinear(3)}, "run it once"),
        ({"model": mlp(Apply(lambda x: torch.sigmoid(x).mul_(2)))}, "the backward pass fails"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "every parameter is frozen"),
        ({"model": print}, "a model is a torch.nn.Module"),
    ],
)
def test_mistakes_are_one_line(changes, words):
    given = {"model": nn.Linear(4, 3), "batch": (X, Y), "steps": 4, **changes}
    with pytest.raises(UsageError) as caught:
        resdiag.examine(**given)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


# -- it changes nothing --------------------------------------------------------------------------


class Shared(nn.Module):
    """BatchNorm, dropout, one layer used twice, a frozen one, and one in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 16), nn.BatchNorm1d(16)
        self.twice, self.drop = nn.Linear(16, 16), nn.Dropout(0.2)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.still = nn.BatchNorm1d(16).eval()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.first(x))))
        x = self.twice(torch.relu(self.twice(x)))
        return self.head(self.still(self.frozen(x)))


class NotCopied(Shared):
    """Has a lock, so it cannot be copied, and an attribute that a pass changes."""

    def __init__(self):
        super().__init__()
        self.lock, self.passes = threading.Lock(), 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def state_of(model, optimizer):
    """Everything that must stay, as bytes and objects."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    return {
        "tensors": {k: x.detach().numpy().tobytes() for k, x in tensors.items()},
        "objects": {k: id(x) for k, x in tensors.items()},
        "grads": {k: None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes())
                  for k, p in model.named_parameters()},
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "passes": getattr(model, "passes", None),
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "optimizer": repr(optimizer.state_dict()),
        "random": (random_states[0].numpy().tobytes(), *random_states[1:]),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize("make", [Shared, NotCopied, mlp], ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("training", [True, False])
def test_model_optimizer_and_random_state_stay_bit_for_bit(make, how, training):
    model = make()
    optimizer = how([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if how is torch.optim.SGD:
        optimizer.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model.train(training)
    before, given = state_of(model, optimizer), X.clone()
    found = resdiag.examine(model, (X, Y), optimizer=optimizer, steps=8)
    assert state_of(model, optimizer) == before
    assert torch.equal(X, given)
    assert any("cannot be copied" in note for note in found.notes) == (make is NotCopied)
    assert any("eval mode" in note for note in found.notes) == (not training)


def test_a_failure_in_the_middle_leaves_everything_as_it_was():
    model, calls = NotCopied(), []
    model(X)

    def fails_later(out, y):
        calls.append(1)
        if len(calls) > 9:
            raise RuntimeError("enough")
        return F.cross_entropy(out, y)

    optimizer = sgd_of(model)
    before = state_of(model, optimizer)
    with pytest.raises(UsageError, match="enough"):
        resdiag.examine(model, (X, Y), fails_later, optimizer=optimizer)
    assert state_of(model, optimizer) == before


def test_the_same_seed_gives_the_same_numbers():
    model = Shared()
    first, second = (resdiag.examine(model, (X, Y), lr=0.1, steps=6, seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_a_monitor_sees_nothing_of_it():
    def train(look):
        torch.manual_seed(0)
        model = Net()
        optimizer = sgd_of(model)
        x, y = data()
        with resdiag.attach(model, optimizer=optimizer) as monitor:
            for step in range(3):
                if look and step == 1:
                    resdiag.examine(model, (x, y), optimizer=optimizer, steps=4)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                monitor.step(loss)
            return monitor.to_frame(), monitor.warnings

    (with_look, said), (without, unsaid) = train(True), train(False)
    assert said == unsaid
    assert with_look.equals(without)


def test_a_loss_that_reaches_the_original_by_a_closure_leaves_no_gradient_there():
    model = mlp()

    def decayed(out, y):
        return F.cross_entropy(out, y) + sum(p.square().sum() for p in model.parameters())

    resdiag.examine(model, (X, Y), decayed, lr=0.1, steps=4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rate", [1e-6, 0.1])
def test_resnet_20_at_a_hundred_thousandth_of_its_rate(rate):
    from tiny_training import tiny_data

    from resdiag.data.augment import Augmenter

    model = resdiag.build_model("original", 20, width=0.25, seed=0)
    batch = Augmenter(tiny_data(), 16, 0, augment=False).batch(0)
    optimizer = sgd_of(model, rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    found = resdiag.examine(model, batch, optimizer=optimizer, steps=40)
    assert list(found.shown) == (["rate_too_low"] if rate < 0.1 else [])
    assert {"network_and_loss", "gradient", "ignores_input", "leak"} <= set(found.ruled_out)
    if rate < 0.1:
        assert found["rates"].numbers["factor"] >= 1e3


def test_plain_sgd_is_what_a_rate_alone_means():
    model = mlp()
    found = resdiag.examine(model, (X, Y), lr=0.3, steps=8)
    by_hand = resdiag.examine(model, (X, Y), optimizer=sgd_of(model, 0.3), steps=8)
    assert found["rates"].numbers == by_hand["rates"].numbers
    assert sgd(0.3)(model, None).param_groups[0]["momentum"] == 0


def test_an_optimizer_that_needs_a_closure_and_one_that_cannot_be_copied():
    torch.manual_seed(0)
    model = mlp()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    found = resdiag.examine(model, (X, Y), optimizer=lbfgs, steps=20)
    assert found["one_batch"].numbers["outcome"] == "memorised"

    class Wrapped(torch.optim.SGD):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.inner = threading.Lock()

        def step(self, closure=None):
            return self.inner, super().step(closure)

    with pytest.raises(UsageError, match="a copy of Wrapped cannot step: AttributeError") as caught:
        resdiag.examine(model, (X, Y), optimizer=Wrapped(model.parameters(), lr=0.1))
    assert caught.value.hint == "pass lr= instead of optimizer="


def test_a_progress_bar_is_shown_where_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    resdiag.examine(mlp(), (X, Y), lr=0.1, steps=2)
    assert capsys.readouterr().err == ""
    resdiag.examine(mlp(), (X, Y), lr=0.1, steps=2, progress=True)
    captured = capsys.readouterr()
    assert "passes" in captured.err
    assert captured.out == ""


def test_an_output_that_hardly_depends_on_the_input_is_a_fault_unless_the_batch_is_memorised():
    class Faint(nn.Module):
        def __init__(self, *, learns):
            super().__init__()
            self.net, self.bias = mlp(), nn.Parameter(torch.ones(3))
            self.gain = nn.Parameter(torch.tensor(1e-4), requires_grad=learns)

        def forward(self, x):
            return self.bias + self.gain * self.net(x)

    torch.manual_seed(0)
    stuck = resdiag.examine(Faint(learns=False), (X, Y), lr=0.1, steps=20)
    assert {"hardly_uses_input", "cannot_learn"} <= set(stuck.shown)
    model = Faint(learns=True)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    learned = resdiag.examine(model, (X, Y), optimizer=adam)
    assert learned["one_batch"].numbers["outcome"] == "memorised"
    assert "hardly_uses_input" not in learned.shown
    assert "hardly_uses_input" in [one.name for one in learned.conclusions]
