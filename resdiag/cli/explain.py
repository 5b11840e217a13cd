"""`resdiag explain`: say what happened in a run, or what several show together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.opening import open_runs
from resdiag.cli.options import DataRoot, Json, RunsRoot
from resdiag.errors import UsageError, unknown

if TYPE_CHECKING:
    from resdiag.runs.folder import Run


def explain(
    path: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder; default: the latest run.")
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
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of seeds per lesion.")] = 3,
    start: Annotated[
        str, typer.Option("--from", help="Start of --lesion: init, or checkpoint (the run's last).")
    ] = "init",
    lesion_steps: Annotated[
        int, typer.Option(min=1, help="Training steps per arm of --lesion.")
    ] = 10,
    data: Annotated[str, typer.Option(help="Data set for --lesion; default: the run's.")] = "",
    data_root: DataRoot = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Print what happened in a run: verdict, mechanism, evidence, and what to do next."""
    if start not in ("init", "checkpoint"):
        raise unknown("start of --lesion", start, ["init", "checkpoint"])
    more = [] if lesion else [Path(name) for name in names or []]
    opened = open_runs([path, *more] if path else None, runs)
    if len(opened) > 1 and lesion:
        raise UsageError(f"{path} holds {len(opened)} runs", f"name one, e.g. {opened[0].path}")
    if len(opened) > 1:
        _explain_together(opened, as_json=as_json)
        return
    from resdiag.diagnose.finding import plain
    from resdiag.diagnose.verdict import judge, render

    verdict = judge(opened[0])
    effects = []
    if lesion:
        from resdiag.interventions.compare import open_images, prove

        images = open_images(opened[0], data, data_root)
        effects = prove(
            opened[0], verdict.name, names or [], images, seeds=seeds, steps=lesion_steps,
            from_checkpoint=start == "checkpoint",
        )  # fmt: skip
    if as_json:
        said = verdict.to_dict()
        document = {"schema": 1, "run": str(opened[0].path), "verdict": said}
        document["findings"] = said["findings"]
        if lesion:
            document["lesions"] = [plain(effect.to_dict()) for effect in effects]
        print(json.dumps(document))
        return
    print(render(verdict))
    lines = [effect.describe(float(opened[0].config.lr or 0)) for effect in effects]
    for line in lines if effects or not lesion else [f"none proposed for '{verdict.name}'"]:
        print(f"Lesion    {line}")
    if not lesion and opened[0].config.variant and (untried := _untried(opened[0], verdict.name)):
        print(f"Untried   {untried}")


def _untried(run: "Run", verdict: str) -> str:
    """The interventions that were not tried, and the command that tries them."""
    from resdiag.interventions.table import propose

    names = propose(verdict, run.config.variant)
    return f"{', '.join(names)}: resdiag explain {run.path} --lesion" if names else ""


def _explain_together(runs: "Sequence[Run]", *, as_json: bool) -> None:
    """A line per run, and per network whether its error grows with depth."""
    from resdiag.diagnose.degraded import compare
    from resdiag.diagnose.verdict import judge

    verdicts = [judge(run) for run in runs]
    comparisons = compare(runs)
    if as_json:
        each = [
            {"run": str(run.path), "verdict": verdict.to_dict()}
            for run, verdict in zip(runs, verdicts, strict=True)
        ]
        together = [comparison.to_dict() for comparison in comparisons]
        print(json.dumps({"schema": 1, "runs": each, "comparisons": together}))
        return
    for run, verdict in zip(runs, verdicts, strict=True):
        where = "" if verdict.block is None else f" (block {verdict.block})"
        print(f"{run.path}: {verdict.name}{where}")
    for comparison in comparisons:
        print(f"{comparison.model}: {comparison.name}. {comparison.summary}")
