"""What a batch shows of the data: moments of the input, labels and loss read off the logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resdiag
from resdiag.catalog.table import HEAD_LOSS
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure.model_ends import Logits, describe_input

CELL = {"max_examples": 40, "deadline": None}


def read(loss_of, logits, tokens=None):
    """What `Logits.read` makes of the gradient of a loss of the logits: loss and share."""
    return list(read_all(loss_of, logits, tokens).values())[:2]


def read_all(loss_of, logits, tokens=None):
    """The same, every column by its name."""
    kept = Logits(logits, tokens)
    (g,) = torch.autograd.grad(loss_of(logits), logits)
    return dict(zip(HEAD_LOSS, kept.read(g).tolist(), strict=True))


@settings(**CELL)
@given(st.integers(3, 12), st.integers(8, 40), st.floats(0.01, 8.0), st.integers(0, 1000))
def test_a_cross_entropy_that_is_maximised_is_read_with_its_sign(k, n, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(n, k)).requires_grad_()
    labels = torch.randint(0, k, (n,))
    expected = -F.cross_entropy(logits, labels).item()
    assert read(lambda z: -F.cross_entropy(z, labels), logits)[0] == pytest.approx(
        expected, rel=1e-3, abs=1e-4
    )


@settings(**CELL)
@given(st.integers(2, 12), st.integers(8, 40), st.floats(0.01, 8.0), st.integers(0, 1000))
def test_the_loss_and_the_labels_of_a_cross_entropy_are_read_off_its_gradient(k, n, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(n, k)).requires_grad_()
    labels = torch.randint(0, k, (n,))
    expected = F.cross_entropy(logits, labels).item()
    share = labels.bincount().max().item() / n
    for loss in (
        lambda z: F.cross_entropy(z, labels),
        lambda z: 65536 * F.cross_entropy(z, labels),  # a loss scale
        lambda z: F.cross_entropy(z, labels, reduction="sum"),
        lambda z: F.nll_loss(F.log_softmax(z, 1), labels),
    ):
        assert read(loss, logits) == pytest.approx([expected, share], rel=1e-3, abs=1e-4)


def test_ignored_labels_do_not_count_and_weights_of_classes_do_not_matter():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 10, 7, requires_grad=True), torch.randint(0, 7, (4, 10))
    labels[:, 7:] = -100
    rows, left = logits.reshape(-1, 7), labels.reshape(-1)
    kept = left >= 0
    expected = F.cross_entropy(rows[kept], left[kept]).item()
    share = left[kept].bincount().max().item() / kept.sum().item()
    found = read(lambda z: F.cross_entropy(z.transpose(1, 2), labels), logits)
    assert found == pytest.approx([expected, share], rel=1e-4)
    weights = torch.linspace(0.2, 3, 7)
    found = read(lambda z: F.cross_entropy(z.transpose(1, 2), labels, weight=weights), logits)
    assert found == pytest.approx([expected, share], rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z - torch.eye(10)[:, :7]).square().mean(),
        lambda z: z.square().sum(),
        lambda z: F.binary_cross_entropy_with_logits(z, torch.eye(10)[:, :7]),
        lambda z: F.kl_div(z.log_softmax(1), torch.full((10, 7), 1 / 7), reduction="batchmean"),
    ],
)
def test_other_losses_are_not_mistaken_for_a_cross_entropy(loss):
    torch.manual_seed(0)
    assert all(map(math.isnan, read(loss, torch.randn(10, 7, requires_grad=True))))


@settings(**CELL)
@given(st.integers(2, 12), st.integers(8, 40), st.floats(0.01, 8.0), st.integers(0, 1000))
def test_the_factor_on_a_mean_cross_entropy_is_read_off(k, n, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(n, k)).requires_grad_()
    labels = torch.randint(0, k, (n,))
    labels[0] = -100
    for factor, loss in (
        (1, lambda z: F.cross_entropy(z, labels)),
        (n - 1, lambda z: F.cross_entropy(z, labels, reduction="sum")),
        (0.25, lambda z: F.cross_entropy(z, labels) / 4),  # four batches are added up
    ):
        found = read_all(loss, logits)
        assert found["head_factor"] == pytest.approx(factor, rel=1e-3)
        assert found["rows_ignored"] == pytest.approx(1 / n)
        assert found["softmax_twice"] == 0
        assert math.isnan(found["label_copies"])


@settings(**CELL)
@given(st.integers(3, 12), st.integers(8, 40), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_a_cross_entropy_of_probabilities_is_told_from_one_of_logits(k, n, scale, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(n, k, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, k, (n,))
    found = read_all(lambda z: F.cross_entropy(z.softmax(1), labels), logits)
    assert found["softmax_twice"] >= 0.8
    # a log-softmax of a log-softmax is the same, and no fault
    found = read_all(lambda z: F.cross_entropy(z.log_softmax(1), labels), logits)
    assert found["softmax_twice"] == 0


def test_labels_that_are_the_tokens_of_their_places_are_counted():
    torch.manual_seed(0)
    logits, tokens = torch.randn(4, 8, 20, requires_grad=True), torch.randint(20, (4, 8))
    same = read_all(lambda z: F.cross_entropy(z.flatten(0, 1), tokens.flatten()), logits, tokens)
    assert same["label_copies"] == 1
    shifted = tokens.roll(-1, 1)
    expected = (shifted == tokens).float().mean().item()
    found = read_all(lambda z: F.cross_entropy(z.flatten(0, 1), shifted.flatten()), logits, tokens)
    assert found["label_copies"] == pytest.approx(expected)


def test_rows_without_a_label_have_no_gradient():
    logits, labels = torch.randn(8, 5, requires_grad=True), torch.full((8,), -100)
    found = read_all(lambda z: F.cross_entropy(z, labels, reduction="sum"), logits)
    assert found["rows_ignored"] == 1
    assert math.isnan(found["head_loss"])


@pytest.mark.parametrize(("layer", "name"), [(nn.Softmax(1), "softmax"), (nn.ReLU(), "relu")])
def test_a_cross_entropy_of_an_activated_output_is_read_at_the_output(layer, name):
    torch.manual_seed(0)
    model = nn.Sequential(build_model("elu", 8, width=0.25, seed=0), layer)
    told = []
    with attach(model) as monitor:
        for _ in range(3):
            loss = F.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.randint(10, (16,)))
            loss.backward()
            monitor.step(loss)
            told.append(loss.item())
    assert monitor.to_frame("step").output_loss.tolist() == pytest.approx(told, rel=1e-4)
    assert monitor.inventory["activation"] == name


def test_gradients_that_are_left_are_measured_before_the_backward_pass():
    model = build_model("elu", 8, width=0.25, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    early = list(model.stages[0].parameters())  # of the first block: one of them is looked at
    left = []
    with attach(model, optimizer=optimizer) as monitor:
        for step in range(4):
            if step == 2:
                optimizer.zero_grad()
            left.append([0.0 if p.grad is None else float(p.grad.norm()) for p in early])
            F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
            optimizer.step()
            monitor.step()
    kept = monitor.to_frame("step").grad_kept.tolist()
    assert any(kept == pytest.approx(one, rel=1e-5) for one in zip(*left, strict=True))
    assert kept[0] == kept[2] == 0 < min(kept[1], kept[3])


def test_the_share_of_a_few_rows_says_nothing():
    logits, labels = torch.randn(7, 10, requires_grad=True), torch.zeros(7, dtype=torch.long)
    loss, share = read(lambda z: F.cross_entropy(z, labels), logits)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert math.isnan(share)


def test_logits_that_were_overwritten_are_not_read():
    logits = torch.randn(8, 3, requires_grad=True) * 1
    kept = Logits(logits)
    logits.add_(1)
    assert kept.read(torch.ones(8, 3)) is None


def test_moments_of_the_first_floating_input():
    x = 3 + 2 * torch.randn(8, 3, 16, 16)
    whole = torch.zeros(4, 4, dtype=torch.long)
    mean, std, broken, between = describe_input([whole, x]).tolist()
    assert (mean, std, broken) == pytest.approx((x.mean().item(), x.std().item(), 0), rel=1e-5)
    assert between == pytest.approx(
        (x.var(0, correction=0).mean().sqrt() / x.std()).item(), rel=1e-5
    )
    assert describe_input([x[:1].expand_as(x)])[3] < 1e-6
    x[0, 0, 0, :3] = math.nan
    assert describe_input([x])[2].item() == pytest.approx(3 / x.numel())
    assert describe_input([torch.ones(3)]) is None


def test_of_token_ids_the_share_that_differ_between_samples():
    same = torch.ones(4, 6, dtype=torch.long)
    assert describe_input([same])[3] == 0
    ids = torch.tensor([[1, 2], [1, 3], [1, 2]])
    assert describe_input([same, ids])[3].item() == pytest.approx(1 / 4)
    assert describe_input([ids])[:3].isnan().all()


def test_a_monitor_records_the_batch_and_the_told_losses_of_every_step():
    model = build_model("elu", 8, width=0.25, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    told, shares = [], []
    with attach(model, optimizer=optimizer, every=2) as monitor:
        for step in range(5):
            torch.manual_seed(step)
            images, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss if step % 2 else loss.item())
            told.append(loss.item())
            shares.append(labels.bincount().max().item() / 16)
    frame = monitor.to_frame("step")
    assert frame.step.tolist() == [0, 1, 2, 3, 4]
    assert frame.loss.tolist() == pytest.approx(told)
    recorded = frame[frame.step % 2 == 0]
    assert recorded.head_loss.tolist() == pytest.approx(told[::2], rel=1e-4)
    assert recorded.label_share.tolist() == pytest.approx(shares[::2])
    assert (recorded.momentum == 0.9).all()
    assert (recorded.weight_decay == 1e-4).all()
    assert recorded.data_std.between(0.9, 1.1).all()
    assert frame.head_loss.isna().tolist() == [False, True, False, True, False]
    assert monitor.metadata["classes"] == 10
    assert not monitor.has_nonfinite_loss


def test_a_told_loss_that_is_not_finite_is_a_lost_run(tmp_path):
    model = build_model("elu", 8, width=0.25, seed=0)
    with attach(model) as monitor:
        for loss in (2.0, math.nan):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            monitor.step(loss=loss)
    verdict = resdiag.judge(monitor)
    assert (verdict.name, verdict.cause, verdict.step) == (
        "loss_fault", "the loss is not finite", 1,
    )  # fmt: skip
    folder = resdiag.save(monitor, tmp_path / "run")
    assert resdiag.load_run(folder).status == "diverged"
    assert np.isnan(resdiag.load_run(folder).curve().loss.iloc[-1])


def test_a_loss_of_several_numbers_is_refused():
    with (
        attach(build_model("elu", 8, width=0.25, seed=0)) as monitor,
        pytest.raises(ValueError, match="takes one number, not a tensor of shape"),
    ):
        monitor.step(loss=torch.ones(2))
