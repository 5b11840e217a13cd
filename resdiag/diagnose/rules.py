"""The rules of the verdict: each looks at one run and yields what it found or could not judge."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from resdiag.diagnose import mechanism
from resdiag.diagnose.breakdown import EARLIER_STEPS, count_norms, find_breakdown
from resdiag.diagnose.dataset import data_fault, loss_fault
from resdiag.diagnose.finding import Evidence, NotJudged, Outcome
from resdiag.diagnose.rates import lr_too_high, lr_too_low, weight_decay_too_large
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.structure import (
    branch_too_large,
    detached_branch,
    detached_shortcut,
    frozen_block,
    missing_norm,
    shortcut_scaled,
)
from resdiag.diagnose.units import (
    CONSTANT_OUTPUT,
    bias_shift,
    dead_block,
    drift,
    fp16_overflow,
    saturated_block,
)
from resdiag.theory.prediction import CRITICAL, critical_lr

INIT_GROWTH = 1.4
"""Growth of E[H^2] per block, in two stages, that BatchNorm networks do not reach (<= 1.26)."""

INIT_LOSS = 3.0
"""Loss at step 0 in units of ln K."""

STALL = 0.02
"""How far below ln K the loss is, in units of ln K, where guessing ends."""

GUESSING = 1.25
"""Loss over ln K up to which it is guessing; above it something else is wrong."""

LEAST_GAIN = 0.05
"""Skip gain at the last block."""

LEAST_GRADIENT = 0.3
"""Gradient at the first block's input over gradient at the last block's output."""

LEAST_GRADIENT_ELSEWHERE = 1e-3
"""The same for models other than ours, whose blocks differ in size and place: a collapse only.

Of 11 stock networks at initialisation (convolutional, transformers) the least had 0.1, an nfnet.
"""

LEAST_SIGNAL = 1e-3
"""Spread within channels of the last block's output over the first block's input's, at first."""

LARGEST_SIGNAL = 100.0
"""RMS of the last block's output at initialisation, and over that of the first block's input."""

FALLING = 0.005
"""Fall of the loss over the stalled steps, in units of ln K, that is more than noise."""

SURVIVED = 50
"""Steps with a finite loss after which `at_risk` is refuted: the late deaths came by step 18."""

RISEN = 1.2
"""Test loss over its minimum."""

STAYS = 0.8
"""Test loss over the largest since its minimum; below, it is on its way back."""

LEARNED = 0.25
"""Training loss over the least test loss; above, the network is not far better on its own."""

EVALUABLE = 100
"""Steps before evaluations count: BatchNorm's running averages lag behind the first."""

_STALL_STEPS = 50
_LONG = 6
_RATIOS = 2  # a single ratio cannot tell geometric from additive growth

_MEASURED = "thresholds between measured families at depths 20, 56, 110; Zhang et al. 2019 (Fixup)"
_DEFINITION = "definition of resdiag.diagnose.rules"


def exploded_at_init(seen: RunData) -> Outcome:
    """E[H^2] grows by 1.4 per block in two stages, or the loss is above 3 ln K, at step 0.

    With BatchNorm the second moment grows by a constant per block, which at the beginning of a
    stage looks like a factor. So a stage counts from 3 blocks on, and where stages are that short
    (depth 20) every one has to grow: over 16 seeds and two kinds of images the slowest stage then
    has at most 1.32 with BatchNorm and at least 1.59 in a and b. Of other models nothing is known
    beforehand: there growth counts that goes on, in both halves of a stage of 7 blocks or more;
    a sum of equal branches, which at first looks like a factor, has slowed down by then.
    """
    name = "exploded_at_init"
    steep, total = [], None
    if not seen.variant and 0 in seen.steps:
        steep = _steep_halves(seen)
        if not any(row[1] >= _LONG for row in seen.stage_growth(0).values()):
            yield NotJudged(name, f"growth at initialisation: no stage of {_LONG + 1} blocks")
        total = _total_growth(seen) if not steep else None
    elif 0 not in seen.steps:
        yield NotJudged(name, "growth at initialisation: step 0 was not recorded")
    else:
        stages = seen.stage_growth(0)
        long = {stage: row for stage, row in stages.items() if row[1] >= _RATIOS}
        if len(long) < 2:
            reason = f"growth at initialisation: {len(long)} stages with 3 blocks or more, 2 needed"
            yield NotJudged(name, reason)
        else:
            steep = [(stage, row) for stage, row in long.items() if row[0] >= INIT_GROWTH]
            short = sum(row[1] > _RATIOS for row in long.values()) < 2
            steep = steep if len(steep) >= (len(long) if short else 2) else []
    evidence = [_stage_evidence(seen, stage, *row) for stage, row in steep]
    evidence += [total] if total else []
    block = evidence[0].block if evidence else None
    loss, classes = seen.scalar("loss", 0), seen.classes
    if classes is None or 0 not in seen.series("loss").index:
        missing = "the number of classes" if classes is None else "the loss"
        yield NotJudged(name, f"loss at step 0 against 3 ln K: {missing} is unknown")
    elif not loss <= INIT_LOSS * math.log(classes):  # NaN as well
        evidence.append(_loss_evidence(loss, classes))
    if evidence:
        yield mechanism.explain_init(seen, block, evidence, find_breakdown(seen))


