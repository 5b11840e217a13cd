"""The table of study engines: their options, `--help` and the docs follow from its rows."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Protocol

from resdiag.errors import UsageError, unknown
from resdiag.registry import RegistrationError, Registry

if TYPE_CHECKING:
    from resdiag.study.engines.job import Job


class Runner(Protocol):
    """What runs a job: it starts cells and waits for them; a cell does the same under each engine.

    It starts each of `job.cells` by calling `resdiag.study.work.start_logged` with `job.task(cell)`
    and `job.log(cell)` in some process, or the command that `resdiag study plan` prints; calls
    `job.look` at least once a second; and decides with `Attempts` what the end of a process means.
    Where the work is done is in the cells' folders, so nothing has to be handed back.
    """

    def __call__(self, job: "Job", **options: Any) -> int:  # noqa: ANN401
        """Bring the cells to their end.

        Args:
            job: What to run.
            options: The values of the engine's own options by name.

        Returns:
            The signal that stopped it, or 0.

        Raises:
            ResdiagError: The engine cannot be used here; the message says why.
        """


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of `study run` and `study retry` that belongs to one engine.

    Attributes:
        name: Of the argument that the runner gets.
        default: Its value if it is not given, an int or a str, which is also its type.
        help: What it is.
        flag: On the command line; `--<name>` if empty.
        min: The least value of an int.
        max: The largest value of an int; None for any.
        excludes_slots: Whether it cannot be given together with `--slots`.
    """

    name: str
    default: int | str
    help: str
    flag: str = ""
    min: int = 1
    max: int | None = None
    excludes_slots: bool = False

    @property
    def written(self) -> str:
        """As it is written on the command line."""
        return self.flag or f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A row of the table of engines.

    Attributes:
        name: After `--engine`.
        run: Runs a job. It imports what it needs when it is called: rows are read by `--help`.
        options: What the engine has of its own.
        is_local: Whether cells run on this machine, so that their data must be here.
    """

    name: str
    run: Runner
    options: tuple[Option, ...] = ()
    is_local: bool = False


def _lazy(name: str) -> Runner:
    """A runner of this package, imported when it is called: Ray alone takes a second."""

    def run(job: "Job", **options: Any) -> int:  # noqa: ANN401
        found: Runner = pkgutil.resolve_name(f"{__package__}.{name}")
        return found(job, **options)

    return run


def find_engine(
    name: str, slots: int | None, values: Mapping[str, Any]
) -> tuple[Engine, dict[str, Any]]:
    """The engine of a name and the values of its own options.

    Args:
        name: Of the engine.
        slots: Cells at a time; None if not given.
        values: By option, of all engines; those that were not given may be missing.

    Raises:
        UsageError: Unknown engine, or an option that belongs to another one.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    for other in ENGINES.values():
        for option in other.options:
            given = values.get(option.name, option.default) != option.default
            if given and other.name != name:
                raise UsageError(f"{option.written} is for the {other.name} engine, not {name}")
            if given and slots is not None and option.excludes_slots:
                raise UsageError(f"--slots and {option.written} exclude each other")
    engine = ENGINES[name]
    own = engine.options
    return engine, {option.name: values.get(option.name, option.default) for option in own}


_ROWS = (
    Engine(
        name="local",
        run=_lazy("local:run_here"),
        options=(
            Option(
                name="cells_per_device",
                default=1,
                max=32,
                excludes_slots=True,
                help="cells that share one process per GPU and take turns, one step each; without "
                "a GPU, one process per machine. 1: one process per cell. Not with --slots.",
            ),
        ),
        is_local=True,
    ),
    Engine(
        name="ray",
        run=_lazy("ray:run_on_ray"),
        options=(
            Option(
                name="address",
                default="",
                help="address of a cluster, or auto; default: a local cluster.",
            ),
        ),
    ),
    Engine(
        name="slurm",
        run=_lazy("slurm:run_on_slurm"),
        options=(
            Option(name="partition", default="", help="name of the partition."),
            Option(name="minutes", flag="--time", default=240, help="minutes per job."),
        ),
    ),
)
ENGINES = Registry("engine", _ROWS)
"""The engines by name; `register_engine` adds one."""


def register_engine(engine: Engine) -> None:
    """Add an engine: `resdiag study run --engine <name>` then has it, with its options.

    Raises:
        RegistrationError: The name or one of the options is taken, or an option's name cannot be
            that of an argument.
    """
    others = [other for other in ENGINES.values() if other.name != engine.name]
    taken = {option.name for other in others for option in other.options}
    for option in engine.options:
        if not option.name.isidentifier() or iskeyword(option.name):
            raise RegistrationError(f"option '{option.name}' cannot name an argument")
        if option.name in taken:
            raise RegistrationError(f"option '{option.name}' belongs to another engine")
    ENGINES.add(engine)
