"""What a batch shows of the data: moments of the input, labels and loss read off the logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import resdiag
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure.model_ends import Logits, describe_input

CELL = {"max_examples": 40, "deadline": None}


def read(loss_of, logits):
    """What `Logits.read` makes of the gradient of a loss of the logits."""
    kept = Logits(logits)
    (g,) = torch.autograd.grad(loss_of(logits), logits)
    return kept.read(g).tolist()


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
    mean, std, broken = describe_input([whole, x]).tolist()
    assert (mean, std, broken) == pytest.approx((x.mean().item(), x.std().item(), 0), rel=1e-5)
    x[0, 0, 0, :3] = math.nan
    assert describe_input([x])[2].item() == pytest.approx(3 / x.numel())
    assert describe_input([whole, torch.ones(3)]) is None


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
    assert (verdict.name, verdict.step) == ("exploded", 1)
    folder = resdiag.save(monitor, tmp_path / "run")
    assert resdiag.load_run(folder).status == "diverged"
    assert np.isnan(resdiag.load_run(folder).curve().loss.iloc[-1])


def test_a_loss_of_several_numbers_is_refused():
    with (
        attach(build_model("elu", 8, width=0.25, seed=0)) as monitor,
        pytest.raises(ValueError, match="takes one number, not a tensor of shape"),
    ):
        monitor.step(loss=torch.ones(2))
