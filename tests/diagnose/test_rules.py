"""Every built-in rule keeps its promises, and rules from outside are applied like them."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from finding_conformance import FindingConformance
from judged_runs import inventory_of, plant, run_of

import resdiag
from resdiag.diagnose.registry import FINDINGS, register_finding, unregister_finding
from resdiag.diagnose.verdict import judge

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "extend-finding.md"


def cell(metric, value, **where):
    """A foreign run with one value of the block table changed."""
    return run_of(lambda change, curve: change(metric, value, **where))


def curve(steps=20, **columns):
    """A foreign run with columns of the step table changed."""

    def change(cell, frame):
        for name, value in columns.items():
            frame[name] = value

    return run_of(change, steps=steps)


def ours(variant="elu", steps=30, lr=0.01, **columns):
    """A run of a variant with columns of its tables changed."""

    def change(metrics, frame):
        for name, value in columns.items():
            (frame if name in frame or name == "epoch" else metrics)[name] = value

    return plant(variant, steps=steps, lr=lr, change=change)


def rows_of(**fields):
    """The blocks of a foreign run, each with fields changed."""
    return [{**row, **fields} for row in run_of().blocks]


def with_shift(size):
    def shift(cell, frame):
        cell("output_channel_mean_rms", size, block=slice(3, 5))
        for site in ("input", "shortcut"):
            cell(f"{site}_channel_mean_rms", size, block=slice(4, 5))

    return run_of(shift)


def drifting(size):
    def move(cell, frame):
        cell("output_channel_mean_rms", size, step=19)
        cell("branch_mean", 0.5, step=19)

    return run_of(move)


def overflowing(size):
    def overflow(cell, frame):
        cell("output_channel_std", size, step=slice(5, 7))
        cell("sum_nonfinite", 0.1, step=7, block=2)

    return run_of(overflow, blocks=rows_of(dtype="float16"), status="diverged")


def scaled(factor):
    def scale(cell, frame):
        cell("shortcut_channel_std", factor, block=3)
        cell("shortcut_channel_mean_rms", 0.1 * factor, block=3)
        for q, value in ((10, -0.1), (50, 0.02), (90, 0.15)):
            cell(f"shortcut_mean_q{q}", factor * value, block=3)

    return run_of(scale)


def detached(gradient):
    def detach(cell, frame):
        cell("shortcut_share", 1.0, block=2)
        cell("grad_param", gradient, block=2)

    return run_of(detach)


def lacking(branch):
    blocks = run_of().blocks
    blocks[3] = {**blocks[3], "branch": branch}
    return run_of(blocks=blocks)


def worsening(size):
    def worsen(cell, frame):
        frame["loss"] = np.linspace(2.3, 12.5, len(frame))
        cell("update_ratio", size)

    return run_of(worsen)


def still(size):
    def stand(cell, frame):
        frame["loss"], frame["weight_decay"] = 2.9, 0.0
        cell("update_ratio", size)

    return run_of(stand)


def saturated(share):
    def saturate(cell, frame):
        cell("saturated_fraction", share, block=2)

    return run_of(saturate, blocks=rows_of(branch=["linear", "tanh", "linear"]))


def evaluated(end):
    """Test losses that fall to 1.0 and end at `end`."""
    test = np.full(120, math.nan)
    train = test.copy()
    test[9::10] = [2.0, 1.5, 1.0, *[end] * 9]
    train[9::10] = [2.0, 1.0, 0.5, *[0.01] * 9]
    return curve(120, test_loss=test, train_loss=train)


def taken(**parts):
    """A run whose inventory has these parts."""
    return run_of(inventory=inventory_of(**parts))


def unheld(count):
    about = inventory_of()["parameters"] | {"unheld": count, "names": ["b0.weight"] * count}
    return taken(parameters=about)


def trained_in_eval(count):
    events = {"update_in_evaluation": {"count": count, "first": 3, "last": 2 + count}}
    return taken(events=events if count else {})


def kept(steps):
    """Gradients of the step before are there in the last `steps` steps."""
    return curve(grad_kept=[0.0] * (20 - steps) + [0.5] * steps)


def rate_of_nothing(steps):
    return curve(lr=[0.1] * (20 - steps) + [0.0] * steps)


def skipping(steps):
    def skip(cell, frame):
        frame["lr"] = [0.1] * (20 - steps) + [math.nan] * steps
        frame["grad_norm"] = [1.0] * (20 - steps) + [math.inf] * steps

    return run_of(skip)


def grouped(ratio):
    one = inventory_of()["groups"][0]
    other = one | {"lr": 0.1 * ratio, "highest": 0.1 * ratio, "size": 10, "blocks": [2]}
    return taken(groups=[one, other])


def without_gradient(value):
    def cut(cell, frame):
        for block in range(3):
            cell("grad_param", value, block=block)
            cell("grad_output", value, block=block)

    return run_of(cut, inventory=inventory_of(trainable=[1.0] * 6))


def normalising(eps):
    norms = inventory_of()["normalisations"]
    return taken(normalisations=[norms[0] | {"eps": eps, "variance": 2.0}, *norms[1:]])


def attending(entropy):
    one = {"name": "b1.attention", "block": 1, "entropy": entropy, "spread": 9.0}
    return taken(attentions=[one], later_attentions=[one])


def growing(end):
    """Attention logits of block 2 that grow steadily from 2 to `end`."""

    def grow(cell, frame):
        for step in range(20):
            cell("attention_logit", 2 * (end / 2) ** (step / 19), step=step, block=2)
            cell("attention_logit_head", 3.0, step=step, block=2)

    return run_of(grow)


def routing(evenness):
    """The load of block 4 becomes as uneven at step 6."""

    def collapse(cell, frame):
        cell("expert_entropy", 0.9, block=4)
        cell("expert_entropy", evenness, step=slice(6, None), block=4)
        cell("expert_tokens", 64.0, block=4)
        cell("expert_busiest", 1.0, block=4)
        cell("expert_load", 0.5, block=4)
        cell("expert_dead", 0.25, block=4)

    return run_of(collapse)


def remembering(jump):
    def remember(cell, frame):
        cell("moment_second", 0.01)
        cell("moment_second", 0.01 * jump, step=slice(8, None))
        cell("moment_mismatch", 1.0)
        cell("moment_mismatch", 0.1, step=slice(9, None))

    return run_of(remember)


def norms(jump):
    values = np.full(30, 2.0)
    values[9] = 2.0 * jump
    return ours(grad_norm=values)


_CUT = "no gradient leads from the shortcut back to the block's input"
LN10 = math.log(10)
CASES = {
    "optimizer_mismatch": lambda: (unheld(1), unheld(0)),
    "eval_mode": lambda: (trained_in_eval(1), trained_in_eval(0)),
    "data_fault": lambda: (curve(data_std=20.1), curve(data_std=19.9)),
    "loss_fault": lambda: (curve(head_loss=-2.3), curve(head_loss=2.3)),
    "gradients_not_zeroed": lambda: (kept(3), kept(2)),
    "fp16_overflow": lambda: (overflowing(101.0), overflowing(99.0)),
    "steps_skipped": lambda: (skipping(10), skipping(9)),
    "detached_output": lambda: (without_gradient(math.nan), without_gradient(1e-9)),
    "detached_shortcut": lambda: tuple(
        run_of(unavailable=[{"metric": "shortcut_share", "blocks": [5], "reason": reason}])
        for reason in (_CUT, "not recorded")
    ),
    "detached_branch": lambda: (detached(math.nan), detached(0.1)),
    "missing_skip": lambda: (
        taken(lacking=[{"name": "b2", "block": 2, "like": 5}]),
        taken(lacking=[]),
    ),
    "dropout_on_skip": lambda: (
        run_of(blocks=rows_of(shortcut_path=["dropout"])),
        run_of(blocks=rows_of(shortcut_path=["relu"])),
    ),
    "shortcut_scaled": lambda: (scaled(1.031), scaled(1.029)),
    "symmetric_units": lambda: (
        taken(constant=[{"name": "b1.weight", "block": 1}]),
        taken(constant=[]),
    ),
    "norm_fault": lambda: (normalising(2.1), normalising(1.9)),
    "attention_logits_grow": lambda: (growing(101.0), growing(99.0)),
    "attention_collapsed": lambda: (attending(0.019), attending(0.021)),
    "router_collapsed": lambda: (routing(0.24), routing(0.26)),
    "branch_too_large": lambda: (
        cell("branch_ratio", 51, block=2),
        cell("branch_ratio", 49, block=2),
    ),
    "missing_norm": lambda: (
        lacking(["conv2d", "relu", "conv2d"]),
        lacking(["conv2d", "sigmoid", "conv2d"]),
    ),
    "bias_shift": lambda: (with_shift(5.1), with_shift(4.9)),
    "grows_at_init": lambda: tuple(
        ours(loss=[factor * LN10, *[2.0] * 29]) for factor in (3.01, 2.99)
    ),
    "vanishing": lambda: (
        cell("grad_input", 9e-4, block=0),
        cell("grad_input", 1.1e-3, block=0),
    ),
    "frozen_block": lambda: (
        cell("update_ratio", 0.0, block=4),
        cell("update_ratio", 1e-9, block=4),
    ),
    "dead_block": lambda: (
        cell("branch_channel_std", 9e-6, block=1),
        cell("branch_channel_std", 1.1e-5, block=1),
    ),
    "saturated_block": lambda: (saturated(0.91), saturated(0.89)),
    "second_moment_stale": lambda: (remembering(5.1), remembering(4.9)),
    "lr_schedule": lambda: (rate_of_nothing(5), rate_of_nothing(4)),
    "group_lr": lambda: (grouped(101.0), grouped(99.0)),
    "weight_decay_too_large": lambda: (curve(weight_decay=0.11), curve(weight_decay=0.09)),
    "lr_too_high": lambda: (worsening(1.1e-3), worsening(0.9e-3)),
    "lr_too_low": lambda: (still(2.9e-6), still(3.1e-6)),
    "exploded": lambda: (norms(1001), norms(999)),
    "skip_collapsed": lambda: (ours("elu_after", skip_gain=0.049), ours(skip_gain=0.051)),
    "drift": lambda: (drifting(1.01), drifting(0.99)),
    "stalled": lambda: tuple(
        ours(steps=50, loss=LN10, update_ratio=size) for size in (2.1e-3, 1.9e-3)
    ),
    "at_risk": lambda: (ours(lr=0.3), ours(lr=0.299)),
    "overfit": lambda: (evaluated(1.21), evaluated(1.19)),
}


@functools.cache
def runs(name):
    """The ill run and the healthy one; made once, no test changes them."""
    return CASES[name]()


def test_every_rule_has_its_two_runs():
    assert list(CASES) == list(FINDINGS)


class TestBuiltIn(FindingConformance):
    @pytest.fixture(params=CASES)
    def case(self, request):
        return request.param, *runs(request.param)

    @pytest.fixture
    def rule(self, case):
        return FINDINGS[case[0]]

    @pytest.fixture
    def ill(self, case):
        return case[1]

    @pytest.fixture
    def healthy(self, case):
        return case[2]


# --- from outside ----------------------------------------------------------------------------


def example():
    """The code of the page, in order."""
    return re.findall(
        r"```python\n(.*?)```\n\n(?:```text\n(.*?)```)?", PAGE.read_text("utf-8"), re.S
    )


@pytest.fixture
def page(capsys):
    """What the page's code defines; its output is what the page says."""
    names = {}
    try:
        for code, printed in example():
            if "FindingConformance" in code:
                continue
            exec(code, names)
            assert capsys.readouterr().out == (printed or "")
        yield names
    finally:
        if "uneven_gradient" in FINDINGS:
            unregister_finding("uneven_gradient")


