"""`resdiag explain`: say what happened in a run, or what several show together."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.opening import open_runs_or_logs
from resdiag.cli.options import DataRoot, Json, RunsRoot
from resdiag.cli.output import coloured, print_entry, say_loading
from resdiag.errors import UsageError, unknown
from resdiag.terminal import has_colour

if TYPE_CHECKING:
    from resdiag.data.dataset import ImageData
    from resdiag.diagnose.verdict import Verdict
    from resdiag.interventions.compare import Effect
    from resdiag.probe.examination import Examination
    from resdiag.runs.folder import Run

_STARTS = ("init", "checkpoint")


def explain(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|LOG]",
            help="Run folder, or a log of another tool: a file or its folder; default: the latest "
            "run.",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|LESION]...",
            help="More runs: test if the error grows with depth. With --lesion: names of lesions.",
        ),
    ] = None,
    lesion: Annotated[
        bool,
        typer.Option("--lesion", help="Test the cause: change one thing and train a few steps."),
    ] = False,
    ask: Annotated[
        bool,
        typer.Option(
            "--ask",
            help="Experiment on one batch: memorise it, sweep the learning rate, check gradients.",
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of seeds per lesion.")] = 3,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            help="Start of --lesion or --ask: init, or checkpoint (the run's last); default: init "
            "for --lesion, the checkpoint if there is one for --ask.",
        ),
    ] = "",
    lesion_steps: Annotated[
        int, typer.Option(min=1, help="Training steps per arm of --lesion.")
    ] = 10,
    data: Annotated[
        str, typer.Option(help="Data set for --lesion and --ask; default: the run's.")
    ] = "",
    data_root: DataRoot = None,
    log_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Format of a log, if its name does not say it: trainer_state, tensorboard, wandb, "
            "jsonl or csv.",
        ),
    ] = "",
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Print what happened in a run, why, and what to do next.

    That is its verdict, the mechanism, and the evidence. Of several runs: a line each, and whether
    the error grows with the depth. A log of the Hugging Face Trainer, TensorBoard or W&B, or a CSV
    table, is judged as far as its loss, gradient norm and learning rate go.
    """
    if start not in ("", *_STARTS):
        raise unknown("start", start, _STARTS)
    more = [] if lesion else [Path(name) for name in names or []]
    opened = open_runs_or_logs([path, *more] if path else None, runs, log_format)
    if len(opened) > 1 and (lesion or ask):
        raise UsageError(f"{path} holds {len(opened)} runs", f"e.g. {place_of(opened[0])}")
    if len(opened) > 1:
        _explain_together(opened, as_json=as_json)
        return
    run = opened[0]
    if (lesion or ask) and is_log(run):
        raise UsageError(
            f"{place_of(run)} is a log: --lesion and --ask need the network",
            "in Python: print(resdiag.examine(model, batch, optimizer=optimizer))",
        )
    images = _open_images(run, data, data_root, ask=ask) if lesion or ask else None
    effects: list[Effect] = []
    examination = None
    if lesion and images is not None:
        effects = _test(run, names or [], images, seeds, lesion_steps, start)
    if ask and images is not None:
        from resdiag.interventions.examine_run import examine_run

        examination = examine_run(run, images, start=start)
    _print(run, effects if lesion else None, examination, as_json=as_json)


def _open_images(run: "Run", data: str, root: Path | None, *, ask: bool) -> "ImageData":
    """The images of a run; what cannot be examined is refused before they are read."""
    say_loading()
    from resdiag.interventions.compare import open_images

    if ask:
        from resdiag.interventions.examine_run import check_examinable

        check_examinable(run)
    return open_images(run, data, root)


def _test(
    run: "Run", names: Sequence[str], images: "ImageData", seeds: int, steps: int, start: str
) -> "list[Effect]":
    """Try lesions; none named takes those that the verdict proposes."""
    from resdiag.diagnose.verdict import judge
    from resdiag.interventions.compare import prove

    return prove(
        run, judge(run).name, names, images, seeds=seeds, steps=steps,
        from_checkpoint=start == "checkpoint",
    )  # fmt: skip


