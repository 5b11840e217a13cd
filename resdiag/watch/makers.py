"""Which module made a tensor."""

from collections.abc import Mapping
from threading import get_ident

from torch import Tensor, nn

from resdiag.watch.base.tensors import TensorTable, tensors_in


class Makers:
    """Remembers, for one pass, the modules that returned tensors.

    Args:
        names: The modules of a model by name.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._known = TensorTable[str]()
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
                self._known.set(tensor, name)

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        self._known.set(new, self.of(old))

    def of(self, tensor: Tensor) -> str:
        """The name of the module that made a tensor, "" if none did."""
        return self._known.get(tensor) or ""
