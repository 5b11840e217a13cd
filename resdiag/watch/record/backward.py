"""Reads the gradients of one recorded pass by hooks that the forward pass sets on its tensors.

Module backward hooks refuse in-place activations (pytorch#61519), and references kept for later are
overwritten by them; a tensor hook gets the gradient of the tensor as it was when the hook was set.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.safety import guarded, outlasting_shortage
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.passes import Operands
from resdiag.watch.measure import changes, reductions
from resdiag.watch.measure.changes import TANGLED, ShortcutGradient, entries
from resdiag.watch.measure.model_ends import Logits
from resdiag.watch.measure.reductions import Scalar
from resdiag.watch.record.buffer import Key
from resdiag.watch.record.sites import Head, Parts

OUTPUT_GRADIENT = ("grad_output", "grad_nonfinite", "elasticity")
"""What follows from the gradient of a block's output."""

WITHOUT = {
    "grad_sum": ("grad_sum", *OUTPUT_GRADIENT, "shortcut_share"),
    "grad_output": OUTPUT_GRADIENT,
    "grad_input": ("grad_input", "shortcut_share"),
}
"""What is missing where there is no gradient to hook."""

_NO_GRADIENT = "this tensor does not require a gradient"
NO_BACKWARD = (
    "its forward ran without gradients, and no module that was called once ran again in the "
    "backward pass: where that is activation checkpointing, use_reentrant=False shows them"
)


class _Pass:
    """One forward pass: alive as long as its graph is, which keeps the hooks that hold it."""


