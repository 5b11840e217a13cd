"""`resdiag bench`: how good resdiag's own answers are."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.app import group
from resdiag.cli.options import Json
from resdiag.cli.output import print_table, say
from resdiag.errors import unknown
from resdiag.terminal import can_redraw, open_console
from resdiag.training.display import LINE_EVERY_S

if TYPE_CHECKING:
    from resdiag.pathologies.grammar import Case
    from resdiag.pathologies.result import Result
    from resdiag.pathologies.score import Score

bench_app = group("Measure how good resdiag's own answers are.")
_SETS = ("development", "locked", "quick")


@bench_app.command("pathologies")
def pathologies(
    which: Annotated[str, typer.Option("--set", help=f"{', '.join(_SETS)}.")] = "quick",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed by which the cases of the set are drawn.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first cases.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes, each with one thread of PyTorch.")
    ] = 1,
    to: Annotated[
        Path | None,
        typer.Option(
            help="File of results, one JSON object per line; cases that it holds are not run again."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plant faults in small trainings and count right verdicts.

    Healthy trainings are among them. A set has about 1200 trainings with a fault and 150 healthy
    ones, of about 3 seconds each; any beginning of it (--limit) is a mixture of all kinds.
    Thresholds of rules are set on the development set only; the locked set has other families of
    architectures.
    """
    if which not in _SETS:
        raise unknown("set", which, _SETS)
    from resdiag.pathologies.grammar import draw
    from resdiag.pathologies.score import Score
    from resdiag.pathologies.suite import read_results

    if to is not None:
        read_results(to)  # a wrong file is refused before anything is drawn
    cases = draw(which, seed)[:limit]
    score = Score(_run(cases, jobs, to))
    if as_json:
        print(json.dumps(_document(which, seed, score)))
    else:
        _print(which, seed, score)


def _run(cases: "Sequence[Case]", jobs: int, to: Path | None) -> "list[Result]":
    """Try the cases behind a progress bar on standard error, or a line now and then in a pipe."""
    from resdiag.pathologies.suite import run_cases

    done = wrong = 0
    with _open_progress(len(cases)) as show:

        def tell(result: "Result") -> None:
            nonlocal done, wrong
            done, wrong = done + 1, wrong + (not result.is_right)
            show(done, f"trainings, {wrong} judged wrong")

        return run_cases(cases, jobs=jobs, to=to, tell=tell)


@contextmanager
def _open_progress(total: int) -> "Iterator[Callable[[int, str], None]]":
    """What shows the number of trainings that are done, and a remark."""
    if not can_redraw(sys.stderr):
        last = time.monotonic()

        def tell(done: int, words: str) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S or done == total:
                last = time.monotonic()
                say(f"{done}/{total} {words}")

        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
    console = open_console(sys.stderr)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("trainings", total=total)
        yield lambda done, words: bar.update(task, completed=done, description=words)


def _document(which: str, seed: int, score: "Score") -> dict[str, object]:
    return {
        "schema": 1,
        "set": which,
        "seed": seed,
        "scores": score.to_dict(),
        "by_finding": {name: part.to_dict() for name, part in score.by(_wanted).items()},
        "confusion": {name: dict(row) for name, row in score.confusion().items()},
        "cases": [result.to_dict() for result in score.results],
    }


def _wanted(result: "Result") -> str:
    return result.wanted


def _print(which: str, seed: int, score: "Score") -> None:
    """The rates, a line per finding, and the misses with their reasons."""
    from resdiag.pathologies.score import NEAR, explain_miss, order

    say(f"{which} set, seed {seed}: {len(score.planted)} faults, {len(score.healthy)} healthy")
    rates = (
        ("precision", score.precision),
        ("recall", score.recall),
        ("block named, of those found", score.block_named),
        (f"date within {NEAR} steps, of those found", score.date_near),
        ("healthy, but a fault is named", score.false_alarms),
        ("healthy, with any finding", score.any_finding),
        ("healthy and called so", score.called_healthy),
        ("faults without an effect, not counted", score.harmless),
        ("crashed", score.crashed),
    )
    print_table(("rate", "value [95 %] (count)"), [(n, str(r)) for n, r in rates], as_json=False)
    print(f"median error of the date: {score.date_error:g} steps\n")
    parts = score.by(_wanted)
    rows = [
        (name, str(len(parts[name].planted)), *_words(parts[name]))
        for name in sorted(parts, key=order)
        if name != "healthy"
    ]
    print_table(("planted", "cases", "recall", "block named"), rows, as_json=False)
    for miss in score.misses():
        print(f"{miss.case.name}: wanted {miss.wanted}, {explain_miss(miss)}")


def _words(part: "Score") -> tuple[str, str]:
    return str(part.recall), str(part.block_named)
