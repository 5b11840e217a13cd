"""Findings are told as they arise, displays are shown, and the training stays the same."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

import resdiag
from resdiag.live import follow
from resdiag.live.follow import Follower
from resdiag.watch.loop.attach import WatchWarning


def train(steps, *, rate=0.1, variant="elu_pre", stop=None, **options):
    """A small network on random labels; returns monitor and model."""
    torch.manual_seed(0)
    model = resdiag.build_model(variant, 20, seed=0, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with resdiag.attach(model, optimizer, **options) as monitor:
        for step in range(steps):
            x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if stop is not None:
                stop.append(step)
            monitor.step(loss)
    return monitor, model


def test_each_finding_is_told_once_and_all_of_the_last_verdict_are():
    told = []
    monitor, _ = train(12, rate=3.0, on_finding=told.append)
    names = [(finding.name, finding.cause) for finding in told]
    assert len(names) == len(set(names))
    final = resdiag.judge(monitor)
    assert final.is_named
    assert {(finding.name, finding.cause) for finding in final.findings} <= set(names)


def test_following_changes_no_bit_of_the_training():
    _, plain = train(6)
    _, followed = train(6, on_finding=lambda finding: None)
    for p, q in zip(plain.parameters(), followed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_stop_raises_at_the_first_fault_and_removes_every_hook():
    seen = []
    with pytest.raises(resdiag.StopTraining, match=r"^\w+: ") as stopped:
        train(50, rate=3.0, stop=seen, on_finding="stop")
    assert len(seen) < 10
    row = resdiag.FINDINGS[stopped.value.finding.name]
    assert not row.is_condition


def test_stop_lets_a_training_with_no_fault_go_on():
    seen = []
    train(8, rate=1e-3, variant="elu", stop=seen, on_finding="stop")
    assert len(seen) == 8


def test_warn_points_at_the_loop():
    with pytest.warns(WatchWarning) as caught:
        train(6, rate=3.0, on_finding="warn")
    assert any("lr_too_high" in str(warning.message) for warning in caught)
    assert {warning.filename for warning in caught} == {__file__}


def test_what_a_callback_raises_ends_the_training():
    class MyStop(Exception):
        pass

    def refuse(finding):
        raise MyStop(finding.name)

    with pytest.raises(MyStop):
        train(20, rate=3.0, on_finding=refuse)


def test_steps_that_are_not_recorded_are_not_followed():
    calls = []
    model = torch.nn.Linear(2, 2)
    with resdiag.attach(model, every=4) as monitor:
        monitor.add_follower(lambda: calls.append(monitor.metadata["steps"]))
        for _ in range(9):
            model(torch.ones(1, 2)).sum().backward()
            monitor.step()
    assert calls == [1, 5, 9]


def test_judged_are_the_first_32_records_and_then_each_sixteenth_more(monkeypatch):
    judged, follower = [], None

    def judge(monitor):
        judged.append(follower.recorded)
        return SimpleNamespace(findings=())

    monkeypatch.setattr(follow, "judge", judge)
    follower = Follower(None)
    for _ in range(1000):
        follower()
    expected, last = [], 0
    for count in range(1, 1001):
        if count <= 32 or 16 * count >= 17 * last:
            expected.append(count)
            last = count
    assert judged == expected
    assert len(judged) < 32 + 16 * math.log(1000 / 32) * 1.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"live": "htp"}, "unknown display 'htp'; did you mean 'http'"),
        ({"on_finding": "stopp"}, "unknown action 'stopp'; did you mean 'stop'"),
    ],
)
def test_unknown_displays_and_actions_are_refused_and_leave_no_hook(options, words):
    model = resdiag.build_model("elu", 8, seed=0)
    with pytest.raises(ValueError, match=words):
        resdiag.attach(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_display_that_fails_is_taken_away_and_the_training_goes_on(monkeypatch):
    class Broken:
        def show(self, snapshot, run):
            raise OSError("no screen")

        def close(self):
            raise AssertionError("it is gone")

    monkeypatch.setattr("resdiag.live.panel.open_panel", Broken)
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(3, stop=seen, live=True)
    assert seen == [0, 1, 2]
    assert [str(w.message) for w in caught if "no screen" in str(w.message)] == [
        "resdiag: the display failed: OSError('no screen')"
    ]
