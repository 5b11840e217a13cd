"""Options that several commands share, and those that follow from the table of run settings."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from resdiag.errors import UsageError
from resdiag.models.variants import list_variants
from resdiag.runs.config import row_of
from resdiag.training.device import check_device
from resdiag.training.recipe import Request

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", callback=check_device)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunPaths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN]...", help="Run folders; default: the latest run."),
]
RunsRoot = Annotated[
    Path, typer.Option("--runs", envvar="RESDIAG_RUNS", help="Folder that holds the runs.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RESDIAG_DATA", help="Folder of downloaded data sets."),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, transformers:NAME, resdiag:VARIANT-DEPTH or "
        "package.module:factory.",
    ),
]
Argument = Annotated[
    list[str] | None,
    typer.Option("--arg", help="key=value argument of the factory or configuration; repeatable."),
]
Blocks = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of module names to use as blocks; repeatable."),
]
InputShape = Annotated[
    str | None,
    typer.Option(help="Shape of one sample, e.g. 3,64,64, or number of tokens."),
]


class Command:
    """A command one of whose parameters stands for options that follow from a table.

    Args:
        function: The command.
        parameter: The name of that parameter.
        options: The options. It is called whenever Typer reads them: tables can grow.
        gather: Takes what was given; takes the options out of it and returns the argument.
    """

    def __init__(
        self,
        function: Callable[..., int],
        parameter: str,
        options: Callable[[], Iterable[inspect.Parameter]],
        gather: Callable[[dict[str, Any]], object],
    ) -> None:
        functools.update_wrapper(self, function)
        self._function, self._parameter = function, parameter
        self._options, self._gather = options, gather

    def __call__(self, **given: Any) -> int:  # noqa: ANN401
        """Run the command with what was given on the command line."""
        argument = self._gather(given)
        return self._function(**given, **{self._parameter: argument})

    @property
    def __signature__(self) -> inspect.Signature:
        listed: list[inspect.Parameter] = []
        for own in inspect.signature(self._function, eval_str=True).parameters.values():
            replaced = own.name == self._parameter
            listed += self._options() if replaced else [own.replace(kind=own.KEYWORD_ONLY)]
        return inspect.Signature(listed)


def with_settings(command: Callable[..., int]) -> Command:
    """Give a command an option for each run setting that it does not define itself.

    Args:
        command: Its parameter `request`, which gets all of them, stands for those options.
    """
    own = inspect.signature(command).parameters
    entries = [entry for entry in fields(Request) if entry.name not in own]

    def options() -> Iterable[inspect.Parameter]:
        return map(_option, entries)

    def gather(given: dict[str, Any]) -> Request:
        asked = {entry.name: given[entry.name] for entry in fields(Request)}
        for entry in entries:
            del given[entry.name]
        return Request(**asked)

    return Command(command, "request", options, gather)


def _option(entry: "Field[Any]") -> inspect.Parameter:
    """The option of one setting; one that is off by default has no `--no-` form."""
    names = [f"--{entry.name.replace('_', '-')}"] if entry.default is False else []
    help = row_of(entry).help
    if entry.name == "variant":
        help = f"{help.removesuffix('.')}: {', '.join(list_variants())}."
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
        annotation=Annotated[entry.type, typer.Option(*names, help=help)],
    )


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The numbers of `--input-shape`; 3,64,64 or 3x64x64.

    Raises:
        UsageError: It is not a list of positive numbers.

    >>> parse_shape("3,64,64")
    (3, 64, 64)
    """
    if text is None:
        return None
    words = text.lower().replace("x", ",").strip("() ").split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--input-shape '{text}' is not a list of positive numbers", "3,64,64")
    return tuple(int(word) for word in words)
