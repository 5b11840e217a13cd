"""`resdiag bench`: what watching costs on this machine."""

import json
import statistics
from typing import Annotated

import typer

from resdiag.commands.app import group
from resdiag.commands.options import Json
from resdiag.commands.output import print_table, say
from resdiag.errors import UsageError
from resdiag.models.variants import count_blocks, find_variant

bench_app = group("What watching costs on this machine.")


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

    from resdiag.study.overhead import machine, measure, summarise

    torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as progress:
        task = progress.add_task("repetitions", total=repetitions)
        times, busy = measure(
            row.id, depth, batch_size, repetitions, lambda: progress.advance(task)
        )
    rows = summarise(times, busy)
    if as_json:
        setting = {"variant": row.id, "depth": depth, "batch_size": batch_size}
        plain = statistics.median(times["plain"])
        print(json.dumps({"schema": 1, **setting, **machine(), "plain_s": plain, "rows": rows}))
        return
    say(f"{row.id}-{depth}, batch {batch_size}, {machine()}")
    say(f"plain step: {statistics.median(times['plain']):.3f} s")
    header = ("name", "every", "ratio", "q25", "q75", "cpu", "n")
    cells = [[format(r[k], ".3f") if k[0] in "rqc" else str(r[k]) for k in header] for r in rows]
    print_table(header, cells, as_json)
