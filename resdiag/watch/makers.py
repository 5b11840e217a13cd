"""Which module made a tensor."""

import weakref
from collections.abc import Mapping
from threading import get_ident

from torch import Tensor, nn

from resdiag.watch.nested import tensors_in


class Makers:
    """Remembers, for one pass, the modules that returned tensors.

    Args:
        names: The modules of a model by name.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._thread = 0

    def begin(self) -> None:
        """A pass begins in this thread."""
        self._thread = get_ident()

    def clear(self) -> None:
        """Forget the pass."""
        self._known.clear()

    def remember(self, module: nn.Module, args: object, output: object) -> None:
        """A forward hook for all modules: the outermost one of those that hand a tensor on."""
        name = self._names.get(module)
        if name and get_ident() == self._thread:
            for tensor in tensors_in(output):
                self._known[id(tensor)] = (weakref.ref(tensor), name)

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        self._known[id(new)] = (weakref.ref(new), self.of(old))

    def of(self, tensor: Tensor) -> str:
        """The name of the module that made a tensor, "" if none did."""
        reference, name = self._known.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor else ""
