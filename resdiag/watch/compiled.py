"""Records a forward and backward pass that torch.compile runs, or that a CUDA graph replays.

A compiled pass shows no operations to a tracer. What can be had is a hook on a module: it is traced
into the graph of the forward that it belongs to, as long as it is a pure function of tensors and of
numbers that stay the same. So every tensor of interest gets a tap where it passes in or out of a
module: statistics of it, and of its gradient, are written into small tensors made beforehand. They
are gathered when the step ends, outside of the graph.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.compilation import never_alone
from resdiag.watch.buffer import Buffer
from resdiag.watch.measure import changes, moments, reductions
from resdiag.watch.measure.changes import saturated
from resdiag.watch.measure.model_ends import DATA, HEAD_LOSS
from resdiag.watch.measure.moments import Sums
from resdiag.watch.measure.skip_path import COLUMNS, SkipPath
from resdiag.watch.operations import Frame, Operations, Where
from resdiag.watch.ports import Map, Port, Route, Trail
from resdiag.watch.recorder import _NO_ADDITION, _OUTPUT_GRADIENT, Recorder
from resdiag.watch.sites import COLUMNS as SITE_COLUMNS
from resdiag.watch.taps import Hook, Switch, Tap

HIDDEN = (
    "no module takes or returns this tensor, nor does an operation that can be told in a compiled "
    "pass"
)
SPLIT = "its gradient comes together where no module or operation can be told in a compiled pass"
CUSTOM = "custom metrics are not computed in passes that torch.compile runs"
INSIDE = (
    "a compiled function around the model hides operations that are no modules: compile the model"
)
CHANGED = "the compiled pass did other operations than the pass over example_inputs"
UNREACHED = "in the compiled pass no gradient came to this tensor"


class Taps:
    """The taps of one model.

    Args:
        model: The model.
        found: Where its tensors pass.
        recorder: Its blocks are filled in here, and reasons for what cannot be tapped.
        cells: Per-block buffer.
        head: Per-step buffer.
        samples: As for the recorder.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Map,
        recorder: Recorder,
        cells: Buffer,
        head: Buffer,
        samples: int | None,
    ) -> None:
        self._found, self._recorder, self._samples = found, recorder, samples
        self._cells, self._head = cells, head
        self._blocks = found.anatomy.blocks
        self._switch = Switch()
        self._at: dict[Port, Tap] = {}
        self._values: dict[int, Tap] = {}
        self._users: list[tuple[int, tuple[str, ...], Tap]] = []
        self._was_entered = self._was_captured = False
        self._gradients: list[tuple[int, str, Tap, float]] = []
        self._place()
        self._parts = [part for tap in self._at.values() for part in tap.tensors()]
        self._hooks: list[Hook] = []
        self._frames: list[Frame] = []
        self._operations, self._entered = Operations(), ExitStack()
        self._handles = list(self._install(model))

    def begin(self, *, on: bool, captured: bool = False) -> None:
        """Before a pass: whether to write.

        Args:
            on: Whether the taps of this pass write.
            captured: A CUDA graph takes the pass down, and replays it without Python.
        """
        self._switch.on = self._switch.eager = on
        for hook in self._hooks:
            if hook.repeated:
                hook.calls = 0
        for frame in self._frames:
            if frame.repeated:
                frame.calls = 0
        self._leave()
        if on and self._frames:
            self._entered.enter_context(self._operations)
            self._was_entered = True
            self._was_captured |= captured

    def arm(self, *, on: bool) -> None:
        """The same for a pass whose beginning Python does not see."""
        self._switch.on = on

    def close(self) -> None:
        """Remove the hooks; graphs made with them are not used any more."""
        self._leave()
        self._switch.on = self._switch.eager = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- where ---------------------------------------------------------------------------------

    def _place(self) -> None:
        """Decide which tensor is tapped where, and say what cannot be."""
        self._recorder.adopt(self._found.anatomy)
        reason = "a compiled pass does not show its batch"
        self._recorder.head.miss(*DATA, *HEAD_LOSS, reason=reason)
        sums = [route.output for route in self._found.routes if route.output is not None]
        if sums:
            self._cells.reserve(len(self._blocks), sums[0].device)
        for row, route in enumerate(self._found.routes):
            for site in ("input", "branch", "shortcut", "sum", "output"):
                self._place_values(row, site, getattr(route, site))
            if route.addition is None:
                self._recorder.miss(row, _NO_ADDITION, "the block has no residual addition")
            self._place_gradients(row, route)
            self._place_skip(row, route)
            self._place_gates(row, route)
            self._place_share(row, route)
        self._place_classifier()

    def _tap_at(self, port: Port) -> Tap:
        return self._at.setdefault(port, Tap(port))

    def _tap(self, trail: Trail) -> Tap | None:
        """The tap that reads a tensor's values, one for all sites that it is."""
        if id(trail) not in self._values:
            port = trail.gradient_port() or trail.value_port()
            if port is None:
                return None
            self._values[id(trail)] = self._tap_at(port)
        return self._values[id(trail)]

    def _place_values(self, row: int, site: str, trail: Trail | None) -> None:
        if trail is None:
            return
        tap = self._tap(trail)
        if tap is None:
            self._recorder.miss(row, SITE_COLUMNS[site], HIDDEN)
            return
        self._users.append((row, SITE_COLUMNS[site], tap))
        if tap.moments is None:
            self._place_moments(tap, trail, self._channel(row, trail))

    def _place_moments(self, tap: Tap, trail: Trail, channel: int) -> None:
        tap.channel = channel
        tap.moments = _numbers(trail.shape[channel] + 2, trail)

    def _channel(self, row: int, trail: Trail) -> int:
        """The dimension of the channels in a tensor of a block."""
        block, dims = self._blocks[row], len(trail.shape)
        known = block.features if dims == len(block.shape) + 1 else None
        return reductions.channel_dimension(dims, known)

    def _place_head(self, row: int, columns: tuple[str, ...], trail: Trail | None) -> bool:
        """Keep the first samples of a tensor; whether it can be seen."""
        tap = None if trail is None else self._tap(trail)
        if tap is None or trail is None:
            return False
        self._users.append((row, columns, tap))
        if tap.head is None:
            tap.head = self._samples_of(trail)
        return True

    def _samples_of(self, trail: Trail) -> Tensor:
        count = trail.shape[0] if self._samples is None else self._samples
        dtype = torch.promote_types(trail.dtype, torch.float32)
        shape = (count, *trail.shape[1:])
        return torch.full(shape, math.nan, dtype=dtype, device=trail.device)

    def _place_gradients(self, row: int, route: Route) -> None:
        ends = route.output if self._recorder._writes_output(row) else None
        for column, trail in (("sum", route.sum), ("output", ends), ("input", route.input)):
            if trail is None:
                continue
            tap, factor = self._gradient_tap(row, route, trail)
            if tap is None:
                reason = SPLIT if trail.visits else HIDDEN
                self._recorder.miss(row, _lost(column, ends is None), reason)
            else:
                tap.norm = _numbers(2, trail) if tap.norm is None else tap.norm
                self._gradients.append((row, f"grad_{column}", tap, factor))
                self._users.append((row, _lost(column, ends is None), tap))

    def _gradient_tap(self, row: int, route: Route, trail: Trail) -> tuple[Tap | None, float]:
        """Where the whole gradient of a tensor passes, and what to multiply it with.

        The gradient of a sum is also that of an operand which nothing but the addition uses.
        """
        port = trail.gradient_port()
        if port is not None:
            return self._tap_at(port), 1.0
        for other in self._found.routes[: row + 1]:
            if other.sum is trail and other.addition is not None:
                operands = (
                    (other.branch, other.addition.branch_scale),
                    (other.shortcut, other.addition.shortcut_scale),
                )
                for operand, scale in operands:
                    port = None if operand is None else operand.operand_port(other.begin)
                    if port is not None and scale:
                        return self._tap_at(port), 1 / scale
        port = trail.gradient_port(operations=True)
        return (None if port is None else self._tap_at(port)), 1.0

    def _place_skip(self, row: int, route: Route) -> None:
        """Keep first samples of the shortcut and the sum, and of what else the skip path needs."""
        if route.addition is None:
            return
        trails = [route.shortcut, route.sum]
        if route.addition.path:
            trails.append(route.input)
        if not all(call.is_activation for call in route.addition.after):
            trails.append(route.output)
        columns = (*COLUMNS[:5], *COLUMNS[6:])
        if not all(self._place_head(row, columns, trail) for trail in trails):
            self._recorder.miss(row, columns, HIDDEN)

    def _place_gates(self, row: int, route: Route) -> None:
        columns = ("saturated_fraction", "dead_fraction")
        if not route.gates:
            self._recorder.miss(row, columns, "no known activation inside the block")
        elif not all(self._place_head(row, columns, trail) for _, trail in route.gates):
            self._recorder.miss(row, columns, HIDDEN)

    def _place_share(self, row: int, route: Route) -> None:
        """Keep first samples of dL/dx and of what came to it through the shortcut."""
        if route.addition is None or route.input is None:
            return
        total, _ = self._gradient_tap(row, route, route.input)
        via, _ = self._via(row, route)
        if total is None or via is None:
            self._recorder.miss(row, ("shortcut_share",), HIDDEN if via is None else SPLIT)
            return
        for tap in (total, via):
            self._users.append((row, ("shortcut_share",), tap))
            tap.tail = self._samples_of(route.input) if tap.tail is None else tap.tail

    def _via(self, row: int, route: Route) -> tuple[Tap | None, float]:
        """Where the gradient that enters x through the shortcut passes, and its factor."""
        if route.addition is None or route.sum is None:
            return None, 1.0
        if route.shortcut is route.input:
            tap, factor = self._gradient_tap(row, route, route.sum)
            return tap, factor * route.addition.shortcut_scale
        return (None if route.projection is None else self._tap_at(route.projection)), 1.0

    def _place_classifier(self) -> None:
        features, logits = self._found.features, self._found.logits
        seen = None if features is None else self._tap(features)
        port = None if logits is None else _whole(logits)
        if features is None or logits is None or seen is None or port is None:
            self._recorder.head.miss("head_mean", "head_bias", "head_kick")
            return
        if seen.moments is None:
            dims = len(features.shape)
            self._place_moments(seen, features, reductions.channel_dimension(dims))
        self._tap_at(port).gap = _numbers(1, logits)

    def _install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        places: dict[str, dict[tuple[bool, int], list[tuple[int | str | None, Tap]]]]
        places = defaultdict(lambda: defaultdict(list))
        inside: dict[str, list[tuple[Port, Tap]]] = defaultdict(list)
        for port, tap in self._at.items():
            if tap.tensors() and port.operation:
                inside[port.module].append((port, tap))
            elif tap.tensors():
                places[port.module][port.is_output, port.call].append((port.place, tap))
        for name, taps in places.items():
            module = model.get_submodule(name)
            hook = Hook(self._switch, dict(taps), repeated=self._found.calls[name] > 1)
            self._hooks.append(hook)
            # both on every module: the call is counted when it ends
            yield module.register_forward_pre_hook(hook.before, with_kwargs=True)
            yield module.register_forward_hook(hook.after)
        yield from self._install_frames(model, inside)

    def _install_frames(
        self, model: nn.Module, inside: dict[str, list[tuple[Port, Tap]]]
    ) -> Iterator[RemovableHandle]:
        """Frames of modules with tapped operations, and of all modules that they call."""
        if not inside:
            return
        for name, module in model.named_modules():
            if any(not owner or f"{name}.".startswith(f"{owner}.") for owner in inside):
                frame = self._frame(name, inside.get(name, ()))
                self._frames.append(frame)
                yield module.register_forward_pre_hook(frame.before)
                yield module.register_forward_hook(frame.after)
        yield model.register_forward_hook(self._end, always_call=True)

    def _frame(self, name: str, taps: Iterable[tuple[Port, Tap]]) -> Frame:
        operands: dict[Where, list[tuple[int | str, Tap]]] = defaultdict(list)
        results: dict[Where, list[Tap]] = defaultdict(list)
        for port, tap in taps:
            where = port.call, port.operation, port.ordinal
            if port.place is None:
                results[where].append(tap)
            else:
                operands[where].append((port.place, tap))
        done = self._found.operations
        expected = {
            call: tuple(done.get((name, call), {}).items()) for call in range(self._calls(name))
        }
        running = self._operations.running
        return Frame(name, self._switch, running, operands, results, expected)

    def _calls(self, name: str) -> int:
        return self._found.calls.get(name, 0)

    @never_alone
    def _end(self, module: nn.Module, args: object, output: object) -> None:
        """The model's forward has ended; where it is a part of somebody's graph, nothing began."""
        if not torch.compiler.is_compiling():
            self._leave()

    def _leave(self) -> None:
        self._entered.close()
        self._operations.running.clear()

    # -- what was written ----------------------------------------------------------------------

    def collect(self) -> None:
        """Write the pass that has ended into the buffers' open slots, and wipe the taps."""
        for one in self._recorder._custom.metrics:
            self._recorder.reasons[one.entry.id].setdefault(CUSTOM, set())
        self._drop_unseen()
        self._collect_moments()
        self._collect_gradients()
        self._collect_skip()
        self._collect_gates()
        self._collect_classifier()
        self._cells.settle()  # before what was put is wiped
        if self._parts:
            torch._foreach_mul_(self._parts, math.nan)

    def _drop_unseen(self) -> None:
        """Say what was not written as it should have been, and make it NaN."""
        changed = {frame.name for frame in self._frames if frame.has_changed}
        entered = self._was_entered or self._was_captured
        for row, columns, tap in self._users:
            if tap.port.operation and not (entered and tap.port.module not in changed):
                self._recorder.miss(row, columns, CHANGED if entered else INSIDE)
                torch._foreach_mul_(tap.tensors(), math.nan)
            elif tap.norm is not None and reductions.on_host(tap.norm.device):
                gradients = tuple(c for c in columns if c.startswith("grad_"))
                if gradients and tap.norm[0].isnan() and not tap.norm[1].isfinite():
                    self._recorder.miss(row, columns, UNREACHED)
        self._was_entered = False

    def _collect_moments(self) -> None:
        first: dict[int, tuple[int, str]] = {}
        sites: list[tuple[tuple[int, str], Sums]] = []
        for row, route in enumerate(self._found.routes):
            for site in ("input", "branch", "shortcut", "sum", "output"):
                trail = getattr(route, site)
                tap = None if trail is None else self._tap(trail)
                if tap is None or tap.moments is None:
                    continue
                scale = _scale(route, site)
                if id(trail) in first and scale == 1:
                    known = first[id(trail)]
                    for name in moments.STATISTICS:
                        source = (known[0], f"{known[1]}_{name}")
                        self._cells.alias(row, f"{site}_{name}", source)
                else:
                    if scale == 1:
                        first[id(trail)] = row, site
                    sites.append(((row, f"{site}_mean"), _sums(tap.moments, scale)))
        for count in sorted({part.per_channel.numel() for _, part in sites}):
            same = [(key, part) for key, part in sites if part.per_channel.numel() == count]
            values = moments.combine([part for _, part in same])
            self._cells.write_rows(self._cells.slot, [key for key, _ in same], values)

    def _collect_gradients(self) -> None:
        slot = self._cells.slot
        for row, column, tap, factor in self._gradients:
            assert tap.norm is not None
            self._cells.put(slot, row, column, tap.norm[0] * abs(factor))
            ends = "output" if self._recorder._writes_output(row) else "sum"
            if column == f"grad_{ends}":
                self._cells.put(slot, row, "grad_nonfinite", tap.norm[1])
                if ends == "sum":
                    self._cells.alias(row, "grad_output", (row, "grad_sum"))
        for row, route in enumerate(self._found.routes):
            if route.addition is None or route.input is None:
                continue
            total, scale = self._gradient_tap(row, route, route.input)
            via, factor = self._via(row, route)
            if total is None or via is None or total.tail is None or via.tail is None:
                continue
            share = changes.share(via.tail * factor, total.tail * scale)
            self._cells.put(slot, row, "shortcut_share", share)

    def _collect_skip(self) -> None:
        path, joined = SkipPath(None), True
        for row, route in enumerate(self._found.routes):
            addition = route.addition
            u, h = self._kept(route.sum), self._kept(route.shortcut)
            x = self._kept(route.input) if addition is not None and addition.path else h
            if addition is None or u is None or h is None:
                joined = False
                continue
            scale = addition.shortcut_scale
            h = h if scale == 1 else h * scale
            new = row == 0 or self._blocks[row].stage != self._blocks[row - 1].stage
            joined = joined and route.joined
            path.open(row, x, h, addition.path, scale, new=new, joined=joined, source="")
            path.add(row, u)
            output = self._kept(route.output)
            path.close(row, u if output is None else output, addition.after)
            joined = True
        keys, values = [], []
        for row, measured, reasons in path.finish():
            keys.append((row, COLUMNS[0]))
            values.append(reductions.stack(measured, self._cells.device))
            for column, reason in reasons.items():
                self._recorder.miss(row, (column,), reason)
        if values:
            self._cells.write_rows(self._cells.slot, keys, torch.stack(values))

    def _kept(self, trail: Trail | None) -> Tensor | None:
        tap = None if trail is None else self._values.get(id(trail))
        return None if tap is None else tap.head

    def _collect_gates(self) -> None:
        slot = self._cells.slot
        for row, route in enumerate(self._found.routes):
            heads = [(call, self._kept(trail)) for call, trail in route.gates]
            gates = [_closed(call, x) for call, x in heads if x is not None]
            if not gates or len(gates) < len(heads):
                continue
            channels = [self._channel(row, trail) for _, trail in route.gates]
            pairs = zip(gates, channels, strict=True)
            counts = [gate.sum(_others(gate.dim(), channel)) for gate, channel in pairs]
            sizes = [gate.numel() // len(count) for gate, count in zip(gates, counts, strict=True)]
            dead = [(count == size) + 0 * count for count, size in zip(counts, sizes, strict=True)]
            closed = torch.cat(counts).sum() / sum(gate.numel() for gate in gates)
            self._cells.put(slot, row, "saturated_fraction", closed)
            self._cells.put(slot, row, "dead_fraction", torch.cat(dead).mean())

    def _collect_classifier(self) -> None:
        features, logits = self._found.features, self._found.logits
        seen = None if features is None else self._values.get(id(features))
        port = None if logits is None else _whole(logits)
        if features is None or seen is None or seen.moments is None or port is None:
            return
        slot, gap = self._head.slot, self._tap_at(port).gap
        if gap is None:
            return
        self._head.reserve(1, gap.device)
        self._head.write(slot, 0, "head_mean", moments.combine([_sums(seen.moments, 1.0)])[0, :3])
        size = torch.full((), features.shape[-1], dtype=torch.float64, device=gap.device)
        self._head.write(slot, 0, "head_size", size)
        self._head.write(slot, 0, "head_gap", gap)


def _whole(trail: Trail) -> Port | None:
    """Where the whole gradient of a tensor passes."""
    return trail.gradient_port() or trail.gradient_port(operations=True)


def _numbers(count: int, trail: Trail) -> Tensor:
    return torch.full((count,), math.nan, dtype=torch.float64, device=trail.device)


def _sums(moments: Tensor, scale: float) -> Sums:
    """What a tap wrote, times a factor, as `moments.combine` takes it."""
    return Sums(
        per_channel=moments[:-2] * scale,
        size=1,
        second=moments[-2] * scale**2,
        spread=None,
        broken=moments[-1],
    )


def _scale(route: Route, site: str) -> float:
    """The factor on an operand inside the addition."""
    if route.addition is None:
        return 1.0
    return {
        "branch": route.addition.branch_scale,
        "shortcut": route.addition.shortcut_scale,
    }.get(site, 1.0)


def _closed(call: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    """Which units are saturated, 0 or 1; NaN where the tap did not write."""
    return saturated(call, x).double() + 0 * x.double()


def _lost(site: str, without_after: bool) -> tuple[str, ...]:
    """The columns that are NaN with the gradient of a site."""
    if site == "input":
        return ("grad_input",)
    if site == "output":
        return _OUTPUT_GRADIENT
    return ("grad_sum", *_OUTPUT_GRADIENT) if without_after else ("grad_sum",)


def _others(dims: int, channel: int) -> tuple[int, ...]:
    """All dimensions but that of the channels."""
    return tuple(d for d in range(dims) if d != channel)
