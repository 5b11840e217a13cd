"""Where tensors of a block pass in or out of a module or an operation, and can be tapped.

A compiled forward shows nothing that runs in it, but the hooks of its modules are traced into its
graph, and so is a torch function mode. One pass over example inputs (`watch/walk.py`) finds, for
every tensor of interest, the modules and operations that take or return it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import ACTIVATIONS, NORMALISATIONS, Call
from resdiag.watch.blocks import Anatomy
from resdiag.watch.sums import ADDITIONS

OPERATIONS = frozenset(function.__name__ for function in ADDITIONS) | ACTIVATIONS | NORMALISATIONS
"""Names of the functions that are counted, so that one of them can be found again in a graph."""


@dataclass(frozen=True)
class Port:
    """One argument or result of one call of a module, or of an operation in its own forward.

    Attributes:
        module: The module's name.
        call: How many calls of it came before in the pass.
        is_output: Whether the tensor leaves the module, or the operation.
        place: Position or keyword of the argument; position or key in the result, None for all.
        operation: The operation's name, "" for the module itself.
        ordinal: How many operations of that name came before in this call of the module.
        writes: Whether the operation writes into its operand.
    """

    module: str
    call: int
    is_output: bool
    place: int | str | None
    operation: str = ""
    ordinal: int = 0
    writes: bool = False


@dataclass(eq=False)
class Visit:
    """A tensor at a port: when it came by, and when that module's call ended."""

    port: Port
    time: int
    end: int


@dataclass(eq=False)
class Trail:
    """One tensor of one pass: where it passed and when it was used.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        device: Its device.
        visits: Ports, in time order.
        uses: Times at which an operation read it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    visits: list[Visit] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    def value_port(self) -> Port | None:
        """A port at which its values can be read; a module's, if there is one."""
        ordered = sorted(self.visits, key=lambda visit: bool(visit.port.operation))
        return next((visit.port for visit in ordered), None)

    def gradient_port(self, *, operations: bool = False) -> Port | None:
        """A port that all its uses come after, so that the gradient there is the whole one."""
        for visit in self._takers(operations=operations):
            after = all(visit.time < time for time in self.uses)
            if after and (visit.port.is_output or all(time < visit.end for time in self.uses)):
                return visit.port
        return None

    def operand_port(self, begin: int) -> Port | None:
        """A port after which nothing but the addition that began at `begin` uses it."""
        for visit in reversed(self._takers(operations=False)):
            later = [time for time in self.uses if time > visit.time]
            inside = visit.port.is_output or all(time < visit.end for time in later)
            if visit.time < begin and len(later) == 1 and later[0] > begin and inside:
                return visit.port
        return None

    def _takers(self, *, operations: bool) -> list[Visit]:
        """Ports of modules, or of operations, where another tensor may take its place."""
        ports = ((visit, visit.port) for visit in self.visits)
        takers = [
            visit
            for visit, port in ports
            if bool(port.operation) == operations and (port.is_output or not port.writes)
        ]
        # who calls y.add_(f) need not go on with what it returns
        return sorted(takers, key=lambda visit: visit.port.writes)


@dataclass(eq=False)
class Route:
    """The tensors of one block, as trails; None where the block has no such tensor.

    Attributes:
        addition: The addition, with its calls, scales and path; None for a unit without one.
        begin: When the addition began.
        input: x.
        branch: F(x).
        shortcut: h(x).
        sum: u.
        output: H.
        joined: Whether x is the output of the block before, or this is the first block.
        projection: Port at which x enters the module that makes h of it, if one module does.
        gates: Activations inside, each with what goes into it.
    """

    addition: Addition | None
    begin: int
    input: Trail | None
    branch: Trail | None = None
    shortcut: Trail | None = None
    sum: Trail | None = None
    output: Trail | None = None
    joined: bool = True
    projection: Port | None = None
    gates: list[tuple[Call, Trail]] = field(default_factory=list)


@dataclass(eq=False)
class Map:
    """What one pass over example inputs found.

    Attributes:
        anatomy: The blocks.
        routes: Their tensors, in the same order.
        features: Input of the last linear layer.
        logits: Its output.
        calls: How often each module was called.
        operations: Per call of a module, how often it did which operation of `OPERATIONS` itself.
    """

    anatomy: Anatomy
    routes: list[Route]
    features: Trail | None
    logits: Trail | None
    calls: dict[str, int]
    operations: dict[tuple[str, int], dict[str, int]]


def example(given: object) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword inputs from a tuple, a mapping or a single input."""
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
