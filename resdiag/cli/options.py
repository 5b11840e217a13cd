"""Options that several commands share, and those that follow from the table of run settings."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from resdiag.errors import unknown
from resdiag.runs.config import row_of
from resdiag.training.recipe import Request

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunsRoot = Annotated[
    Path, typer.Option("--runs", envvar="RESDIAG_RUNS", help="Folder that holds the runs.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RESDIAG_DATA", help="Folder of downloaded data sets."),
]


def with_settings(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command an option for each run setting that it does not define itself.

    Args:
        command: Takes what was given as a `Request`, first, and its own options.

    Returns:
        The command with all options, as Typer reads them from its signature.
    """
    own = dict(list(inspect.signature(command, eval_str=True).parameters.items())[1:])
    options = {e.name: _option(e) for e in fields(Request) if e.name not in own}

    @functools.wraps(command)
    def run(**given: Any) -> int:  # noqa: ANN401
        asked = {entry.name: given[entry.name] for entry in fields(Request)}
        rest = {name: value for name, value in given.items() if name not in options}
        return command(Request(**asked), **rest)

    parameters = [*options.values(), *own.values()]
    run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(entry: "Field[Any]") -> inspect.Parameter:
    """The option of one setting; one that is off by default has no `--no-` form."""
    names = [f"--{entry.name.replace('_', '-')}"] if entry.default is False else []
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
        annotation=Annotated[entry.type, typer.Option(*names, help=row_of(entry).help)],
    )


def check_device(device: str) -> None:
    """Refuse a `--device` that no machine has.

    Raises:
        UsageError: Naming the valid ones.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:N"])
