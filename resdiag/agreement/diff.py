"""`resdiag.diff`: two runs that should agree, and the first place where they do not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from resdiag.agreement.differences import Differences, compare_tables, differing_settings
from resdiag.agreement.parting import find_first, table_rows
from resdiag.agreement.places import PLACES
from resdiag.agreement.result import Agreement
from resdiag.agreement.tolerance import MARGIN, Tolerance, find_rounding
from resdiag.diagnose.rundata import RunData
from resdiag.errors import UsageError
from resdiag.runs.folder import Run
from resdiag.runs.watched import Source, load_run, load_runs


def diff(
    a: Source,
    b: Source,
    *,
    repeat: "Source | Sequence[Source] | None" = None,
    tolerance: float | None = None,
) -> Agreement:
    """Compare two runs that should agree, and find the first place where they part.

    The place is the first one in the order of computation: of the first step with a difference, the
    data, the forward pass block by block, the loss, the backward pass from the last block to the
    first, the optimizer's settings, the updates. Only steps that both runs recorded are compared,
    and every loss that both have. Differences are relative: of norms to the larger one, of moments
    to the RMS of the tensor, of losses to the largest loss so far.

    Args:
        a: A run, a monitor, or the folder of a run.
        b: The same, of a network with the same blocks.
        repeat: A run that repeats `a`, or several: what they show, times 10, is the tolerance, per
            metric and step. Without one, it is what rounding explains, by the coarsest dtype in
            the runs and the depth: see `resdiag.agreement.tolerance.Rounding`.
        tolerance: A relative difference to use for all metrics instead.

    Raises:
        UsageError: The networks have different blocks, no step is in both runs, the tolerance is
            negative, or a folder holds no run.

    Example:
        >>> import torch, resdiag
        >>> def train(change):
        ...     net = resdiag.build_model("elu", 8, seed=0)
        ...     next(net.stages[1].parameters()).data.mul_(change)
        ...     with resdiag.attach(net) as monitor:
        ...         net(torch.ones(4, 3, 32, 32)).square().mean().backward()
        ...         monitor.step()
        ...     return monitor
        >>> result = resdiag.diff(train(1.0), train(1.01))
        >>> result.agree, result.first.step, result.first.block, result.first.direction
        (False, 0, 1, 'forward')
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance {tolerance} must be a number that is at least 0")
    given = [] if repeat is None else load_runs(repeat)
    runs = [load_run(a), load_run(b), *given]
    names = ["A", "B", *(f"repeat {at}" for at in range(1, len(given) + 1))]
    seen = [RunData(run) for run in runs]
    for name, run in zip(names[1:], runs[1:], strict=True):
        _check_blocks(runs[0], run, name)
    tables = compare_tables(seen[0], seen[1])
    if not tables:
        raise UsageError(_nothing_in_common(seen[0], seen[1]))
    explained = find_rounding(runs[:2], [_stated_dtype(source) for source in (a, b)])
    rounding = Tolerance("rounding", explained.words, explained)
    allowed = rounding
    if tolerance is not None:
        allowed = Tolerance("given", f"{tolerance:g} relative, as given", given=tolerance)
    elif given:
        allowed = _by_repeats(seen[0], seen[2:], rounding)
    any_size = Tolerance("none", "no difference")
    labels = {int(row["index"]): str(row.get("name", "")) for row in runs[0].blocks}
    return Agreement(
        a=_name(runs[0], "A"),
        b=_name(runs[1], "B"),
        first=find_first(tables, allowed, labels),
        first_of_any_size=find_first(tables, any_size, labels),
        first_beyond_rounding=find_first(tables, rounding, labels),
        differs=_differing(runs[0], runs[1]),
        notes=tuple(_notes(seen, tables)),
        tolerance=allowed.words,
        rows=tuple(table_rows(tables, allowed, labels)),
        steps=_steps(seen[0], seen[1], tables),
        blocks=len(runs[0].blocks),
        losses=_last_losses(tables),
        tables=tables,
    )


def _by_repeats(a: RunData, repeats: Sequence[RunData], rounding: Tolerance) -> Tolerance:
    shown = tuple(compare_tables(a, one) for one in repeats)
    largest = max(
        (float(np.nanmax(table.relative)) for tables in shown for table in tables.values()),
        default=0.0,
    )
    many = "a repeat of A" if len(repeats) == 1 else f"{len(repeats)} repeats of A"
    words = f"{MARGIN} x the largest difference that {many} shows so far, per metric"
    if not largest:
        words = f"none: {many} is the same to the last bit, so every difference counts"
    return Tolerance("repeat", words, rounding.rounding, shown)


