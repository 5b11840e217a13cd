"""`resdiag bench`: what watching costs, and how often the verdict is right."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.app import group
from resdiag.cli.options import Json
from resdiag.cli.output import print_table, say
from resdiag.errors import UsageError, unknown
from resdiag.models.variants import count_blocks, find_variant

if TYPE_CHECKING:
    from resdiag.study.calibration import Result

bench_app = group("What watching costs on this machine, and how often the verdict is right.")


@bench_app.command("overhead")
def overhead(
    variant: Annotated[str, typer.Option(help="Variant id or the paper's letter.")] = "original",
    depth: Annotated[int, typer.Option(help="Weighted layers, 6n+2.")] = 110,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 128,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of PyTorch.")] = 2,
    repetitions: Annotated[int, typer.Option(min=2, help="Steps of every arm.")] = 12,
    as_json: Json = False,
) -> None:
    """Step time with a monitor over step time without, interleaved; `null` is the noise.

    `ratio` is that of the clock with its quartiles, `cpu` that of the processor's time.
    """
    row = find_variant(variant)
    count_blocks(depth)
    if not row.shortcut:
        raise UsageError(f"variant '{row.id}' has no residual blocks to record", "try original")
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from resdiag.study.overhead import machine, measure, plain_seconds, summarise

    torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as progress:
        task = progress.add_task("repetitions", total=repetitions)
        times, busy = measure(
            row.id, depth, batch_size, repetitions, lambda: progress.advance(task)
        )
    rows = summarise(times, busy)
    if as_json:
        setting = {"variant": row.id, "depth": depth, "batch_size": batch_size}
        plain = {"plain_s": plain_seconds(times)}
        print(json.dumps({"schema": 1, **setting, **machine(), **plain, "rows": rows}))
        return
    say(f"{row.id}-{depth}, batch {batch_size}, {machine()}")
    say(f"plain step: {plain_seconds(times):.3f} s")
    header = ("name", "every", "ratio", "q25", "q75", "cpu", "n")
    cells = [[format(r[k], ".3f") if k[0] in "rqc" else str(r[k]) for k in header] for r in rows]
    print_table(header, cells, as_json)


@bench_app.command("pathologies")
def pathologies(
    which: Annotated[
        str,
        typer.Option("--set", help="quick, development, held-out, fresh, or all but quick."),
    ] = "quick",
    to: Annotated[Path | None, typer.Option(help="Write every case as JSON there.")] = None,
    as_json: Json = False,
) -> None:
    """Plant faults in small trainings, and count how often the verdict names them.

    Of `quick` half a minute, of `all` about a quarter of an hour of one core.
    """
    sets = {"all": _SETS[1:]}.get(which, (which,))
    if sets[0] not in _SETS:
        raise unknown("set", which, [*_SETS, "all"])
    from resdiag.study.calibration import cases, try_case

    results = []
    for name in sets:
        every = cases(name)
        for number, case in enumerate(every, 1):
            results.append(try_case(case, name))
            result = results[-1]
            mark = "" if result.verdict == result.wanted else " !"
            say(f"{name} {number}/{len(every)} {case.name}: {result.verdict}{mark}")
    document = {"schema": 1, "cases": [result.to_dict() for result in results]}
    if to is not None:
        to.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if as_json:
        scores = {name: _scores([r for r in results if r.set == name]) for name in sets}
        print(json.dumps({**document, "scores": scores}))
        return
    for name in sets:
        of = [result for result in results if result.set == name]
        print(f"{name}: {_summary(of)}")
        print_table(_HEADER, _score_rows(of), as_json)


_SETS = ("quick", "development", "held-out", "fresh")
_HEADER = ("verdict", "planted", "given", "right", "precision", "recall")


def _score_rows(results: "list[Result]") -> list[list[str]]:
    from resdiag.study.calibration import score

    return [
        [row.finding, *map(str, row.counts), f"{row.precision:.3f}", f"{row.recall:.3f}"]
        for row in score(results)
    ]


def _scores(results: "list[Result]") -> dict[str, Any]:
    """For JSON: the counts; rates can be had from them."""
    from resdiag.study.calibration import count_blocks_named, count_false_alarms, score

    named, placed = count_blocks_named(results)
    alarms, healthy = count_false_alarms(results)
    blocks = {"named": named, "planted": placed}
    return {
        "verdicts": [vars(row) for row in score(results)],
        "blocks": blocks,
        "healthy": {"alarms": alarms, "trainings": healthy},
    }


def _summary(results: "list[Result]") -> str:
    from resdiag.study.calibration import count_blocks_named, count_false_alarms

    named, placed = count_blocks_named(results)
    alarms, healthy = count_false_alarms(results)
    return (
        f"{len(results)} trainings; a finding in {alarms} of {healthy} healthy ones; "
        f"the ill block named in {named} of {placed}"
    )
