"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunsRoot = Annotated[
    Path, typer.Option("--runs", envvar="RESDIAG_RUNS", help="Folder that holds the runs.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RESDIAG_DATA", help="Folder of downloaded data sets."),
]
