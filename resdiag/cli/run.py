"""`resdiag run`: train one variant while recording."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.options import DataRoot, Device, Json, RunsRoot, with_settings
from resdiag.cli.output import coloured, keep_quiet, say, say_loading
from resdiag.data.registry import check_data
from resdiag.terminal import has_colour, width_of, wrap
from resdiag.trackers.tracker import TRACKERS, parse_tracker
from resdiag.training.device import find_device
from resdiag.training.interrupt import EXIT_CODES
from resdiag.training.recipe import Request

if TYPE_CHECKING:
    from resdiag.study.cell import Outcome


@with_settings
def run(
    request: Request,
    *,
    context: typer.Context,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Number of CPU threads of PyTorch.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again from the start if the run exists.")
    ] = False,
    allow_drift: Annotated[
        bool,
        typer.Option("--allow-drift", help="Resume even if versions or machine have changed."),
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            help="Also send the values to a tracker; repeatable: "
            + ", ".join(f"{kind.name}:{kind.place}" for kind in TRACKERS.values())
            + "."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
    as_json: Json = False,
) -> int:
    """Train one variant, record it, and print the verdict.

    By default it is trained for 60 steps only; `--recipe paper` is the whole training of the paper.
    """
    request.check()
    check_data(request.data)
    for text in tracker or ():
        parse_tracker(text)
    # every mistake that can be seen without torch has been answered by now
    say_loading(quiet)
    import torch

    from resdiag.study.cell import Options, run_cell

    if threads is not None:
        torch.set_num_threads(threads)
    request = replace(request, device=find_device(device))
    options = Options(
        root=runs,
        data_root=data_root,
        force=force,
        allow_drift=allow_drift,
        quiet=quiet or as_json,
        trackers=tuple(tracker or ()),
    )
    outcome = run_cell(request, options, keep_quiet if quiet else say)
    _print_outcome(outcome, as_json)
    if outcome.run.status != "stopped":
        return 0
    if not quiet:
        say(f"stopped; to go on: {_resume(context.obj)}")
    return EXIT_CODES[outcome.signal]


def _resume(words: Sequence[str]) -> str:
    """The command that continues a run: the same without `--force`, which would start over."""
    return shlex.join(["resdiag", *(word for word in words if word != "--force")])


def _print_outcome(outcome: "Outcome", as_json: bool) -> None:
    from resdiag.diagnose.text import render

    summary = _summarise(outcome)
    if as_json:
        print(json.dumps(summary))
        return
    for note in outcome.notes:
        say(f"note: {note}")
    print(_describe(summary))
    print(render(outcome.verdict, colour=has_colour(sys.stdout)))


def _summarise(outcome: "Outcome") -> dict[str, Any]:
    """The document of `resdiag run --json`."""
    run, verdict = outcome.run, outcome.verdict
    curve = run.curve()
    tested = curve["test_error"].dropna()
    trained = curve["train_error"].dropna()
    return {
        "schema": 1,
        "run": str(run.path),
        "status": run.status,
        "steps": run.steps,
        "resumed_at": outcome.resumed_at,
        "data": run.data.get("name", ""),
        "variant": run.config.variant,
        "depth": run.config.depth,
        "seed": run.config.seed,
        "test_error": {
            "final": float(tested.iloc[-1]) if len(tested) and run.status == "done" else None,
            "best": float(tested.min()) if len(tested) else None,
        },
        "train_error": float(trained.iloc[-1]) if len(trained) else None,
        "verdict": verdict.to_dict(),
        "notes": list(outcome.notes),
    }


def _describe(summary: dict[str, Any]) -> str:
    test = summary["test_error"]
    words = {"final": "at the end", "best": "at best"}
    measured = [f"{test[key]:.2%} {words[key]}" for key in words if test[key] is not None]
    errors = f", test error {', '.join(measured)}" if measured else ""
    if summary["train_error"] is not None:
        errors += f", training error {summary['train_error']:.2%} over the last epoch"
    status = summary["status"]
    text = f"{summary['run']}: {status} after {summary['steps']} steps{errors}"
    lines = wrap(text, width_of(sys.stdout, piped=sys.maxsize), "  ")
    return "\n".join(lines).replace(f": {status}", f": {coloured(status, status)}", 1) + "\n"
