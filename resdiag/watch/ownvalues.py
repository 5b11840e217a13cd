"""Calls own metrics while a model runs, and stops those that do not behave."""

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor

from resdiag.watch.own import OwnMetric


class OwnValues:
    """The own metrics of one monitor.

    Args:
        own: What was registered when the monitor was attached.

    Attributes:
        stopped: Why a metric is not computed any more, by id.
    """

    def __init__(self, own: Iterable[OwnMetric]) -> None:
        self.metrics = tuple(own)
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

    def compute(self, site: str, x: Tensor, put: Callable[[str, Tensor], None]) -> None:
        """Compute the metrics of a site on a tensor; hand on id and 0-d float64 value."""
        for one in self.metrics:
            name = one.entry.id
            if one.entry.site != site or name in self.stopped:
                continue
            try:
                with torch.no_grad():
                    put(name, self._value(one, x.detach()))
            except Exception as error:  # somebody else's function must not end the training
                self.stopped[name] = f"{type(error).__name__}: {error}"

    def _value(self, one: OwnMetric, x: Tensor) -> Tensor:
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


def _number(value: object, x: Tensor) -> Tensor:
    """The result as a 0-d float64 tensor on the device of `x`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"it must return a 0-d tensor, not {type(value).__name__}")
    if value.dim():
        raise ValueError(f"it must return a 0-d tensor, not one of shape {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError("it must return a real number, not a complex one")
    return value.detach().to(x.device, torch.float64)
