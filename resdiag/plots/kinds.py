"""The kinds of plots by name.

No matplotlib here: a mistyped kind is refused before anything slow is imported.
"""

from collections.abc import Iterable, Mapping

from resdiag.catalog.custom import known_metrics
from resdiag.errors import UsageError, unknown
from resdiag.plots import (
    biasshift,
    by_metric,
    bydepth,
    curves,
    gradnorms,
    growth,
    nonfinite,
    signal,
    skip,
)
from resdiag.plots.plotkind import PlotKind as PlotKind
from resdiag.registry import Registry

_MODULES = (gradnorms, biasshift, skip, signal, growth, curves, bydepth, by_metric, nonfinite)
KINDS: Registry[PlotKind] = Registry("plot", (module.KIND for module in _MODULES))
"""Every kind of plot by name, in the order of the documentation; registered ones behind."""


def register_plot(kind: PlotKind) -> None:
    """Add a kind of plot to `resdiag.draw`, `resdiag plot`, reports and study files.

    It is available in this process only; to use it on the command line, start the command from a
    script that registers it first.

    Raises:
        RegistrationError: There is another kind, or a metric, of that name.
    """
    KINDS.add(kind, taken=known_metrics())


def unregister_plot(name: str) -> None:
    """Forget a kind of plot that was registered.

    Raises:
        RegistrationError: It is built in, or not registered.
    """
    KINDS.remove(name)


def find_kind(name: str, custom: Iterable[Mapping[str, str]] = ()) -> PlotKind:
    """Look a kind of plot up by name, or make one of a metric per block.

    Args:
        name: One of `KINDS`, or the id of a metric.
        custom: Custom metrics that the runs to draw have: id, label, unit, ...

    Raises:
        UsageError: There is none; the message has the nearest match.

    >>> find_kind("growth").needs
    ('forward_growth', 'grad_growth')
    """
    if name in KINDS:
        return KINDS[name]
    metrics = {m.id: m for m in known_metrics().values() if m.site != "run"}
    labels = {m.id: (m.label, m.formula, m.reading) for m in metrics.values()}
    labels |= {
        entry["id"]: (entry["label"], entry.get("formula", ""), entry.get("reading", ""))
        for entry in custom
    }
    if name not in labels:
        near = unknown("plot", name, [*KINDS, *labels]).message.partition(" known:")[0]
        listed = ", ".join([*KINDS, *(entry["id"] for entry in custom)])
        raise UsageError(f"{near} known: {listed}; or any metric of `resdiag metrics`")
    label, formula, reading = labels[name]
    return PlotKind(
        name=name,
        title=f"{label[:1].upper()}{label[1:]} by block and step",
        question=f"How does {name} = {formula} change along depth and over time?",
        reading=f"{reading}. {name} = {formula}.",
        needs=(name,),
        draw=by_metric.draw,
    )
