"""Records a forward and backward pass that torch.compile runs, or that a CUDA graph replays.

A compiled pass shows no operations to a tracer. What can be had is a hook on a module: it is traced
into the graph of the forward that it belongs to, as long as it is a pure function of tensors and of
numbers that stay the same. So every tensor of interest gets a tap where it passes in or out of a
module: statistics of it, and of its gradient, are written into small tensors made beforehand. They
are gathered when the step ends, outside of the graph.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resdiag.watch import metrics
from resdiag.watch.buffer import Buffer
from resdiag.watch.dynamo import never_alone, plain
from resdiag.watch.ports import Map, Port, Route, Trail
from resdiag.watch.recorder import (
    _NO_ADDITION,
    _OUTPUT_GRADIENT,
    _SITE_COLUMNS,
    Recorder,
    _saturated,
)
from resdiag.watch.skip import COLUMNS, SkipPath

HIDDEN = "no module takes or returns this tensor, so that a compiled pass hides it"
SPLIT = "it is used beside the module that takes it: no module sees its whole gradient"
OWN = "own metrics are not computed in passes that torch.compile runs"
FUNCTIONAL = "a compiled pass hides activations that are functions, not modules"


class Tap:
    """What is written at one port; each part is a tensor made beforehand, or None.

    Attributes:
        moments: Channel means, second moment and non-finite fraction, float64 (C + 2,).
        head: The first samples of the tensor.
        norm: G2 and the non-finite fraction of the gradient, float64 (2,).
        tail: The first samples of the gradient.
        gap: Largest entry of the gradient's sum over the batch, float64 (1,).
    """

    def __init__(self) -> None:
        self.moments: Tensor | None = None
        self.head: Tensor | None = None
        self.norm: Tensor | None = None
        self.tail: Tensor | None = None
        self.gap: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All parts that are there."""
        parts = (self.moments, self.head, self.norm, self.tail, self.gap)
        return [part for part in parts if part is not None]


class _Switch:
    """What all hooks look at; guarded by torch.compile, so that each state is one graph.

    Attributes:
        on: Whether passes write.
        eager: Whether hooks that run outside of every graph write too.
    """

    def __init__(self) -> None:
        self.on, self.eager = True, False


class _Gradient(torch.autograd.Function):
    """The identity, whose backward writes what the gradient is."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        norm: Tensor | None,
        tail: Tensor | None,
        gap: Tensor | None,
    ) -> Tensor:
        """A copy, which the compiler drops: an in-place operation may not overwrite a view."""
        ctx.norm, ctx.tail, ctx.gap = norm, tail, gap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Write into the parts."""
        _write_gradient(ctx.norm, ctx.tail, ctx.gap, g)
        return g, None, None, None


class _Hook:
    """The forward hooks of one module.

    Args:
        switch: Whether to write.
        taps: Per direction and number of the call, places and their taps.
        repeated: Whether the module is called several times in a pass.
    """

    def __init__(
        self,
        switch: _Switch,
        taps: dict[tuple[bool, int], list[tuple[int | str | None, Tap]]],
        *,
        repeated: bool,
    ) -> None:
        self.switch, self.taps, self.repeated = switch, taps, repeated
        self.calls = 0

    @never_alone
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Tap arguments."""
        if torch.compiler.is_compiling():
            taps = self.taps.get((False, self.calls)) if self.switch.on else None
            if taps is None or not torch.is_grad_enabled():
                return None
            changed, named = list(args), dict(kwargs)
            for place, tap in taps:
                if isinstance(place, str):
                    named[place] = _traced(tap, named[place])
                else:
                    changed[place] = _traced(tap, changed[place])  # type: ignore[index]
            return tuple(changed), named
        if self.switch.eager:
            for place, tap in self.taps.get((False, self.calls), ()):
                _eager(tap, kwargs[place] if isinstance(place, str) else args[place])  # type: ignore[index]
        return None

    @never_alone
    def after(self, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ANN401
        """Tap results, and count the call."""
        call = self.calls
        if self.repeated:
            self.calls = call + 1
        if torch.compiler.is_compiling():
            taps = self.taps.get((True, call)) if self.switch.on else None
            if taps is None or not torch.is_grad_enabled():
                return None
            for place, tap in taps:
                if place is None:
                    output = _traced(tap, output)
                elif isinstance(output, dict):
                    output = {**output, place: _traced(tap, output[place])}
                else:
                    parts = [*output]
                    parts[place] = _traced(tap, parts[place])  # type: ignore[index]
                    output = type(output)(parts)
            return output
        if self.switch.eager:
            for place, tap in self.taps.get((True, call), ()):
                _eager(tap, output if place is None else output[place])
        return None


def _traced(tap: Tap, x: Tensor) -> Tensor:
    """Write what is to be written of `x`; return it with the gradient's tap behind it."""
    _write_forward(tap, x.detach())
    if x.requires_grad and not (tap.norm is None and tap.tail is None and tap.gap is None):
        tapped: Tensor = _Gradient.apply(x, tap.norm, tap.tail, tap.gap)
        return tapped
    return x


