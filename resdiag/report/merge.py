"""Two halves of a study as one: cells that were run elsewhere, or later, join those there are."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.errors import UsageError
from resdiag.report.results import CellResult, Results
from resdiag.report.storage import portable
from resdiag.report.words import listing
from resdiag.study.study import build_study
from resdiag.training.recipe import Request

_ASKED = ("question", "fixed", "grid", "include", "exclude", "expected")
"""What makes two halves the same study; words, figures and resources may have been edited."""


def merge(held: Results, added: Results) -> Results:
    """The cells of both, in the order of a study with the seeds of both.

    A cell that ended in one half stands for that of the other; each keeps its device and versions.
    Cells are compared by their settings, of paths of data by the last part, which alone is kept.

    Args:
        held: What there is.
        added: What joins it; its words, figures and resources are taken.

    Raises:
        UsageError: They are halves of different studies, a cell ended in both and differently,
            cells that differ in their seed only were trained by different numbers or on other data,
            or a half lacks a cell of its study.
    """
    old, new = (portable(dict(half.study.document)) for half in (held, added))
    _refuse_others(held, added, old, new)
    seeds = sorted({*held.study.file.seeds, *added.study.file.seeds})
    study = build_study(
        added.study.name, {**new, "seeds": seeds}, (), mini=False, shown=held.source
    )
    there, joining = ({_key(i.cell.request): i for i in half.cells} for half in (held, added))
    keys = [_key(cell.request) for cell in study.cells]
    lost = [
        c.id for c, key in zip(study.cells, keys, strict=True) if key not in {**there, **joining}
    ]
    if lost:
        raise UsageError(f"{held.source} is damaged: it lacks {listing(lost, 3)}")
    cells = [_settle(_choose(there.get(key), joining.get(key))) for key in keys]
    _refuse_mixtures(cells)
    whole = replace(study, cells=tuple(item.cell for item in cells))
    return Results(study=whole, cells=cells, source=added.source)


def _refuse_others(
    held: Results, added: Results, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    if held.study.name != added.study.name:
        raise UsageError(f"{held.source} holds {held.study.name}, not {added.study.name}")
    differ = [part for part in _ASKED if old.get(part) != new.get(part)]
    if differ:
        raise UsageError(
            f"{held.source} holds {held.study.name} with another {listing(differ)}",
            "only seeds may differ; pass the same --set as for the first results",
        )


def _key(request: Request) -> str:
    """The identity of a cell, independent of the machine and of the path of its data."""
    return repr(portable(asdict(replace(request, device="any"))))


def _choose(old: CellResult | None, new: CellResult | None) -> CellResult:
    """The one that came further.

    Raises:
        UsageError: Both ended, and not alike.
    """
    both = [item for item in (old, new) if item is not None]
    if old and new and old.ended and new.ended:
        differ = _differences(old, new)
        if differ:
            raise UsageError(
                f"{new.cell.id} ended twice and differently: {listing(differ)}",
                "freeze one of them into another folder",
            )
    return max(both, key=lambda item: (item.ended, item.run is not None, bool(item.message)))


def _settle(item: CellResult) -> CellResult:
    """The cell with the settings that it is frozen with: seeds run anywhere are one group."""
    request = Request(**portable(asdict(item.cell.request)))
    return replace(item, cell=replace(item.cell, request=request))


def _differences(old: CellResult, new: CellResult) -> list[str]:
    """The outcomes of a cell that two runs of it do not share."""
    ours, theirs = ({**plain(dict(item.outcomes)), "state": item.state} for item in (old, new))  # type: ignore[dict-item]
    return [
        f"{name} {ours[name]} and {theirs[name]}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]


def _refuse_mixtures(cells: list[CellResult]) -> None:
    """Seeds of one setting must be of one training: the file may say the same, a recipe not."""
    first: dict[str, CellResult] = {}
    for item in cells:
        if item.run is None:
            continue
        other = first.setdefault(_key(replace(item.cell.request, seed=0)), item)
        ours, theirs = _training(item), _training(other)
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        if differ:
            raise UsageError(
                f"{item.cell.id} and {other.cell.id} differ in more than the seed: "
                f"{listing(differ)}"
            )


def _training(item: CellResult) -> dict[str, Any]:
    """The numbers by which a run was trained, and the identity of its data."""
    assert item.run is not None
    config = portable(item.run.config.to_dict())
    free = ("seed", "device")
    return {
        **{name: value for name, value in config.items() if name not in free},
        "data": item.run.data.get("sha256"),
    }