class Backward:
    """The gradients at the blocks' tensors; `head` takes that of the logits.

    `begins` is called when the first gradient of the pass has come, after which it was `seen`;
    `factor` is the loss scale, `repeats` counts gradients that came a second time, and `rejected`
    has rows whose pass was not the expected one.
    """

    def __init__(self, parts: Parts, head: Head) -> None:
        self.guard, self._parts = parts.guard, parts
        self._head = head
        self.begins: Callable[[], None] = lambda: None
        self._cells, self._sites, self._known = parts.cells, parts.sites, parts.known
        self._custom, self._custom_sites = parts.custom, parts.custom.sites()
        self._pool, self._core = parts.pool, parts.core
        self._samples, self._unit_samples = parts.moments, parts.samples
        self._shares = ShortcutGradient(self.head_of)
        self.factor: Tensor | float = 1.0
        self.seen, self.repeats = False, 0
        self._begun: _Pass | None = None
        self._pass = weakref.ref(_Pass())
        self.end()

    def begin(self) -> None:
        """Begin a pass."""
        self._live, self.seen, self.repeats = True, False, 0
        self._begun = _Pass()
        self._pass = weakref.ref(self._begun)

    def let_go(self) -> None:
        """The forward pass has ended: from here on only the graph keeps it."""
        self._begun = None

    def end(self) -> None:
        """Let go of the pass: a gradient that comes later belongs to no step."""
        self._live, self._begun = False, None
        self._children: dict[Key, list[int]] = defaultdict(list)
        self._hooked: set[Key] = set()
        self._written: set[Key] = set()
        self._postponed: set[Key] = set()
        self._sum_hooks: dict[int, RemovableHandle] = {}
        self.rejected: set[int] = set()
        self._shares.clear()

    @property
    def is_gone(self) -> bool:
        """Whether the pass's graph is gone: no backward pass will ever come through it."""
        return self._pass() is None

    def head_of(self, x: Tensor) -> Tensor:
        """The samples on which shares are measured."""
        return x.detach()[: self._unit_samples]

    def hook(self, x: Tensor, row: int, column: str) -> None:
        """Read the gradient of a tensor into a column, or note why it is missing."""
        if not x.requires_grad and not torch.is_grad_enabled():
            self._postponed.add((row, column))  # it may run again in the backward pass
            return
        if not x.requires_grad:
            self.guard.miss(row, WITHOUT[column], _NO_GRADIENT)
            return
        begun, slot = self._begun, self._cells.slot
        self._hooked.add((row, column))
        handle = x.register_hook(lambda g: self._gradient(begun, slot, row, column, g))
        if column == "grad_sum":
            self._sum_hooks[row] = handle

    def hook_later(self, x: Tensor, key: Callable[[], Key | None]) -> RemovableHandle | None:
        """Hook a tensor whose column is known when its gradient comes; None where none will."""
        if not x.requires_grad:
            return None
        begun, slot = self._begun, self._cells.slot

        def back(g: Tensor) -> None:
            known = key()
            if begun is not None and known is not None:
                self._gradient(begun, slot, *known, g)

        handle: RemovableHandle = x.register_hook(back)
        return handle

    def claim(self, row: int, column: str, source: Key | None, *, hooked: bool) -> Key | None:
        """Say whose gradient a hook reads that was set for a unit; returns the column it has."""
        if source in self._hooked and source is not None:
            self._cells.alias(row, column, source)
            self._children[source].append(row)
            return source
        if not hooked:
            self.guard.miss(row, WITHOUT[column], _NO_GRADIENT)
            return None
        self._hooked.add((row, column))
        return row, column

    def end_at_sum(self, row: int) -> None:
        """A block's output is its sum: one gradient for both."""
        self._cells.alias(row, "grad_output", (row, "grad_sum"))

    def unhook_sum(self, row: int) -> None:
        """A block gets one more branch: its sum is another tensor."""
        if (handle := self._sum_hooks.pop(row, None)) is not None:
            handle.remove()

    def watch_input(self, row: int, x: Tensor) -> None:
        """Read dL/dx where the tensor was the output of an earlier block, else by a hook."""
        known = self._known.get(x)
        source = None
        if known is not None and known[1] in ("sum", "output"):
            source = (known[0], self.column_of(*known))
        if source is not None and source in self._hooked:
            self._cells.alias(row, "grad_input", source)
            self._children[source].append(row)
        else:
            self.hook(x, row, "grad_input")
            self._children[row, "grad_input"].append(row)

    def watch_shortcut(self, row: int, addition: Addition, tensors: Operands) -> None:
        """Arrange for the gradient that enters x through the shortcut to be held for its share."""
        x, h = tensors.origin, tensors.shortcut
        if x is None or not x.requires_grad:
            return
        if h is x:
            self._shares.pass_on(row, addition.shortcut_scale)
            return
        leaving = None if addition.is_gated else entries(h, x)
        if leaving is None:
            self.guard.miss(row, ("shortcut_share",), TANGLED)
            return
        if not leaving and torch.is_grad_enabled():
            reason = "no gradient leads from the shortcut back to the block's input"
            self.guard.miss(row, ("shortcut_share",), reason)
        begun = self._begun
        for node, index in leaving:
            node.register_hook(lambda grads, _, i=index: self._collect(begun, row, grads[i]))

    def column_of(self, row: int, site: str) -> str:
        """The column in which the gradient hook of a measured tensor writes."""
        if site == "input":
            return "grad_input"
        own = site == "output" and not self._sites.anatomy.blocks[row].ends_at_sum
        return "grad_output" if own else "grad_sum"

    def watch_logits(self, logits: Tensor) -> None:
        """Read the gradient of the logits."""
        begun, slot, kept = self._begun, self._head.slot, self._head.keep(logits)

        def back(g: Tensor) -> None:
            if self._is_current(begun) and not self.guard.failure:
                with outlasting_shortage(self.guard):
                    self._see()
                    self._head.gap(slot, g, kept)

        logits.register_hook(back)

    def watch_output(self, output: Tensor) -> None:
        """Read the gradient of the model's output, which an activation made."""
        begun, slot, kept = self._begun, self._head.slot, Logits(output)

        def back(g: Tensor) -> None:
            if self._is_current(begun) and not self.guard.failure:
                with outlasting_shortage(self.guard):
                    self._head.write_output(slot, g, kept)

        output.register_hook(back)

    def awaited(self) -> list[str]:
        """Owners of the blocks that ran without gradients in the pass that is recorded."""
        if not self._live or self.guard.failure:
            return []
        return [self._sites.anatomy.blocks[row].owner for row, _ in self._postponed]

    @guarded
    def hook_operands(self, row: int, addition: Addition, tensors: Operands) -> None:
        """Hook the input of a block that runs again, and what leads to its shortcut."""
        self._begun = self._pass()
        if (row, "grad_input") in self._postponed and tensors.origin is not None:
            self.watch_input(row, tensors.origin)
        if not self._core:
            self.watch_shortcut(row, addition, tensors)
        self._begun = None

    @guarded
    def hook_again(self, row: int, site: str, x: Tensor) -> None:
        """Hook a tensor of a block that runs again."""
        self._begun = self._pass()
        if self._known.get(x) is None and not (self._core and site == "sum"):
            self._known.set(x, (row, site))
        if (row, f"grad_{site}") in self._postponed:
            self.hook(x, row, f"grad_{site}")
        self._begun = None

    def conclude(self) -> None:
        """Say of which tensors no gradient came because they have none."""
        for row, column in self._postponed - self._hooked:
            self.guard.miss(row, WITHOUT[column], NO_BACKWARD)

    def _is_current(self, begun: "_Pass | None") -> bool:
        """Whether the pass in which a hook was set is still the one being recorded."""
        return self._live and begun is not None and begun is self._pass()

    def _see(self) -> None:
        if not self.seen:
            self.seen = True
            self.begins()

    @guarded
    def _gradient(self, begun: "_Pass", slot: int, row: int, column: str, g: Tensor) -> None:
        """Write G2; hand dL/du to the share of the block's input, or finish that share."""
        if not self._is_current(begun):
            return
        self._see()
        key = row, column
        self.repeats += key in self._written
        self._written.add(key)
        size, broken = reductions.gradient(g, self._samples)
        places = [key]
        if row in self.rejected:  # the next block's input may be as expected
            places = [(child, "grad_input") for child in self._children.get(key, ())]
        for place in places:
            self.write(*place, size, broken, g.shape[0] if g.dim() else 1, g.numel())
        if self._custom_sites:
            self._compute_custom(row, column, g)
        if column == "grad_sum":
            self._shares.hold(row, g)
        for child in self._children.get((row, column), ()):
            if (via := self._shares.take(child)) is not None:
                self.write_share(child, via, self.head_of(g))

    def write(
        self, row: int, column: str, size: Scalar, broken: Scalar, batch: Scalar, numel: Scalar
    ) -> None:
        """Write G2, and where it is that of the output its non-finite fraction."""
        if row in self.rejected:
            return
        if self._pool is None:
            self._cells.put(self._cells.slot, row, column, size)
        else:
            self._pool.gradient(row, column, size, batch)
        if column == "grad_output" or column == self.column_of(row, "output"):
            self._parts.put(row, "grad_nonfinite", broken, numel)

    def write_share(self, row: int, via: Tensor, total: Tensor) -> None:
        """Write how much of the gradient at a block's input came through its shortcut."""
        if via.shape == total.shape and row not in self.rejected:
            size = 0.0 if self._pool is None else reductions.norm(total)
            self._parts.put(row, "shortcut_share", changes.share(via, total), size * size)

    def _compute_custom(self, row: int, column: str, g: Tensor) -> None:
        """A gradient is also that at the output, or at later blocks' inputs, of the same tensor."""
        places = [(row, column)] if column != "grad_input" else []
        if column == "grad_sum" and self.column_of(row, "output") == "grad_sum":
            places.append((row, "grad_output"))
        places += [(child, "grad_input") for child in self._children.get((row, column), ())]
        g = g if isinstance(self.factor, float) and self.factor == 1 else g / self.factor
        slot = self._cells.slot
        for place, site in places:
            if site in self._custom_sites and place not in self.rejected:
                for name, value in self._custom.compute(site, g):
                    self._cells.put(slot, place, name, value)

    @guarded
    def _collect(self, begun: "_Pass", row: int, g: Tensor | None) -> None:
        if g is not None and self._is_current(begun):
            self._shares.collect(row, g)