@plain
def _eager(tap: Tap, x: Tensor) -> None:
    """The same for a hook outside of every graph: a tensor hook leaves the tensor as it is."""
    with torch.no_grad():
        _write_forward(tap, x.detach())
    if x.requires_grad and not (tap.norm is None and tap.tail is None and tap.gap is None):
        x.register_hook(lambda g: _write_gradient(tap.norm, tap.tail, tap.gap, g.detach()))


def _write_forward(tap: Tap, x: Tensor) -> None:
    if tap.moments is not None:
        values = _moments(x)
        if values.shape == tap.moments.shape:
            tap.moments.copy_(values)
    if tap.head is not None:
        _write_head(tap.head, x)


def _write_gradient(
    norm: Tensor | None, tail: Tensor | None, gap: Tensor | None, g: Tensor
) -> None:
    if norm is not None:
        norm.copy_(_gradient(g))
    if tail is not None:
        _write_head(tail, g)
    if gap is not None:
        gap.copy_(g.reshape(-1, g.shape[-1]).sum(0).abs().amax().double().reshape(1))


def _write_head(target: Tensor, x: Tensor) -> None:
    head = x[: target.shape[0]]
    if head.shape == target.shape:
        target.copy_(head)


def _moments(x: Tensor) -> Tensor:
    """Channel means, second moment, non-finite fraction: no look at a value, float64 throughout."""
    x = x if x.dim() > 1 else x.reshape(1, -1)
    channel = metrics.channel_dimension(x.dim())
    wide = x.double()
    mean = wide.mean([d for d in range(x.dim()) if d != channel])
    rest = torch.stack([wide.square().mean(), x.isfinite().logical_not().double().mean()])
    return torch.cat([mean, rest])