def exploded(seen: RunData) -> Outcome:
    """A non-finite loss or gradient, or a gradient norm 1e3 times the median before."""
    if seen.series("loss").empty and seen.series("grad_norm").empty and not seen.steps:
        yield NotJudged("exploded", "neither a loss nor a gradient was recorded")
        return
    evidence = find_breakdown(seen)
    if evidence:
        yield mechanism.explain_explosion(seen, evidence)
    elif count_norms(seen) <= EARLIER_STEPS:
        reason = f"jump of the gradient: {count_norms(seen)} norms, {EARLIER_STEPS + 1} needed"
        yield NotJudged("exploded", reason, f"{EARLIER_STEPS + 1} gradient norms")


def vanishing(seen: RunData) -> Outcome:
    """At the first recorded step signal or gradient falls by 1000 over the network.

    The spread within channels of the last block's output, which is what differs between samples,
    is below 1e-3 of that of the first block's input, or the
    gradient at that input below 1e-3 of that at that output. Not where one block loses it all:
    that is `dead_block`.
    """
    if not seen.steps or len(seen.indices) < 2:
        yield NotJudged("vanishing", "fewer than 2 blocks were recorded")
        return
    step, first, last = seen.steps[0], seen.indices[0], seen.indices[-1]
    if _is_cut(seen, step):
        return
    with np.errstate(all="ignore"):
        signal = np.float64(seen.value("output_channel_std", step, last)) / np.float64(
            seen.value("input_channel_std", step, first)
        )
    gradient = seen.gradient_ratio(step)
    evidence = []
    for value, metric, least, what in (
        (signal, "output_channel_std", LEAST_SIGNAL, "spread behind the last block"),
        (gradient, "grad_input", LEAST_GRADIENT_ELSEWHERE, "gradient at the first block"),
    ):
        if 0 < value < least:
            text = f"the {what} is {value:.2g} of that at the other end at step {step}"
            block = first if metric == "grad_input" else last
            evidence.append(
                Evidence(
                    metric=metric, step=step, block=block, value=value, threshold=least, text=text,
                    source="Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852, section 2.2",
                )
            )  # fmt: skip
    if evidence:
        yield mechanism.explain_vanishing(seen, evidence)


def skip_collapsed(seen: RunData) -> Outcome:
    """Skip gain at the last block below 0.05, or total gradient ratio below 0.3, at the end."""
    name = "skip_collapsed"
    if seen.run.blocks and all(row.get("shortcut") == "none" for row in seen.run.blocks):
        yield NotJudged(name, "the network has no shortcuts")
        return
    if not seen.steps:
        yield NotJudged(name, "no step was recorded")
        return
    end = seen.steps[-1]
    gain = seen.value("skip_gain", end, seen.indices[-1])
    ratio = seen.gradient_ratio(end)
    for value, what in ((gain, "skip gain"), (ratio, "gradient ratio")):
        if not math.isfinite(value):
            yield NotJudged(name, f"{what} at the last recorded step {end}: not recorded or NaN")
    last = seen.indices[-1]
    evidence = []
    if gain < LEAST_GAIN:
        since = _since(seen, end, lambda step: seen.value("skip_gain", step, last) < LEAST_GAIN)
        gains = seen.profile("skip_gain", end)
        first = int((gains < LEAST_GAIN).to_numpy().argmax())
        evidence.append(
            Evidence(
                metric="skip_gain",
                step=since,
                block=int(gains.index[first]),
                value=gain,
                threshold=LEAST_GAIN,
                text=f"skip gain at the last block is {gain:.2g} at step {end}, "
                f"below {LEAST_GAIN} since step {since}",
                source="He et al. 2016, arXiv:1603.05027, eq. 5; " + _DEFINITION,
            )
        )
    least = LEAST_GRADIENT if seen.variant else LEAST_GRADIENT_ELSEWHERE
    if ratio < least:
        since = _since(seen, end, lambda step: seen.gradient_ratio(step) < least)
        evidence.append(
            Evidence(
                metric="grad_input",
                step=since,
                block=seen.indices[0],
                value=ratio,
                threshold=least,
                text=f"gradient at the first block's input is {ratio:.2g} of that at the last "
                f"block's output at step {end}, below {least} since step {since}",
                source="Zaeemzadeh et al. 2018, arXiv:1805.07477; " + _DEFINITION,
            )
        )
    if evidence:
        yield mechanism.explain_collapse(seen, evidence)


