"""What a panel would tell: panels without a value, or with one number only, become a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.errors import UsageError
from resdiag.plots.view import Trace, View


@dataclass(frozen=True)
class Panel:
    """A panel over blocks.

    Attributes:
        metric: Id of the metric drawn.
        title: Its heading.
        formula: The label of its y axis.
        neutral: The value that a network with nothing there has exactly; None if there is none.
    """

    metric: str
    title: str
    formula: str
    neutral: float | None = None


def choose_panels(
    view: View, traces: Sequence[Trace], panels: Sequence[Panel]
) -> tuple[list[Panel], list[str]]:
    """The panels worth drawing, and sentences in place of the others.

    Raises:
        UsageError: None is; the message has the reasons.
    """
    kept, said = list[Panel](), dict[str, list[str]]()
    for panel in panels:
        words = _in_words(traces, panel)
        if words is None:
            kept.append(panel)
        else:
            said.setdefault(words, []).append(panel.title)
    sentences = [f"{_listed(titles)}: {words}." for words, titles in said.items()]
    if not kept:
        refuse(view, " ".join(sentences))
    return kept, sentences


def refuse(view: View, why: str) -> None:
    """Say that a plot has nothing to draw, with the reasons that the runs give.

    Raises:
        UsageError: Always.
    """
    reasons = {
        str(item["reason"])
        for record in view.records
        for name in view.kind.needs
        for item in record.unavailable(name)
    }
    names = ", ".join(dict.fromkeys(record.run.label for record in view.records))
    told = f"; {'; '.join(sorted(reasons))}" if reasons else ""
    raise UsageError(
        f"plot '{view.kind.name}' has nothing to draw for {names}: {why.rstrip('.')}{told}"
    )


def _in_words(traces: Sequence[Trace], panel: Panel) -> str | None:
    """What a panel would show, where words are enough; None where it is worth drawing."""
    if any(trace.broken(panel.metric).any() for trace in traces):
        return None
    values = np.concatenate([trace.values(panel.metric).ravel() for trace in traces])
    known = values[np.isfinite(values)]
    if not known.size:
        return "no value"
    if panel.neutral is not None and (known == panel.neutral).all():
        where = "every block" if known.size == values.size else "every block that has it"
        bare = all(
            block.get("after_add") == "none"
            for trace in traces
            for record in trace.records
            for block in record.run.blocks
        )
        why = " (nothing follows the addition)" if bare else ""
        return f"exactly {panel.neutral:g} in {where}{why}"
    return None


def _listed(titles: Sequence[str]) -> str:
    return ", ".join(titles[:-1]) + " and " + titles[-1] if len(titles) > 1 else titles[0]
