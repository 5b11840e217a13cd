"""Options that several `resdiag study` commands share; those of the engines are read from rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from resdiag.cli.options import Command
from resdiag.study.engines.engine import ENGINES, Engine, find_engine

Where = Annotated[
    str, typer.Argument(metavar="STUDY", help="Name of a shipped study, study file or plan file.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the study, e.g. fixed.lr=0.05."
    ),
]
Mini = Annotated[
    bool, typer.Option("--mini", help="Shrink the study to a test of seconds on a CPU.")
]
Drift = Annotated[
    bool, typer.Option("--allow-drift", help="Resume even if versions or machine have changed.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
_Slots = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, help="Number of cells at a time; default: as many as fit."),
]


@dataclass(frozen=True)
class Start:
    """Which engine starts cells, and how.

    Attributes:
        engine: The engine.
        slots: Cells at a time; None leaves it to the engine.
        options: Values of the engine's own options.
    """

    engine: Engine
    slots: int | None
    options: dict[str, Any]


def with_engine(command: Callable[..., int]) -> Command:
    """Give a command `--engine`, `--slots` and the options of all engines that are registered.

    Args:
        command: Its parameter `start`, which gets a `Start`, stands for those options.
    """

    def gather(given: dict[str, Any]) -> Start:
        chosen, slots = given.pop("engine"), given.pop("slots")
        values = {name: given.pop(f"engine_{name}") for name in _list_engine_options()}
        engine, options = find_engine(chosen, slots, values)
        return Start(engine, slots, options)

    return Command(command, "start", _list_options, gather)


def _list_options() -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    choice = Annotated[str, typer.Option(help=f"How to start the cells: {', '.join(ENGINES)}.")]
    return [
        inspect.Parameter("engine", kind, default="local", annotation=choice),
        inspect.Parameter("slots", kind, default=None, annotation=_Slots),
        *_list_engine_options().values(),
    ]


def _list_engine_options() -> dict[str, inspect.Parameter]:
    found = {}
    for engine in ENGINES.values():
        for option in engine.options:
            kind = type(option.default)
            limits: dict[str, Any] = {"min": option.min, "max": option.max} if kind is int else {}
            about = typer.Option(option.written, help=f"{engine.name}: {option.help}", **limits)
            found[option.name] = inspect.Parameter(
                f"engine_{option.name}",  # the command may have a parameter of that name
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=Annotated[kind, about],
            )
    return found