def _print(
    run: "Run",
    effects: "Sequence[Effect] | None",
    examination: "Examination | None",
    *,
    as_json: bool,
) -> None:
    """The verdict, then what lesions (None if not asked for) and experiments came to."""
    from resdiag.diagnose.finding import plain
    from resdiag.diagnose.text import render
    from resdiag.diagnose.verdict import judge

    verdict = judge(run)
    logged = is_log(run)
    if logged:
        verdict = _of_log(verdict)
    if as_json:
        said = verdict.to_dict()
        document: dict[str, object] = {"schema": 1, "run": place_of(run), "verdict": said}
        if logged:
            document["log"] = list(run.notes)
        document["findings"] = said["findings"]
        if effects is not None:
            document["lesions"] = [plain(effect.to_dict()) for effect in effects]
        if examination is not None:
            document["examination"] = examination.to_dict()
        print(json.dumps(document))
        return
    print(render(verdict, colour=has_colour(sys.stdout)))
    if logged:
        print_entry("Log", list(run.notes))
    lines = [effect.describe(float(run.config.lr or 0)) for effect in effects or ()]
    if effects is not None:
        print_entry("Lesion", lines or [f"none proposed for '{verdict.name}'"])
    if examination is not None:
        print(examination)
    if effects is None and run.config.variant and (untried := _untried(run, verdict.name)):
        print_entry("Untried", [untried])


def is_log(run: "Run") -> bool:
    """Whether a run was read from a log of another tool."""
    return bool(_log_of(run))


def place_of(run: "Run") -> str:
    """The run's folder, or the file of a log."""
    return _log_of(run) or str(run.path)


def _log_of(run: "Run") -> str:
    return str(getattr(run.config, "settings", {}).get("log", ""))


_BLOCKS = "resdiag.attach(model, optimizer)  # records what no log has: blocks, gradients, updates"


_OF_LOGS = {"loss", "grad_norm", "lr", "train_loss", "test_loss"}
"""What rules need and logs can have."""

_ALSO_OF_LOGS = ("lr_too_high",)  # it does without the updates that it names


def _of_log(verdict: "Verdict") -> "Verdict":
    """A verdict on a log, which has no blocks to draw; the rules that need them are one line."""
    from resdiag.diagnose.registry import FINDINGS

    judged = [name for name, row in FINDINGS.items() if name in _ALSO_OF_LOGS
              or set(row.needs) <= _OF_LOGS]  # fmt: skip
    rules = {line: line.partition(":")[0] for line in verdict.not_judged}
    unjudged = [line for line, rule in rules.items() if rule in judged or rule not in FINDINGS]
    many = len(FINDINGS) - len(judged)
    unjudged.append(f"{many} other rules: a log has no blocks, no updates and no model")
    useful = [line for line in verdict.next if not line.startswith("resdiag ")]
    waiting = tuple(item for item in verdict.waiting if item.name in judged)
    return replace(verdict, next=(*useful, _BLOCKS), not_judged=tuple(unjudged), waiting=waiting)


def _untried(run: "Run", verdict: str) -> str:
    """The command that tries interventions, and the names of those."""
    from resdiag.interventions.table import propose

    names = propose(verdict, run.config.variant)
    return (
        f"resdiag explain {shlex.quote(str(run.path))} --lesion  # {', '.join(names)}"
        if names
        else ""
    )


def _explain_together(runs: "Sequence[Run]", *, as_json: bool) -> None:
    """A line per run, and per network whether its error grows with depth."""
    from resdiag.diagnose.degraded import compare
    from resdiag.diagnose.text import severity
    from resdiag.diagnose.verdict import judge

    verdicts = [judge(run) for run in runs]
    comparisons = compare(runs)
    if as_json:
        each = [
            {"run": place_of(run), "verdict": verdict.to_dict()}
            for run, verdict in zip(runs, verdicts, strict=True)
        ]
        together = [comparison.to_dict() for comparison in comparisons]
        print(json.dumps({"schema": 1, "runs": each, "comparisons": together}))
        return
    for run, verdict in zip(runs, verdicts, strict=True):
        where = "" if verdict.block is None else f" (block {verdict.block})"
        print(f"{place_of(run)}: {coloured(verdict.name, severity(verdict))}{where}")
    for comparison in comparisons:
        print(f"{comparison.model}: {comparison.name}. {comparison.summary}")
