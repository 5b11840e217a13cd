"""Tensors that pass before it is known whether they are a unit's input or output.

A network without residual additions has modules for its blocks, and which ones is known only when
the first pass has ended. By then a tensor may be overwritten: so every candidate is measured when
it passes, and what belongs to no unit is dropped.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from resdiag.watch.record.backward import Backward
from resdiag.watch.record.buffer import Key
from resdiag.watch.record.sites import Part, Parts


@dataclass(eq=False)
class _Candidate:
    tensor: weakref.ref[Tensor]
    version: int
    device: torch.device
    sums: Part | None = None  # None where it had been measured before
    place: tuple[int, str] | None = None  # row and site where it was written first
    gradient: Key | None = None  # the cell in which its gradient is written
    handle: RemovableHandle | None = None  # None if no gradient will come
    custom: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)


class UnitTensors:
    """The candidates of one pass, by their numbers in it."""

    def __init__(self, parts: Parts, backward: Backward) -> None:
        self._cells, self._sites, self._known = parts.cells, parts.sites, parts.known
        self._backward, self._custom, self._guard = backward, parts.custom, parts.guard
        self._custom_sites = parts.custom.sites() & {"input", "output"}
        self._seen: dict[int, _Candidate] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._seen.clear()

    def device(self, number: int) -> torch.device:
        """Where a candidate is."""
        return self._seen[number].device

    def measure(self, number: int, x: Tensor, features: int | None, *, settled: bool) -> None:
        """Measure a candidate, and hook its gradient.

        Unless the units are `settled`, most candidates belong to none, and are no business of
        somebody's function.
        """
        if number in self._seen:
            return
        seen = self._seen[number] = _Candidate(weakref.ref(x), x._version, x.device)
        for site in self._custom_sites if settled else ():
            seen.custom[site] = self._custom.compute(site, x)
        seen.place = self._known.get(x)
        if seen.place is not None:  # measured as a tensor of a residual block before
            seen.gradient = seen.place[0], self._backward.column_of(*seen.place)
            return
        seen.sums = self._sites.read(x, features)
        seen.handle = self._backward.hook_later(x, lambda: seen.gradient)

    def dismiss(self) -> None:
        """No candidate belongs to a unit: remove their hooks."""
        for seen in self._seen.values():
            if seen.handle is not None:
                seen.handle.remove()
        self._seen.clear()

    def settle(self, row: int, site: str, number: int | None) -> bool:
        """Write what was measured of a unit's input or output; whether it has that tensor."""
        seen = None if number is None else self._seen.get(number)
        if seen is None:
            return False
        self._settle_custom(row, site, seen)
        if seen.place is not None:
            self._sites.repeat(row, site, seen.place)
        elif seen.sums is not None:
            self._sites.keep(row, site, seen.sums)
            seen.place = row, site
            if (x := seen.tensor()) is not None:
                self._known.set(x, seen.place, seen.version)
        hooked = seen.handle is not None
        claimed = self._backward.claim(row, f"grad_{site}", seen.gradient, hooked=hooked)
        seen.gradient = claimed or seen.gradient
        return True

    def _settle_custom(self, row: int, site: str, seen: _Candidate) -> None:
        if site in self._custom_sites and site not in seen.custom:
            x = seen.tensor()
            if x is None or x._version != seen.version:
                reason = "overwritten before it was known to be a unit's; later steps have it"
                return self._guard.miss(row, self._custom.at((site,)), reason)
            seen.custom[site] = self._custom.compute(site, x)
        for name, value in seen.custom.get(site, ()):
            self._cells.put(self._cells.slot, row, name, value)
        return None
