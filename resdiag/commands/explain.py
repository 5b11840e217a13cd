"""`resdiag explain`: say what happened in a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from resdiag.commands.opening import open_runs
from resdiag.commands.options import DataRoot, Json, RunsRoot
from resdiag.errors import UsageError, unknown


def explain(
    path: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Latest if none.")] = None,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LESION]...", help="With --lesion: which, else those proposed."),
    ] = None,
    lesion: Annotated[
        bool, typer.Option("--lesion", help="Prove the cause: change one thing, run a few steps.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of each lesion.")] = 3,
    start: Annotated[
        str, typer.Option("--from", help="Of --lesion: init, or checkpoint, the run's last one.")
    ] = "init",
    lesion_steps: Annotated[int, typer.Option(min=1, help="Steps of each arm.")] = 10,
    data: Annotated[str, typer.Option(help="Images for --lesion, if not the run's name.")] = "",
    data_root: DataRoot = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say what happened in a run: verdict, why, evidence, and what to look at next."""
    if names and not lesion:
        raise UsageError(f"one run at a time: '{names[0]}'", "or lesions, with --lesion")
    if start not in ("init", "checkpoint"):
        raise unknown("start of --lesion", start, ["init", "checkpoint"])
    opened = open_runs([path] if path else None, runs)
    if len(opened) > 1:
        raise UsageError(f"{path} holds {len(opened)} runs", f"name one, e.g. {opened[0].path}")
    from resdiag.explain.finding import plain
    from resdiag.explain.verdict import judge, render

    verdict = judge(opened[0])
    effects = []
    if lesion:
        from resdiag.study.effect import open_images, prove

        images = open_images(opened[0], data, data_root)
        effects = prove(
            opened[0], verdict.name, names or [], images, seeds=seeds, steps=lesion_steps,
            from_checkpoint=start == "checkpoint",
        )  # fmt: skip
    if as_json:
        document = {"schema": 1, "run": str(opened[0].path), "verdict": verdict.to_dict()}
        if lesion:
            document["lesions"] = [plain(effect.to_dict()) for effect in effects]
        print(json.dumps(document))
        return
    print(render(verdict))
    lines = [effect.describe(float(opened[0].config.lr or 0)) for effect in effects]
    for line in lines if effects or not lesion else [f"none proposed for '{verdict.name}'"]:
        print(f"Lesion    {line}")
