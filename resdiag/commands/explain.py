"""`resdiag explain`: say what happened in a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from resdiag.commands.opening import open_runs
from resdiag.commands.options import Json, RunsRoot
from resdiag.errors import UsageError


def explain(
    path: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Latest if none.")] = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what happened in a run: verdict, why, evidence, and what to look at next."""
    opened = open_runs([path] if path else None, runs)
    if len(opened) > 1:
        raise UsageError(f"{path} holds {len(opened)} runs", f"name one, e.g. {opened[0].path}")
    from resdiag.explain.verdict import judge, render

    verdict = judge(opened[0])
    if as_json:
        print(json.dumps({"schema": 1, "run": str(opened[0].path), "verdict": verdict.to_dict()}))
    else:
        print(render(verdict))
