"""What follows from the experiments: faults that are shown, causes that are ruled out, the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from resdiag.probe.experiments.experiment import Conclusion, Experiment, count, percent
from resdiag.probe.experiments.one_batch import Training, best_of
from resdiag.probe.experiments.rates import Sweep

FAR_TOO_LOW = 1 / 200
"""Fall of the loss at the given rate over that at the fastest one, below which it is a fault."""
_KINDS = ("shown", "ruled out", "open")
_FAULTS = ("no_gradient", "gradient_wrong", "ignores_input", "same_samples")


def conclude(
    experiments: Sequence[Experiment],
    trainings: Sequence[Training],
    sweep: Sweep | None,
) -> tuple[Conclusion, ...]:
    """Put together what the experiments show; faults first, then what is ruled out.

    Args:
        experiments: Those done, in order.
        trainings: On the batch; the first one at the given rate, if there is one.
        sweep: Of the given optimizer's rate.
    """
    found = [
        Conclusion(kind, name, text)
        for one in experiments
        for kind, facts in zip(_KINDS, (one.shows, one.rules_out, one.open), strict=True)
        for name, text in facts
    ]
    if trainings:
        if best_of(trainings).outcome == "memorised":  # which needs the input
            found = [replace(one, kind="open") if one.name == "hardly_uses_input" else one
                     for one in found]  # fmt: skip
        found += _about_learning(trainings, found)
        found += _about_rate(trainings, sweep)
        found += _about_the_rest(trainings, sweep, found)
    return tuple(sorted(found, key=lambda one: _KINDS.index(one.kind)))


def _about_learning(
    trainings: Sequence[Training], found: Sequence[Conclusion]
) -> Iterator[Conclusion]:
    best = best_of(trainings)
    if best.outcome == "memorised":
        yield Conclusion("ruled out", "network_and_loss",
                         f"The network memorises this batch in {count(best.done, 'step')} "
                         f"({best.how}): network and loss can learn.")  # fmt: skip
    elif best.outcome == "known":
        yield Conclusion("ruled out", "network_and_loss",
                         f"The network knows this batch already, its loss is {best.losses[0]:.3g}: "
                         "network and loss can learn.")  # fmt: skip
    elif best.outcome == "falls":
        yield Conclusion("open", "learns_partly",
                         f"The loss falls to {percent(best.share)} in {count(best.done, 'step')} "
                         f"({best.how}): the network learns, but this batch is not memorised. A "
                         "larger steps= shows whether it will be.")  # fmt: skip
    else:
        why = "the fault lies in them"
        if any(one.kind == "shown" and one.name in _FAULTS for one in found):
            why = "which the faults above explain"
        elif not any((one.kind, one.name) == ("ruled out", "labels") for one in found):
            why += ", or inputs that are alike have different targets"
        yield Conclusion("shown", "cannot_learn",
                         f"Network and loss do not learn even this one batch: "
                         f"{'; '.join(t.describe() for t in trainings)}; {why}.")  # fmt: skip


def _about_rate(trainings: Sequence[Training], sweep: Sweep | None) -> Iterator[Conclusion]:
    if sweep is None or sweep.given is None:
        return
    own, best, rate = trainings[0], sweep.best, f"{sweep.given:.3g}"
    path = f"{own.losses[0]:.3g} -> {own.losses[-1]:.3g} in {count(max(own.done, 1), 'step')}"
    if own.outcome in ("memorised", "known"):
        text = f"At your rate of {rate} the batch is memorised: the rate is not what is wrong."
        yield Conclusion("ruled out", "rate", text)
    elif best is None:
        text = f"At no rate from {sweep.rates[0].lr:.1g} to {sweep.rates[-1].lr:.1g} does "
        text += f"{sweep.optimizer} lower the loss."
        yield Conclusion("open", "no_rate_helps", text)
    elif sweep.answer == "too_low" and not _is_far_too_low(own, sweep):
        text = f"Your rate of {rate} lowers the loss slowly ({path}): it falls fastest at "
        text += f"{best.lr:.3g}, {best.lr / sweep.given:.3g} times yours, in the first steps on "
        text += "this batch."
        yield Conclusion("open", "rate_slow", text)
    elif sweep.answer == "too_low":
        text = f"At your rate of {rate} the loss {_verb(own)} ({path}): the learning rate is too "
        text += f"low. It falls fastest at {best.lr:.3g}, {best.lr / sweep.given:.3g} times yours."
        yield Conclusion("shown", "rate_too_low", text)
    elif sweep.answer == "too_high" and own.outcome != "falls":
        text = f"At your rate of {rate} the loss {_verb(own)} ({path}): the learning rate is too "
        text += f"high. It falls fastest at {best.lr:.3g}, {sweep.given / best.lr:.3g} times less."
        yield Conclusion("shown", "rate_too_high", text)
    else:
        does = "lowers the loss" if own.outcome == "falls" else "is among the best"
        text = f"Your rate of {rate} {does} ({path}); the loss falls fastest at {best.lr:.3g}."
        yield Conclusion("ruled out", "rate", text)


def _about_the_rest(
    trainings: Sequence[Training], sweep: Sweep | None, found: Sequence[Conclusion]
) -> Iterator[Conclusion]:
    learned = best_of(trainings).outcome in ("memorised", "known")
    given = sweep is not None and sweep.given is not None
    fits = not given or any(one.name == "rate" for one in found)
    if learned and fits and not any(one.kind == "shown" for one in found):
        rate = ", rate" if given else ""
        yield Conclusion("open", "elsewhere",
                         f"Network, loss{rate} and gradient learn this batch. A training that "
                         "stalls all the same has its cause in the other data, their labels or "
                         "order, in regularisation, or later in training.")  # fmt: skip


def _is_far_too_low(own: Training, sweep: Sweep) -> bool:
    """Whether the loss stays at the given rate, and would for hundreds of times as many steps."""
    if sweep.own is None or sweep.best is None or own.outcome != "stays":
        return False
    return sweep.own.fall < FAR_TOO_LOW * sweep.best.fall


def _verb(training: Training) -> str:
    return "diverges" if training.outcome == "diverges" else "stays"
