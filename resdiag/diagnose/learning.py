"""Rules about what training comes to: a lost skip path, a loss that stalls, dies or overfits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from resdiag.diagnose.advice import lower_lr, plots, run_variant, variant_of
from resdiag.diagnose.finding import (
    DEFINITION,
    Evidence,
    Finding,
    Outcome,
    Rule,
    Threshold,
)
from resdiag.diagnose.progress import (
    FALLING,
    SETTLED_FALL,
    STALL,
    STALL_STEPS,
    count_steps,
    has_settled,
    span_words,
    spans_at_end,
    sum_updates,
)
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.signal import LEAST_GRADIENT_ELSEWHERE, kept_gradient
from resdiag.theory.prediction import CRITICAL, critical_lr

GUESSING = Threshold(
    1.25,
    "Loss over ln K up to which it is guessing; above it something else is wrong.",
)
SURVIVED = Threshold(
    50,
    "Steps with a finite loss after which `at_risk` is refuted: the late deaths came by step 18.",
)
RISEN = Threshold(1.2, "Test loss over its minimum.")
STAYS = Threshold(
    0.8,
    "Test loss over the largest since its minimum; below, it is on its way back.",
)
LEARNED = Threshold(
    0.25,
    "Training loss over the least test loss; above, the network is not far better on its own.",
)
EVALUABLE = Threshold(
    100,
    "Steps before evaluations count: BatchNorm's running averages lag behind the first.",
)
MOVED = Threshold(
    0.1,
    "Update over weights of the median block, added up over the steps, before a loss that is that "
    "of guessing is a stall.",
)
LONG_STALL = Threshold(1000, "Steps after which it is one however little the weights have moved.")
HELD = Threshold(
    3, "Recorded steps for which a collapse has held at the end, if there are as many."
)
LONG_BEFORE = Threshold(20, "Steps at a loss of guessing before it, of which it is a consequence.")
LEAST_GAIN = Threshold(0.05, "Skip gain at the last block.")
LEAST_GRADIENT = Threshold(
    0.3,
    "Gradient at the first block's input over gradient at the last block's output.",
)


def skip_collapsed(seen: RunData) -> Outcome:
    """Skip gain at the last block below 0.05, or total gradient ratio below 0.3, at the end.

    For the last 3 recorded steps at least, of those before the first non-finite number: behind it
    a slope is 0 because its unit is not a number. Not where the loss was that of guessing for 20
    steps before it came to that: then it is a consequence, and another cause stalls the training.
    """
    if seen.run.blocks and all(row.get("shortcut") == "none" for row in seen.run.blocks):
        yield SKIP_COLLAPSED.not_applicable("the network has no shortcuts")
        return
    if not seen.steps:
        yield SKIP_COLLAPSED.not_judged("no step was recorded")
        return
    broke = seen.first_nonfinite
    steps = [step for step in seen.steps if broke is None or step < broke.step]
    if broke is not None and len(steps) < HELD:
        yield SKIP_COLLAPSED.not_judged(f"numbers are not finite from step {broke.step} on")
        return
    last, evidence = seen.indices[-1], []
    end = steps[-1]
    gain, ratio = seen.value("skip_gain", end, last), kept_gradient(seen, end)
    for value, what in ((gain, "skip gain"), (ratio, "gradient ratio")):
        if not math.isfinite(value):
            yield SKIP_COLLAPSED.not_judged(
                f"{what} at the last recorded step {end}: not recorded or NaN"
            )
    since = _since(steps, lambda step: seen.value("skip_gain", step, last) < LEAST_GAIN)
    if since is not None:
        profile = seen.profile("skip_gain", end)
        first = int(profile.index[int((profile < LEAST_GAIN).to_numpy().argmax())])
        text = f"skip gain at the last block is {gain:.2g} at step {end}, "
        text += f"below {LEAST_GAIN} since step {since}"
        evidence.append(
            SKIP_COLLAPSED.evidence("skip_gain", gain, LEAST_GAIN, text, step=since, block=first)
        )
    least = LEAST_GRADIENT if seen.variant else LEAST_GRADIENT_ELSEWHERE
    since = _since(steps, lambda step: kept_gradient(seen, step) < least)
    if since is not None:
        text = f"gradient at the first block's input is {ratio:.2g} of that at the last "
        text += f"block's output at step {end}, below {least} since step {since}"
        source = "Zaeemzadeh et al. 2018, arXiv:1805.07477; " + DEFINITION
        evidence.append(
            SKIP_COLLAPSED.evidence(
                "grad_input",
                ratio,
                least,
                text,
                step=since,
                source=source,
                block=seen.indices[0],
            )
        )
    if not evidence:
        return
    began = min(item.step for item in evidence if item.step is not None)
    if (why := _guessed_before(seen, began)) is not None:
        yield SKIP_COLLAPSED.not_judged(why)
    else:
        yield _explain_collapse(seen, evidence)


def _guessed_before(seen: RunData, step: int) -> str | None:
    """Why a collapse is a consequence: the network guessed before it, and did so for long."""
    losses = seen.series("loss")
    before = losses[losses.index < step].iloc[-int(LONG_BEFORE) :]
    if seen.classes is None or len(before) < LONG_BEFORE:
        return None
    if not before.mean() >= (1 - STALL) * math.log(seen.classes):
        return None
    return (
        f"the skip path collapsed at step {step}, after {len(before)} steps at a loss of guessing"
    )


def _explain_collapse(seen: RunData, evidence: Sequence[Evidence]) -> Finding:
    row, theory = variant_of(seen), seen.prediction
    what = SKIP_COLLAPSED.why
    if row and row.after_add != "none":
        what = (
            f"The {row.after_add.upper()} after each addition multiplies the skip path by its slope"
            " and has driven units below 0, where that slope is small"
        )
    gain = math.nan if theory is None else float(theory.skip_gain[-1])
    at_init = "" if math.isnan(gain) else f"; theory at initialisation: skip gain {gain:.2g}"
    items = list(evidence)
    if at_init and theory is not None:
        items.append(
            Evidence(
                metric="skip_gain",
                step=0,
                block=seen.indices[-1],
                value=gain,
                text=f"theory at initialisation: skip gain {gain:.2g} at the last "
                f"block, measured at step 0: {seen.value('skip_gain', 0, seen.indices[-1]):.2g}",
                source=theory.basis,
            )
        )
    finding = SKIP_COLLAPSED.found(
        *items,
        summary="; ".join(item.text for item in evidence),
        why=what + at_init,
        next=(
            *plots(*SKIP_COLLAPSED.plots),
            *run_variant(seen, f"elu --depth {seen.depth}", "nothing on the skip path"),
            *(lower_lr(seen) or [SKIP_COLLAPSED.untried]),
        ),
    )
    return replace(finding, step=min(item.step for item in evidence if item.step is not None))


def _since(steps: Sequence[int], bad: Callable[[int], bool]) -> int | None:
    """The first of the steps from which on `bad` holds until the end; None if for fewer than 3.

    A skip gain is measured on few samples, a single one says little.
    """
    held = 0
    for step in reversed(steps):
        if not bad(step):
            break
        held += 1
    return steps[-held] if held >= min(HELD, len(steps)) else None


def stalled(seen: RunData) -> Outcome:
    """The training loss stays at 0.98 to 1.25 ln K, although the weights have moved.

    In the mean over the last epoch, the last 50 steps at least, or over the last half of the steps.
    That it stays has to be shown: a line through the losses falls by less than 3 % of ln K, within
    2 standard errors. Noisy losses take more steps for that. Healthy networks guess until their
    weights have moved, so the updates, over the weights and added up, have to come to a tenth; or
    the run to 1000 steps, whatever they moved.
    """
    losses, classes = seen.cross_entropy, seen.classes
    if classes is None:
        yield STALLED.not_judged("the number of classes is unknown")
        return
    if count_steps(losses) < STALL_STEPS:
        reason = f"{span_words(losses)}, {STALL_STEPS} needed"
        yield STALLED.not_judged(reason, f"{STALL_STEPS} steps")
        return
    guess, moved = math.log(classes), sum_updates(seen, losses)
    spans = spans_at_end(seen, losses)
    if not all(np.isfinite(last.to_numpy(dtype=float)).all() for last in spans.values()):
        yield STALLED.not_judged("the loss is not finite at the end")
        return
    at_guessing = {s: w for s, w in spans.items() if 1 - STALL <= w.mean() / guess <= GUESSING}
    flat = {s: w for s, w in at_guessing.items() if has_settled(w, guess)}
    if at_guessing and not moved >= MOVED and count_steps(losses) < LONG_STALL:
        way = "are not known" if math.isnan(moved) else f"add up to {moved:.2g} of the weights"
        reason = f"the loss is that of guessing, but the updates of {span_words(losses)} {way}"
        needs = f"updates that add up to {MOVED} of the weights, or {LONG_STALL} steps"
        yield STALLED.not_judged(reason, needs)
    elif flat:
        span, last = next(iter(flat.items()))
        text = f"mean loss over {span} is {last.mean():.3f}, ln {classes} is {guess:.3f}"
        text += f"; updates add up to {moved:.2g} of the weights" if moved >= 0 else ""
        item = STALLED.evidence(
            "loss", float(last.mean()), (1 - STALL) * guess, text, step=int(last.index[0])
        )
        yield STALLED.found(item)
    elif at_guessing:
        mean = float(next(iter(at_guessing.values())).mean())
        reason = f"mean loss {mean:.3f} is that of guessing, and may still fall"
        yield STALLED.not_judged(reason, "a loss that has settled")


def at_risk(seen: RunData) -> Outcome:
    """Learning rate times gradient norm at step 0 is 0.6 or more, and the run has yet to live on.

    It predicts: of the runs it was observed on, the last one died at step 18. A run that has made
    `SURVIVED` steps with a finite loss has refuted it.
    """
    norm = seen.scalar("grad_norm", 0)
    if not seen.variant:
        reason = "observed on CIFAR networks under SGD only; `resdiag probe` measures the curvature"
        yield AT_RISK.not_applicable(reason)
        return
    if math.isnan(norm):
        yield AT_RISK.not_judged("the gradient norm of step 0 was not recorded")
        return
    lr = seen.scalar("lr", 0)
    lr = lr if math.isfinite(lr) else seen.lr
    losses = seen.series("loss").to_numpy()
    if not lr * norm >= CRITICAL or (len(losses) >= SURVIVED and np.isfinite(losses).all()):
        return
    text = f"lr x ||g_0|| = {lr:.3g} x {norm:.3g} = {lr * norm:.3g}; critical lr "
    text += f"{critical_lr(norm):.1e}"
    row, why = variant_of(seen), AT_RISK.why
    if row and row.norm:
        why += "; BatchNorm, as here, usually survives more, with a rough start"
    if len(losses) and math.isfinite(losses[-1]):
        why += f"; this run has survived {len(losses)} steps"
    yield AT_RISK.found(
        AT_RISK.evidence("lr_grad_norm", lr * norm, CRITICAL, text, step=0),
        summary=f"{AT_RISK.cause} for the gradient: {text}",
        why=why,
        next=(*plots(*AT_RISK.plots), *(lower_lr(seen) or [AT_RISK.untried])),
    )


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
        yield OVERFIT.not_judged(reason, "4 evaluations")
        return
    if test.index[-1] + 1 < EVALUABLE:
        reason = f"evaluations up to step {test.index[-1]}, {EVALUABLE} steps needed"
        yield OVERFIT.not_judged(reason, f"{EVALUABLE} steps")
        return
    least = int(test.to_numpy().argmin())
    best = int(test.index[least])
    rose = (test.iloc[-2:] > RISEN * test.iloc[least]).all()
    stays = test.iloc[-1] > STAYS * test.iloc[least:].max()
    fell = train.iloc[-1] < min(train.get(best, math.inf), LEARNED * test.iloc[least])
    if rose and stays and fell:
        text = f"test loss {test.iloc[-1]:.3g}, its minimum was {test[best]:.3g} at step {best}; "
        text += f"training loss fell to {train.iloc[-1]:.3g}"
        worst, limit = float(test.iloc[-1]), RISEN * float(test[best])
        yield OVERFIT.found(
            OVERFIT.evidence("test_loss", worst, limit, text, step=best),
        )


STALLED = Rule(
    name="stalled",
    judge=stalled,
    needs=("loss",),
    applies="a cross-entropy of a known number of classes",
    cause="the network guesses",
    why="The network guesses: its output says nothing about the label. The cause comes before it: "
    "dead or saturated units, updates that are too small, or labels that do not fit",
    remedy="check that labels fit their images, and that the updates are about 1e-3 of the weights",
    plots=("curves", "updates", "skip"),
    thresholds=(STALL, GUESSING, FALLING, STALL_STEPS, SETTLED_FALL, MOVED, LONG_STALL),
)
AT_RISK = Rule(
    name="at_risk",
    judge=at_risk,
    needs=("grad_norm",),
    applies="the paper's variants on CIFAR-like images under SGD, in their first steps",
    cause="the first step is large",
    why=f"In the study explosion, 28 of 28 runs of a and b with lr x ||g_0|| below {CRITICAL} "
    "lived 50 steps, and 7 of 68 above it",
    remedy="lower the learning rate below 0.6 / ||g_0||, or warm it up",
    plots=("gradnorms", "curves"),
    thresholds=(Threshold(CRITICAL, "learning rate times gradient norm at step 0"), SURVIVED),
    source="studies/results/explosion: a and b with He's initialisation; observed, not derived",
)
OVERFIT = Rule(
    name="overfit",
    judge=overfit,
    needs=("test_loss", "train_loss"),
    applies="runs with 4 evaluations of both losses, in 100 steps or more",
    cause="overfitting",
    why="The network still gets better on what it is trained on: this is no degradation, "
    "which is a training error that grows with depth (He et al. 2015, arXiv:1512.03385)",
    remedy="stop at the least test loss; more data, augmentation or weight decay",
    plots=("curves",),
    thresholds=(RISEN, STAYS, LEARNED, EVALUABLE),
)
SKIP_COLLAPSED = Rule(
    name="skip_collapsed",
    judge=skip_collapsed,
    needs=("skip_gain", "grad_input", "grad_output"),
    applies="networks with shortcuts",
    cause="the skip path carries no gradient any more",
    why="Gradient that reaches the last block hardly reaches the first",
    remedy="put nothing on the skip path: no activation after the addition; lower the learning "
    "rate if it collapsed in training",
    plots=("skip", "biasshift", "gradnorms"),
    thresholds=(LEAST_GAIN, LEAST_GRADIENT, LEAST_GRADIENT_ELSEWHERE, HELD, LONG_BEFORE),
    source="He et al. 2016, arXiv:1603.05027, eq. 5; " + DEFINITION,
)
