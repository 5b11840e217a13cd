"""From runs to a view: read them, refuse what cannot be drawn, group the rest into named lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resdiag.catalog.table import METRICS
from resdiag.errors import UsageError
from resdiag.models.variants import VARIANTS, variant_words
from resdiag.plots.plotkind import PlotKind
from resdiag.plots.style import Look, depth_looks, variant_looks
from resdiag.plots.view import Record, Series, View

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

_BOOKKEEPING = {
    "seed", "record_first", "every", "eval_every", "commit_every", "stop_after_explosion", "device",
}  # fmt: skip
"""Settings that make no other experiment."""

_TELLING = ("depth", "lr", "data", "width", "stem_bn", "warmup", "batch_size")
"""Settings by which a reader tells runs apart, the first ones first."""


def open_view(kind: PlotKind, runs: "Sequence[Run]", *, step: int | None, theory: bool) -> View:
    """Read the runs, check that they have what the plot needs, and group them into series.

    Raises:
        UsageError: A run without records, or without a metric that the plot needs.
    """
    records = [Record(run, run.metrics(_read_for(kind)), run.curve()) for run in runs]
    for record in records:
        _check(kind, record)
        if step is not None:
            record.place(step)
    return View(kind, tuple(group_runs(records)), step, theory)


_START = ("input_mean", "input_second_moment", "grad_output")  # what theory starts from


def _read_for(kind: PlotKind) -> set[str]:
    """The metrics that a plot looks at: reading all of a long run takes longer than drawing it."""
    health = {name for name in METRICS if name.endswith("_nonfinite")}
    sides = {f"{name}_{q}" for name in kind.needs for q in ("q10", "q50", "q90")}
    return {*kind.needs, *sides, *health, *_START, "output_second_moment", "forward_growth"}


def _check(kind: PlotKind, record: Record) -> None:
    """Refuse a run that cannot be drawn, in one line."""
    if record.metrics.empty or not record.n_blocks:
        raise UsageError(
            f"{record.run.label} has no recorded step yet", "wait, or choose another run"
        )
    known = {*record.metrics.columns, *record.curve.columns}
    missing = [name for name in kind.needs if name not in known]
    if missing:
        columns = ", ".join(missing)
        raise UsageError(
            f"{record.run.label} has no column {columns}, which plot '{kind.name}' needs",
            "record the run again with this version",
        )


def group_runs(records: Sequence[Record]) -> list[Series]:
    """Runs with equal settings and different seeds make one series."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        settings = tuple(sorted(settings_of(record).items()))
        copies = 0
        while any(
            other.run.config.seed == record.run.config.seed
            for other in groups.get((settings, copies), [])
        ):
            copies += 1  # the same seed twice is not a spread over seeds
        groups.setdefault((settings, copies), []).append(record)
    members = list(groups.values())
    order = {name: place for place, name in enumerate(VARIANTS)}
    members.sort(
        key=lambda m: (order.get(m[0].run.config.variant, len(order)), m[0].run.config.depth)
    )
    return [
        Series(label, look, tuple(group))
        for label, look, group in zip(_labels(members), _looks(members), members, strict=True)
    ]


def settings_of(record: Record) -> dict[str, object]:
    """What tells a run from another, the seed and bookkeeping left out."""
    config = record.run.config
    everything = {
        **config.to_dict(),
        "variant": config.model,
        "data": record.run.data.get("name", config.data),
    }
    hidden = {*_BOOKKEEPING, "model"}
    return {key: _plain(value) for key, value in everything.items() if key not in hidden}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, list) else value


def _looks(members: Sequence[Sequence[Record]]) -> list[Look]:
    variants = [group[0].run.config.model for group in members]
    if len(set(variants)) == 1 and len(members) > 1:
        return depth_looks(len(members))
    return variant_looks(variants)


def _labels(members: Sequence[Sequence[Record]]) -> list[str]:
    """Words for the legend: as few settings as tell the lines apart."""
    settings = [settings_of(group[0]) for group in members]
    differing = differences(settings)
    used: list[str] = [key for key in ("variant", "depth") if key in differing]
    for key in differing:
        if key not in used and len({_words(one, used) for one in settings}) < len(settings):
            used.append(key)
    labels = [_words(one, used or ["variant"]) for one in settings]
    labels = [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]
    seeds = [f" ({len(group)} seeds)" if len(group) > 1 else "" for group in members]
    return [label + more for label, more in zip(labels, seeds, strict=True)]


def differences(settings: Sequence[dict[str, object]]) -> list[str]:
    """The settings that are not the same everywhere, telling ones first."""
    keys = dict.fromkeys(("variant", *_TELLING, *(key for one in settings for key in one)))
    return [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]


def hidden_differences(series: Sequence[Series]) -> list[str]:
    """The settings in which the lines differ too, although their names do not say so.

    Steps and milestones of runs that stopped early or go on are not among them.
    """
    hidden = differences([settings_of(one.records[0]) for one in series])
    labels = " ".join(one.label for one in series)
    shown = {"variant", "steps", "milestones"}
    return [key for key in hidden if key not in shown and key.replace("_", " ") not in labels]


def _words(settings: dict[str, object], keys: Sequence[str]) -> str:
    """Words such as "elu_pre (b) depth 20 lr 0.1"."""
    return " ".join(
        variant_words(str(settings["variant"]))
        if key == "variant"
        else f"{key.replace('_', ' ')} {settings.get(key)}"
        for key in keys
    )
