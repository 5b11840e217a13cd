"""Own metrics: pure tensor functions that are recorded, stored and drawn beside the built-in ones.

No torch here: plots and tables do not need it.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from resdiag.errors import unknown
from resdiag.watch.catalog import METRICS, SITES, Metric

if TYPE_CHECKING:
    from torch import Tensor

    Function = Callable[[Tensor], Tensor]

GRADIENT_SITES = ("grad_input", "grad_sum", "grad_output")
"""Where a metric takes a gradient: that of the loss at a block's input, sum or output."""

_RESERVED = frozenset({"step", "block", "stage", "transition", "depth_fraction", "point", "run",
                       "variant", "depth", "seed", "data", "lr", "epoch", "error"})  # fmt: skip
_OWN: "dict[str, OwnMetric]" = {}


@dataclass(frozen=True, kw_only=True)
class OwnMetric:
    """A registered function and what there is to say about it."""

    entry: Metric
    function: "Function"

    def to_dict(self) -> dict[str, str]:
        """Plain data for a run's folder."""
        e = self.entry
        return {
            "id": e.id, "label": e.label, "formula": e.formula, "unit": e.unit, "site": e.site,
            "source": e.source, "reading": e.reading,
        }  # fmt: skip


def metric(
    *,
    site: str,
    id: str = "",
    label: str = "",
    unit: str = "1",
    source: str = "own",
    formula: str = "",
    reading: str = "",
) -> "Callable[[Function], Function]":
    """Register a function of a tensor as a metric; monitors attached from then on record it.

    The function gets the whole detached tensor of a site, batch first, or the gradient there
    (without a loss scale), once per block and recorded step, and returns a number as a 0-d tensor.
    It must not change its argument, draw random numbers or wait for the device (`.item()`). An
    exception in it, or a result of another shape, stops that metric with a note, never the
    training.

    Args:
        site: Where it is taken, one of `catalog.SITES` or `grad_input`, `grad_sum`, `grad_output`.
        id: Its column; the function's name if not given.
        label: Words for an axis; the id if not given.
        unit: "1" for ratios.
        source: Where it comes from.
        formula: Its definition; the first line of the function's docstring if not given.
        reading: What a high or low value means.

    Returns:
        A decorator that returns the function as it was.

    Raises:
        ValueError: An unknown site, an id that is taken or is no name for a column.
        TypeError: What is decorated takes something else than one tensor.

    >>> import torch
    >>> @metric(site="output", label="largest magnitude", unit="activation")
    ... def output_peak(x):
    ...     \"\"\"max |H|\"\"\"
    ...     return x.abs().amax()
    >>> own_metrics()["output_peak"].entry.formula
    'max |H|'
    >>> unregister("output_peak")
    """

    def register(function: "Function") -> "Function":
        name = id or getattr(function, "__name__", "")
        _check(name, site, function)
        about = (inspect.getdoc(function) or "").splitlines()
        entry = Metric(
            id=name,
            label=label or name.replace("_", " "),
            formula=formula or (about[0] if about else f"{name}({site})"),
            unit=unit,
            site=site,
            source=source,
            reading=reading or "own metric",
        )
        _OWN[name] = OwnMetric(entry=entry, function=function)
        return function

    return register


def unregister(name: str) -> None:
    """Forget an own metric; monitors that are attached keep it.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in _OWN:
        raise ValueError(unknown("own metric", name, _OWN).message)
    del _OWN[name]


def own_metrics() -> "Mapping[str, OwnMetric]":
    """The registered metrics by id, in the order in which they were registered."""
    return MappingProxyType(dict(_OWN))


@contextmanager
def scope() -> Iterator[None]:
    """Forget at the end of the `with` what was registered inside."""
    before = dict(_OWN)
    try:
        yield
    finally:
        _OWN.clear()
        _OWN.update(before)


def known_metrics() -> dict[str, Metric]:
    """The catalogue and the own metrics."""
    return {**METRICS, **{name: own.entry for name, own in _OWN.items()}}


def _check(name: str, site: str, function: Any) -> None:  # noqa: ANN401
    """Refuse what could not be recorded, in one line."""
    sites = (*SITES, *GRADIENT_SITES)
    if site not in sites:
        raise ValueError(unknown("site", site, sites).message)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"'{name}' is no name for a column: small letters, digits and '_'; id=...")
    if name in METRICS or name in _RESERVED:
        raise ValueError(f"'{name}' is a column of resdiag: choose another id=")
    if name in _OWN and _OWN[name].function is not function:
        raise ValueError(
            f"own metric '{name}' is there already: unregister('{name}') first, or id="
        )
    if not callable(function):
        raise TypeError(f"an own metric must be a function, not {type(function).__name__}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise TypeError(f"own metric '{name}' must take one tensor: {error}") from error
    except ValueError:  # a builtin without a signature: its first call will tell
        return
