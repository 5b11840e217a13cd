"""Custom metrics: pure tensor functions, recorded, stored and drawn beside the built-in ones.

Plots and tables need what is registered, but no torch: only `CustomValues` imports it.
"""

import inspect
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from resdiag.catalog.table import METRICS, SITES, Metric
from resdiag.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

    Function = Callable[[Tensor], Tensor]


GRADIENT_SITES = ("grad_input", "grad_sum", "grad_output")
"""Where a metric takes a gradient: that of the loss at a block's input, sum or output."""

_RESERVED = frozenset({"step", "block", "stage", "transition", "depth_fraction", "point", "run",
                       "variant", "depth", "seed", "data", "lr", "epoch", "error"})  # fmt: skip
_REGISTERED: "dict[str, CustomMetric]" = {}


@dataclass(frozen=True, kw_only=True)
class CustomMetric:
    """A registered function and what there is to say about it."""

    entry: Metric
    function: "Function"
    compiles: bool = False

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
    source: str = "custom",
    formula: str = "",
    reading: str = "",
    compiles: bool = False,
) -> "Callable[[Function], Function]":
    """Register a function of a tensor as a metric; monitors attached afterwards record it.

    The function gets the whole detached tensor of a site, batch first, or the gradient there
    (without a loss scale), once per block and recorded step, and returns a number as a 0-d tensor.
    It must not change its argument, draw random numbers or wait for the device (`.item()`). An
    exception in it, or a result of another shape, stops that metric with a warning, never the
    training.

    Args:
        site: The tensor, one of `catalog.SITES` or `grad_input`, `grad_sum`, `grad_output`.
        id: Name of the column; default: the name of the function.
        label: Label for axes; default: the id.
        unit: "1" for ratios.
        source: Reference for the definition.
        formula: Its definition; default: the first line of the function's docstring.
        reading: What a high or low value means.
        compiles: Whether torch.compile may make the function a part of the model's graph. Only then
            is it computed in compiled passes, where it cannot be switched off if it fails.

    Returns:
        A decorator that returns the function as it was.

    Raises:
        ValueError: An unknown site, an id that is taken or not a valid column name.
        TypeError: What is decorated takes something else than one tensor.

    >>> import torch
    >>> @metric(site="output", label="largest magnitude", unit="activation")
    ... def output_peak(x):
    ...     \"\"\"max |H|\"\"\"
    ...     return x.abs().amax()
    >>> custom_metrics()["output_peak"].entry.formula
    'max |H|'
    >>> unregister_metric("output_peak")
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
            reading=reading or "custom metric",
        )
        _REGISTERED[name] = CustomMetric(entry=entry, function=function, compiles=compiles)
        return function

    return register


def unregister_metric(name: str) -> None:
    """Forget a custom metric; monitors that are attached keep it.

    Raises:
        ValueError: No custom metric has that name.
    """
    if name not in _REGISTERED:
        raise ValueError(unknown("custom metric", name, _REGISTERED).message)
    del _REGISTERED[name]


def custom_metrics() -> "Mapping[str, CustomMetric]":
    """The registered metrics by id, in the order in which they were registered."""
    return MappingProxyType(dict(_REGISTERED))


@contextmanager
def scope() -> Iterator[None]:
    """Forget at the end of the `with` what was registered inside."""
    before = dict(_REGISTERED)
    try:
        yield
    finally:
        _REGISTERED.clear()
        _REGISTERED.update(before)


def known_metrics() -> dict[str, Metric]:
    """The catalogue and the custom metrics."""
    return {**METRICS, **{name: one.entry for name, one in _REGISTERED.items()}}


def _check(name: str, site: str, function: Any) -> None:  # noqa: ANN401
    """Refuse what could not be recorded, in one line."""
    sites = (*SITES, *GRADIENT_SITES)
    if site not in sites:
        raise ValueError(unknown("site", site, sites).message)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"'{name}' is not a valid column name: small letters, digits and '_'; id=..."
        )
    if name in METRICS or name in _RESERVED:
        raise ValueError(f"'{name}' is a column of resdiag: choose another id=")
    if name in _REGISTERED and _REGISTERED[name].function is not function:
        raise ValueError(
            f"custom metric '{name}' is there already: unregister_metric('{name}') first, or id="
        )
    if not callable(function):
        raise TypeError(f"a custom metric must be a function, not {type(function).__name__}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise TypeError(f"custom metric '{name}' must take one tensor: {error}") from error
    except ValueError:  # a builtin without a signature: its first call will tell
        return


class CustomValues:
    """The custom metrics of one monitor: calls them, and stops those that do not behave.

    Args:
        registered: What was registered when the monitor was attached.

    Attributes:
        stopped: Why a metric is not computed any more, by id.
    """

    def __init__(self, registered: Iterable[CustomMetric]) -> None:
        self.metrics = tuple(registered)
        self.stopped: dict[str, str] = {}
        self._tried: set[str] = set()

    @property
    def ids(self) -> tuple[str, ...]:
        """Their columns."""
        return tuple(one.entry.id for one in self.metrics)

    def sites(self) -> frozenset[str]:
        """Where something is taken."""
        return frozenset(one.entry.site for one in self.metrics)

    def at(self, sites: Container[str]) -> list[str]:
        """The ids of those that are taken at some sites."""
        return [one.entry.id for one in self.metrics if one.entry.site in sites]

    def compute(self, site: str, x: "Tensor") -> "list[tuple[str, Tensor]]":
        """Compute the metrics of a site on a tensor: id and 0-d float64 value of each."""
        values: list[tuple[str, Tensor]] = []
        import torch

        for one in self.metrics:
            name = one.entry.id
            if one.entry.site != site or name in self.stopped:
                continue
            try:
                with torch.no_grad():
                    values.append((name, self._value(one, x.detach())))
            except Exception as error:  # somebody else's function must not end the training
                self.stopped[name] = f"{type(error).__name__}: {error}"
        return values

    def _value(self, one: CustomMetric, x: "Tensor") -> "Tensor":
        import torch

        name = one.entry.id
        if name in self._tried:
            return _number(one.function(x), x)
        self._tried.add(name)
        # the first call gets a copy and its random numbers are put back: it may do anything
        copy = x.clone()
        before = copy._version
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            state = torch.get_rng_state()
            value = _number(one.function(copy), x)
            drew = not torch.equal(state, torch.get_rng_state())
        if copy._version != before:
            raise ValueError("it changes its argument")
        if drew:
            raise ValueError("it draws random numbers, which would change the training")
        return value


def _number(value: object, x: "Tensor") -> "Tensor":
    """The result as a 0-d float64 tensor on the device of `x`."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"it must return a 0-d tensor, not {type(value).__name__}")
    if value.dim():
        raise ValueError(f"it must return a 0-d tensor, not one of shape {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError("it must return a real number, not a complex one")
    return value.detach().to(x.device, torch.float64)