def stalled(seen: RunData) -> Outcome:
    """Mean training loss from 0.98 to 1.25 ln K over the last epoch, and not falling.

    Where there is no whole epoch, over the last 50 steps: healthy networks may guess that long.
    """
    name = "stalled"
    losses, classes = seen.series("loss"), seen.classes
    if classes is None:
        yield NotJudged(name, "the number of classes is unknown")
        return
    epochs = seen.series("epoch").reindex(losses.index)
    epochs = epochs.where(np.isfinite(epochs))
    whole = epochs.max() - epochs.min() >= 1
    last = losses[epochs > epochs.max() - 1] if whole else losses.iloc[-_STALL_STEPS:]
    if not whole and len(losses) < _STALL_STEPS:
        reason = f"{len(losses)} steps: less than an epoch and than {_STALL_STEPS}"
        yield NotJudged(name, reason, f"{_STALL_STEPS} steps")
        return
    with np.errstate(all="ignore"):
        mean = float(np.mean(last.to_numpy(dtype=float)))
    if not math.isfinite(mean):
        yield NotJudged(name, "the loss is not finite at the end")
        return
    guessing = 1 - STALL <= mean / math.log(classes) <= GUESSING
    if guessing and _is_falling(last, math.log(classes)):
        reason = f"mean loss {mean:.3f} is that of guessing, and still falling"
        yield NotJudged(name, reason, "a loss that has settled")
    elif guessing:
        span = "the last epoch" if whole else f"the last {len(last)} steps"
        text = f"mean loss over {span} is {mean:.3f}, ln {classes} is {math.log(classes):.3f}"
        evidence = Evidence(
            metric="loss",
            step=int(last.index[0]),
            value=mean,
            threshold=(1 - STALL) * math.log(classes),
            text=text,
            source=_DEFINITION,
        )
        yield mechanism.explain_stall(seen, evidence)


def at_risk(seen: RunData) -> Outcome:
    """Learning rate times gradient norm at step 0 is 0.6 or more, and the run has yet to live on.

    It predicts: of the runs it was observed on, the last one died at step 18. A run that has made
    `SURVIVED` steps with a finite loss has refuted it.
    """
    norm = seen.scalar("grad_norm", 0)
    if not seen.variant:
        reason = "observed on CIFAR networks under SGD only; `resdiag probe` measures the curvature"
        yield NotJudged("at_risk", reason)
        return
    if math.isnan(norm):
        yield NotJudged("at_risk", "the gradient norm of step 0 was not recorded")
        return
    lr = seen.scalar("lr", 0)
    lr = lr if math.isfinite(lr) else seen.lr
    losses = seen.series("loss").to_numpy()
    if not lr * norm >= CRITICAL or (len(losses) >= SURVIVED and np.isfinite(losses).all()):
        return
    text = f"lr x ||g_0|| = {lr:.3g} x {norm:.3g} = {lr * norm:.3g}; critical lr "
    evidence = Evidence(
        metric="lr_grad_norm",
        step=0,
        value=lr * norm,
        threshold=CRITICAL,
        text=text + f"{critical_lr(norm):.1e}",
        source="28 runs of a and b with He's initialisation: all above 1.07 died, all up to 0.6 "
        "survived; observed, not derived",
    )
    yield mechanism.explain_risk(seen, evidence)


def overfit(seen: RunData) -> Outcome:
    """The network has become far better on the training images than it ever was on others.

    The test loss lies 20 % above its minimum at the last two of at least 4 evaluations, and is not
    on its way back: above 80 % of the largest since then. The training loss went on falling, to
    less than a quarter of the least test loss. Not in the first 100 steps: the running averages of
    BatchNorm lag behind the weights there, and with them every evaluation.
    """
    test, train = (seen.series(name).dropna() for name in ("test_loss", "train_loss"))
    if len(test) < 4 or len(train) < 4:
        reason = f"{min(len(test), len(train))} evaluations, 4 needed"
        yield NotJudged("overfit", reason, "4 evaluations")
        return
    if test.index[-1] + 1 < EVALUABLE:
        reason = f"evaluations up to step {test.index[-1]}, {EVALUABLE} steps needed"
        yield NotJudged("overfit", reason, f"{EVALUABLE} steps")
        return
    least = int(test.to_numpy().argmin())
    best = int(test.index[least])
    rose = (test.iloc[-2:] > RISEN * test.iloc[least]).all()
    stays = test.iloc[-1] > STAYS * test.iloc[least:].max()
    fell = train.iloc[-1] < min(train.get(best, math.inf), LEARNED * test.iloc[least])
    if rose and stays and fell:
        text = f"test loss {test.iloc[-1]:.3g}, its minimum was {test[best]:.3g} at step {best}; "
        text += f"training loss fell to {train.iloc[-1]:.3g}"
        yield mechanism.explain_overfit(
            seen,
            Evidence(
                metric="test_loss",
                step=best,
                value=float(test.iloc[-1]),
                threshold=RISEN * float(test[best]),
                text=text,
                source=_DEFINITION,
            ),
        )