def test_the_example_of_the_page_runs(page):
    assert "uneven_gradient" not in FINDINGS  # the page ends with its removal


class TestFromOutside(FindingConformance):
    @pytest.fixture
    def rule(self, page):
        return page["UNEVEN_GRADIENT"]

    @pytest.fixture
    def ill(self):
        return cell("grad_param", 21.0, block=3)

    @pytest.fixture
    def healthy(self):
        return cell("grad_param", 1.9, block=3)


@pytest.fixture
def row():
    def nothing(run):
        """Never."""
        return iter(())

    fields = {"needs": ("loss",), "cause": "c", "why": "w", "remedy": "r"}
    return resdiag.Rule(name="mine", judge=nothing, **fields)


def test_a_rule_is_placed_before_its_consequence(row):
    register_finding(row, before="exploded")
    try:
        names = list(FINDINGS)
        assert names.index("mine") + 1 == names.index("exploded")
        with pytest.raises(ValueError, match="'mine' exists already"):
            register_finding(row)
    finally:
        unregister_finding("mine")
    assert list(FINDINGS) == list(CASES)


@pytest.mark.parametrize("name", ["exploded", "healthy", "Mine", "my-rule", ""])
def test_a_name_that_is_taken_or_no_word_is_refused(row, name):
    with pytest.raises(ValueError, match="finding"):
        register_finding(resdiag.Rule(**{**vars(row), "name": name}))


def test_an_unknown_place_and_no_row_are_refused(row):
    with pytest.raises(ValueError, match="explodes"):
        register_finding(row, before="explodes")
    with pytest.raises(TypeError, match="Rule"):
        register_finding(row.judge)
    with pytest.raises(ValueError, match="exploded"):
        unregister_finding("exploded")


def test_a_registered_rule_that_raises_takes_no_verdict_from_a_run(row):
    def broken(run):
        """Always."""
        raise ZeroDivisionError("by zero")

    register_finding(resdiag.Rule(**{**vars(row), "judge": broken}))
    try:
        verdict = judge(cell("branch_ratio", 51, block=2))
    finally:
        unregister_finding("mine")
    assert verdict.name == "branch_too_large"
    assert "mine: ZeroDivisionError: by zero" in verdict.not_judged
