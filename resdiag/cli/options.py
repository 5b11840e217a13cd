"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from resdiag.errors import unknown

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunsRoot = Annotated[
    Path, typer.Option("--runs", envvar="RESDIAG_RUNS", help="Folder that holds the runs.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RESDIAG_DATA", help="Folder of downloaded data sets."),
]


def check_device(device: str) -> None:
    """Refuse a `--device` that no machine has.

    Raises:
        UsageError: Naming the valid ones.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:N"])