def _gradient(g: Tensor) -> Tensor:
    """G2 and non-finite fraction, see `metrics.gradient`."""
    size = g.double().square().sum().sqrt() * math.sqrt(g.shape[0] if g.dim() else 1)
    return torch.stack([size, g.isfinite().logical_not().double().mean()])


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
        self._switch = _Switch()
        self._at: dict[Port, Tap] = defaultdict(Tap)
        self._values: dict[int, Tap] = {}
        self._gradients: list[tuple[int, str, Tap, float]] = []
        self._place()
        self._parts = [part for tap in self._at.values() for part in tap.tensors()]
        self._hooks: list[_Hook] = []
        self._handles = list(self._install(model))

    def begin(self, *, on: bool) -> None:
        """Before a pass: whether to write."""
        self._switch.on = self._switch.eager = on
        for hook in self._hooks:
            if hook.repeated:
                hook.calls = 0

    def arm(self, *, on: bool) -> None:
        """The same for a pass whose beginning Python does not see."""
        self._switch.on = on

    def close(self) -> None:
        """Remove the hooks; graphs made with them are not used any more."""
        self._switch.on = self._switch.eager = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- where ---------------------------------------------------------------------------------

    def _place(self) -> None:
        """Decide which tensor is tapped where, and say what cannot be."""
        self._recorder.adopt(self._found.anatomy)
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

    def _tap(self, trail: Trail) -> Tap | None:
        """The tap that reads a tensor's values, one for all sites that it is."""
        if id(trail) not in self._values:
            port = trail.gradient_port() or trail.value_port()
            if port is None:
                return None
            self._values[id(trail)] = self._at[port]
        return self._values[id(trail)]

    def _place_values(self, row: int, site: str, trail: Trail | None) -> None:
        if trail is None:
            return
        tap = self._tap(trail)
        if tap is None:
            self._recorder.miss(row, _SITE_COLUMNS[site], HIDDEN)
        elif tap.moments is None:
            tap.moments = _numbers(trail.channels + 2, trail)

    def _place_head(self, trail: Trail | None) -> Tensor | None:
        """Keep the first samples of a tensor; None where it cannot be seen."""
        tap = None if trail is None else self._tap(trail)
        if tap is None or trail is None:
            return None
        if tap.head is None:
            tap.head = self._samples_of(trail)
        return tap.head

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

    def _gradient_tap(self, row: int, route: Route, trail: Trail) -> tuple[Tap | None, float]:
        """Where the whole gradient of a tensor passes, and what to multiply it with.

        The gradient of a sum is also that of an operand which nothing but the addition uses.
        """
        port = trail.gradient_port()
        if port is not None:
            return self._at[port], 1.0
        for other in self._found.routes[: row + 1]:
            if other.sum is trail and other.addition is not None:
                operands = (
                    (other.branch, other.addition.branch_scale),
                    (other.shortcut, other.addition.shortcut_scale),
                )
                for operand, scale in operands:
                    port = None if operand is None else operand.operand_port(other.begin)
                    if port is not None and scale:
                        return self._at[port], 1 / scale
        return None, 1.0

    def _place_skip(self, row: int, route: Route) -> None:
        """Keep first samples of the shortcut and the sum, and of what else the skip path needs."""
        if route.addition is None:
            return
        heads = [self._place_head(route.shortcut), self._place_head(route.sum)]
        if route.addition.path:
            heads.append(self._place_head(route.input))
        if not all(call.is_activation for call in route.addition.after):
            heads.append(self._place_head(route.output))
        if any(head is None for head in heads):
            self._recorder.miss(row, (*COLUMNS[:5], *COLUMNS[6:]), HIDDEN)

    def _place_gates(self, row: int, route: Route) -> None:
        columns = ("saturated_fraction", "dead_fraction")
        if not route.gates:
            self._recorder.miss(row, columns, "no known activation inside the block")
        elif any(self._place_head(trail) is None for _, trail in route.gates):
            self._recorder.miss(row, columns, FUNCTIONAL)

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
            tap.tail = self._samples_of(route.input) if tap.tail is None else tap.tail

    def _via(self, row: int, route: Route) -> tuple[Tap | None, float]:
        """Where the gradient that enters x through the shortcut passes, and its factor."""
        if route.addition is None or route.sum is None:
            return None, 1.0
        if route.shortcut is route.input:
            tap, factor = self._gradient_tap(row, route, route.sum)
            return tap, factor * route.addition.shortcut_scale
        return (None if route.projection is None else self._at[route.projection]), 1.0

    def _place_classifier(self) -> None:
        features, logits = self._found.features, self._found.logits
        seen = None if features is None else self._tap(features)
        port = None if logits is None else logits.gradient_port()
        if features is None or logits is None or seen is None or port is None:
            self._recorder._miss_head("head_mean", "head_bias", "head_kick")
            return
        if seen.moments is None:
            seen.moments = _numbers(features.channels + 2, features)
        self._at[port].gap = _numbers(1, logits)

    def _install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        places: dict[str, dict[tuple[bool, int], list[tuple[int | str | None, Tap]]]]
        places = defaultdict(lambda: defaultdict(list))
        for port, tap in self._at.items():
            if tap.tensors():
                places[port.module][port.is_output, port.call].append((port.place, tap))
        for name, taps in places.items():
            module = model.get_submodule(name)
            hook = _Hook(self._switch, dict(taps), repeated=self._found.calls[name] > 1)
            self._hooks.append(hook)
            # both on every module: the call is counted when it ends
            yield module.register_forward_pre_hook(hook.before, with_kwargs=True)
            yield module.register_forward_hook(hook.after)

    # -- what was written ----------------------------------------------------------------------

    def collect(self) -> None:
        """Write the pass that has ended into the buffers' open slots, and wipe the taps."""
        for one in self._recorder._own.metrics:
            self._recorder.reasons[one.entry.id].setdefault(OWN, set())
        self._collect_moments()
        self._collect_gradients()
        self._collect_skip()
        self._collect_gates()
        self._collect_classifier()
        self._cells.settle()  # before what was put is wiped
        if self._parts:
            torch._foreach_mul_(self._parts, math.nan)

    def _collect_moments(self) -> None:
        first: dict[int, tuple[int, str]] = {}
        sites: list[tuple[tuple[int, str], metrics.Sums]] = []
        for row, route in enumerate(self._found.routes):
            for site in ("input", "branch", "shortcut", "sum", "output"):
                trail = getattr(route, site)
                tap = None if trail is None else self._tap(trail)
                if tap is None or tap.moments is None:
                    continue
                scale = _scale(route, site)
                if id(trail) in first and scale == 1:
                    known = first[id(trail)]
                    for name in metrics.STATISTICS:
                        source = (known[0], f"{known[1]}_{name}")
                        self._cells.alias(row, f"{site}_{name}", source)
                else:
                    if scale == 1:
                        first[id(trail)] = row, site
                    sites.append(((row, f"{site}_mean"), _sums(tap.moments, scale)))
        for count in sorted({part.per_channel.numel() for _, part in sites}):
            same = [(key, part) for key, part in sites if part.per_channel.numel() == count]
            values = metrics.combine([part for _, part in same])
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
            share = metrics.share(via.tail * factor, total.tail * scale)
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
            values.append(metrics.stack(measured, self._cells.device))
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
            counts = [gate.sum(_others(gate.dim())) for gate in gates]
            sizes = [gate.numel() // len(count) for gate, count in zip(gates, counts, strict=True)]
            dead = [(count == size) + 0 * count for count, size in zip(counts, sizes, strict=True)]
            closed = torch.cat(counts).sum() / sum(gate.numel() for gate in gates)
            self._cells.put(slot, row, "saturated_fraction", closed)
            self._cells.put(slot, row, "dead_fraction", torch.cat(dead).mean())

    def _collect_classifier(self) -> None:
        features, logits = self._found.features, self._found.logits
        seen = None if features is None else self._values.get(id(features))
        port = None if logits is None else logits.gradient_port()
        if features is None or seen is None or seen.moments is None or port is None:
            return
        slot, gap = self._head.slot, self._at[port].gap
        if gap is None:
            return
        self._head.reserve(1, gap.device)
        self._head.write(slot, 0, "head_mean", metrics.combine([_sums(seen.moments, 1.0)])[0, :3])
        size = torch.full((), features.shape[-1], dtype=torch.float64, device=gap.device)
        self._head.write(slot, 0, "head_size", size)
        self._head.write(slot, 0, "head_gap", gap)


def _numbers(count: int, trail: Trail) -> Tensor:
    return torch.full((count,), math.nan, dtype=torch.float64, device=trail.device)


def _sums(moments: Tensor, scale: float) -> metrics.Sums:
    """What a tap wrote, times a factor, as `metrics.combine` takes it."""
    return metrics.Sums(
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
    return _saturated(call, x).double() + 0 * x.double()


def _lost(site: str, without_after: bool) -> tuple[str, ...]:
    """The columns that are NaN with the gradient of a site."""
    if site == "input":
        return ("grad_input",)
    if site == "output":
        return _OUTPUT_GRADIENT
    return ("grad_sum", *_OUTPUT_GRADIENT) if without_after else ("grad_sum",)


def _others(dims: int) -> tuple[int, ...]:
    """All dimensions but that of the channels."""
    return tuple(d for d in range(dims) if d != metrics.channel_dimension(dims))