def _notes(seen: Sequence[RunData], tables: Mapping[str, Differences]) -> Iterable[str]:
    a, b, *repeats = seen
    if (a.steps or b.steps) and a.steps != b.steps:
        common = len(set(a.steps) & set(b.steps))
        yield f"recorded steps: {len(a.steps)} in A, {len(b.steps)} in B, {common} compared"
    if a.run.steps != b.run.steps:
        yield f"A has {a.run.steps} steps and B {b.run.steps}: the shorter one ends the comparison"
    if a.run.point != b.run.point:
        yield (
            f"gradients of parameters were read at '{a.run.point}' in A and at '{b.run.point}' in "
            "B, which may be different numbers"
        )
    in_a, in_b = _known_metrics(a), _known_metrics(b)
    for name, own, others in (("A", in_a, in_b), ("B", in_b, in_a)):
        only = sorted((own - others) & set(PLACES))
        if only:
            more = "" if len(only) <= 6 else f" and {len(only) - 6} more"
            yield f"only {name} has {', '.join(only[:6])}{more}"
    last = max((int(table.steps[-1]) for table in tables.values()), default=0)
    for at, one in enumerate(repeats, start=1):
        if one.steps and one.steps[-1] < last:
            yield (
                f"repeat {at} ends at step {one.steps[-1]}: what it showed until then is the "
                "tolerance of later steps"
            )


def _known_metrics(seen: RunData) -> set[str]:
    """Metrics per block of which a run has any value."""
    return {str(name) for name, column in seen.metrics.items() if column.notna().any()}


def _differing(a: Run, b: Run) -> dict[str, tuple[object, object]]:
    """Settings, environment and data that differ; blocks' names too."""
    found: dict[str, tuple[object, object]] = {}
    found |= differing_settings(a.config.to_dict(), b.config.to_dict())
    found |= differing_settings({"environment": a.environment}, {"environment": b.environment})
    found |= differing_settings({"data": a.data}, {"data": b.data})
    for one, other in zip(a.blocks, b.blocks, strict=True):
        if one.get("name") != other.get("name"):
            found["name of block " + str(one["index"])] = (one.get("name"), other.get("name"))
    return found


def _check_blocks(a: Run, b: Run, name: str) -> None:
    if len(a.blocks) != len(b.blocks):
        raise UsageError(
            f"A has {len(a.blocks)} blocks and {name} has {len(b.blocks)}: "
            "only runs of the same network can agree"
        )
    for one, other in zip(a.blocks, b.blocks, strict=True):
        shapes = [list(block.get("shape") or ()) for block in (one, other)]
        if all(shapes) and shapes[0] != shapes[1]:
            raise UsageError(
                f"block {one['index']} has the shape {shapes[0]} in A and {shapes[1]} in {name}: "
                "only runs of the same network can agree"
            )


def _nothing_in_common(a: RunData, b: RunData) -> str:
    ends = [f"{steps[0]} to {steps[-1]}" if steps else "none" for steps in (a.steps, b.steps)]
    return f"no step is in both runs: recorded steps of A: {ends[0]}, of B: {ends[1]}"


def _stated_dtype(source: Source) -> str:
    """The dtype of the parameters that a monitor watches."""
    metadata = getattr(source, "metadata", {})
    return str(metadata.get("dtype", ""))


def _name(run: Run, letter: str) -> str:
    return str(run.path) if run.path != Path() else f"{letter} ({run.label})"


def _steps(a: RunData, b: RunData, tables: Mapping[str, Differences]) -> tuple[int, ...]:
    common = sorted(set(a.steps) & set(b.steps))
    if not common and "loss" in tables:
        common = [int(step) for step in tables["loss"].steps]
    return tuple(common)


def _last_losses(tables: Mapping[str, Differences]) -> tuple[int, float, float] | None:
    for name in ("loss", "head_loss"):
        if name in tables:
            table = tables[name]
            return int(table.steps[-1]), float(table.a[-1, 0]), float(table.b[-1, 0])
    return None
