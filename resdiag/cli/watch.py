"""`resdiag watch`: follow runs on disk while somebody else writes them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.options import Json
from resdiag.cli.output import say
from resdiag.terminal import open_console

if TYPE_CHECKING:
    from resdiag.live.runs import Seen

_POLL_S = 1.0


def watch(
    path: Annotated[
        Path, typer.Argument(metavar="[RUN|DIR]", help="A run, or a folder that holds runs.")
    ] = Path("runs"),
    http: Annotated[
        bool, typer.Option("--http", help="Serve a page with growing plots on 127.0.0.1.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --http; 0: any.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="Print how it stands, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Follow runs on disk: step, loss, gradients, findings as they come.

    Ends with Ctrl-C, or when every run has ended.
    """
    from resdiag.live.runs import FollowedRuns

    if http:
        _serve(path, port)
        return
    runs = FollowedRuns(path)
    if once or as_json:
        found = runs.look()
        if as_json:
            shown = [{"name": one.name, **one.snapshot.to_dict()} for one in found]
            print(json.dumps({"schema": 1, "runs": shown}))
            return
        _print(found)
        return
    from resdiag.live.panel import follow_runs

    follow_runs(runs, every=_POLL_S)


def _serve(path: Path, port: int) -> None:
    from resdiag.live.server import serve

    with serve(path, port) as server:
        server.look()  # a folder that is not there is said here
        say(server.url)
        server.serve_forever()


def _print(found: "list[Seen]") -> None:
    from resdiag.live.panel import draw_one

    console = open_console(sys.stdout)
    for one in found:
        console.print(draw_one(one, console.width, len(found)))