RULES: tuple[Callable[[RunData], Outcome], ...] = (
    data_fault,
    loss_fault,
    fp16_overflow,
    detached_shortcut,
    detached_branch,
    shortcut_scaled,
    branch_too_large,
    missing_norm,
    bias_shift,
    exploded_at_init,
    vanishing,
    frozen_block,
    dead_block,
    saturated_block,
    weight_decay_too_large,
    lr_too_high,
    lr_too_low,
    exploded,
    skip_collapsed,
    drift,
    stalled,
    at_risk,
    overfit,
)
"""Most upstream cause first; a rule's name is its function's."""


def _is_cut(seen: RunData, step: int) -> bool:
    """Whether one block's output is constant, and those before it have kept the signal."""
    with np.errstate(all="ignore"):
        kept = seen.profile("output_channel_std", step) / seen.profile("input_channel_std", step)
    cut = (kept <= CONSTANT_OUTPUT).to_numpy()
    if not cut.any():
        return False
    before = kept.to_numpy(dtype=float)[: int(cut.argmax())]
    return bool(np.prod(before) >= LEAST_SIGNAL)


def _steep_halves(seen: RunData) -> list[tuple[int, tuple[float, int, int]]]:
    """The stages whose second moment grows by `INIT_GROWTH` per block in both halves."""
    moments = seen.profile("output_second_moment", 0)
    steep = []
    for stage, row in seen.stage_growth(0).items():
        members = [b["index"] for b in seen.run.blocks if b["stage"] == stage]
        with np.errstate(all="ignore"):
            logs = np.diff(np.log(moments.reindex(members).to_numpy(dtype=float)))
        halves = [half[np.isfinite(half)] for half in np.array_split(logs, 2)]
        grows = all(len(half) and half.mean() >= math.log(INIT_GROWTH) for half in halves)
        if row[1] >= _LONG and grows:
            steep.append((stage, row))
    return steep


def _total_growth(seen: RunData) -> Evidence | None:
    """A signal that is 100 times as large behind the last block as before the first, and 100."""
    first, last = seen.indices[0], seen.indices[-1]
    begin, end = (
        seen.sizes(s, 0).get(b, math.nan) for s, b in (("input", first), ("output", last))
    )
    if not (end >= LARGEST_SIGNAL and end >= LARGEST_SIGNAL * begin):
        return None
    text = f"the RMS grows from {begin:.3g} before the first block to {end:.3g} behind the last"
    return Evidence(
        metric="output_second_moment", step=0, block=first, value=end, threshold=LARGEST_SIGNAL,
        text=text, source=_MEASURED,
    )  # fmt: skip


def _is_falling(losses: "pd.Series[float]", unit: float) -> bool:
    """Whether a straight line through the losses falls by more than noise: 3 standard errors."""
    y = losses.to_numpy(dtype=float)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x)) if len(y) > 2 else 0.0
    noise = float(np.std(y - y.mean() - slope * x)) / math.sqrt(float(x @ x)) if len(y) > 2 else 0.0
    return slope < -3 * noise and -slope * len(y) > FALLING * unit


def _stage_evidence(seen: RunData, stage: int, growth: float, ratios: int, first: int) -> Evidence:
    text = f"E[H^2] x{growth:.2f} per block in stage {stage}, from {seen.name(first)}"
    return Evidence(
        metric="output_second_moment",
        step=0,
        block=first,
        value=growth,
        threshold=INIT_GROWTH,
        text=f"{text}: geometric mean of {ratios} ratios",
        source=_MEASURED,
    )


def _loss_evidence(loss: float, classes: int) -> Evidence:
    return Evidence(
        metric="loss",
        step=0,
        value=loss,
        threshold=INIT_LOSS * math.log(classes),
        text=f"loss at step 0 is {loss:.3g}, guessing is ln {classes} = {math.log(classes):.2f}",
        source=_MEASURED,
    )


def _since(seen: RunData, end: int, bad: Callable[[int], bool]) -> int:
    """The first recorded step from which on `bad` holds until the end."""
    since = end
    for step in reversed(seen.steps):
        if not bad(step):
            break
        since = step
    return since
