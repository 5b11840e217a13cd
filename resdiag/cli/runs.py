"""`resdiag runs`: what was run, newest first."""

import json
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.options import Json
from resdiag.cli.output import print_table
from resdiag.errors import UsageError, unknown

if TYPE_CHECKING:
    from resdiag.runs.overview import Summary

_HEADER = ("run", "status", "verdict", "steps", "loss", "test error", "age")


def runs(
    root: Annotated[
        Path, typer.Argument(metavar="[DIR]", envvar="RESDIAG_RUNS", help="Folder of runs.")
    ] = Path("runs"),
    variant: Annotated[
        str, typer.Option(help="Only of this variant (id or letter), or of this other model.")
    ] = "",
    status: Annotated[
        str,
        typer.Option(
            help="Only running, done, diverged, stopped, stale, new or damaged; stopped and stale "
            "runs continue by the command that began them."
        ),
    ] = "",
    verdict: Annotated[str, typer.Option(help="Only with this verdict, e.g. healthy.")] = "",
    newest: Annotated[int | None, typer.Option(min=1, help="Only so many, the newest.")] = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first: status, verdict, steps, loss.

    Also test error, and time since the last commit. Runs in folders below DIR are listed, too.
    """
    _check(status, verdict)
    from resdiag.runs.overview import newest_first, summarise

    folders = list(newest_first(root))
    if not folders:
        what = "no run under" if root.exists() else "no such folder:"
        raise UsageError(f"{what} {root}", "resdiag run --variant elu_pre --depth 20 makes one")
    found = _choose(map(summarise, folders), variant, status, verdict)
    listed = list(islice(found, newest))
    if as_json:
        print(json.dumps({"schema": 1, "runs": [_document(one) for one in listed]}))
        return
    now = time.time()
    print_table(_HEADER, [_row(one, root, now) for one in listed], False)


def _check(status: str, verdict: str) -> None:
    from resdiag.runs.overview import STATUSES

    if status and status not in STATUSES:
        raise unknown("status", status, STATUSES)
    if verdict:
        from resdiag.diagnose.registry import FINDINGS, HEALTHY, UNDETERMINED

        known = (*FINDINGS, HEALTHY, UNDETERMINED)
        if verdict not in known:
            raise unknown("verdict", verdict, known)


def _choose(
    summaries: "Iterable[Summary]", variant: str, status: str, verdict: str
) -> "Iterable[Summary]":
    """Those that have all that is asked for."""
    from resdiag.models.variants import VARIANTS, find_variant

    if variant:
        summaries, known = list(summaries), {*VARIANTS}
        models = {one.model for one in summaries}
        if variant not in models:
            if not models <= known:  # models of other people have any name
                known |= models
            try:
                variant = find_variant(variant).id
            except UsageError:
                raise unknown("variant", variant, sorted(known - {""})) from None
    return (
        one
        for one in summaries
        if (not variant or one.model == variant)
        and (not status or one.status == status)
        and (not verdict or one.verdict == verdict)
    )


def _row(one: "Summary", root: Path, now: float) -> Sequence[str]:
    name = one.path if one.path == root else one.path.relative_to(root)
    return (
        str(name),
        one.status,
        one.verdict,
        f"{one.steps}/{one.planned or '?'}" if one.model else "",
        "" if one.loss is None else f"{one.loss:.3g}",
        "" if one.test_error is None else f"{one.test_error:.1%}",
        describe_age(now - one.changed),
    )


def describe_age(seconds: float) -> str:
    """How long ago something was.

    >>> describe_age(42), describe_age(150), describe_age(7300), describe_age(200_000)
    ('42 s', '2 min', '2 h', '2 d')
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0.0, seconds) // unit:.0f} {name}"
    return f"{seconds // 86_400:.0f} d"


def _document(one: "Summary") -> object:
    """The JSON of a run: NaN becomes null, infinities "inf" and "-inf"."""
    from resdiag.diagnose.finding import plain

    return plain({**vars(one), "path": str(one.path)})
