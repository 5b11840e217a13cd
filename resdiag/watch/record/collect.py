"""Records passes of which Python sees nothing: those that torch.compile runs or CUDA replays.

Every tensor of interest gets a tap where it passes in or out of a module or an operation. When the
step has ended, what the taps wrote goes the way of everything else that is recorded: moments into
`Sites`, first samples into `SkipPath` and `Saturation`, gradients into `Backward`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.safety import guarded, never_alone
from resdiag.watch.measure import reductions
from resdiag.watch.measure.changes import saturated
from resdiag.watch.measure.moments import Sums
from resdiag.watch.plan.ports import BlockPlan, Plan
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.graph_placement import Placement
from resdiag.watch.record.graph_taps import MEANS, SECOND, Hook, Switch, TappedOperations, Taps
from resdiag.watch.record.operations import Operations, Where

INSIDE = (
    "a compiled function around the model hides operations that are no modules: compile the model"
)
CHANGED = "the compiled pass did other operations than the pass over example_inputs"
UNREACHED = "in the compiled pass no gradient came to this tensor"


class GraphRecorder:
    """The taps of one model, and what becomes of what they wrote."""

    def __init__(self, model: nn.Module, plan: Plan, recorder: Recorder) -> None:
        self.guard = recorder.guard
        self._plan, self._recorder, self._cells = plan, recorder, recorder.parts.cells
        self._blocks = plan.anatomy.blocks
        recorder.adopt(plan.anatomy)
        ends = [block.output for block in plan.blocks if block.output is not None]
        if ends:
            self._cells.reserve(len(plan.blocks), ends[0].device)
        self._placed = Placement(plan, recorder)
        self._written = [x for tap in self._placed.taps.values() for x in tap.tensors()]
        self._switch, self._hooks = Switch(), list[Hook]()
        self._was_entered = self._was_captured = False
        self._operations: Operations | None = None
        self._entered, self._installed = ExitStack(), ExitStack()
        for handle in self._install(model):
            self._installed.callback(handle.remove)

    def begin(self, *, on: bool, captured: bool = False) -> None:
        """A pass begins, whose taps write if `on`.

        If `captured`, a CUDA graph takes the pass down, and replays it without Python.
        """
        self._switch.on = self._switch.eager = on
        for hook in self._hooks:
            if hook.repeated:
                hook.calls = 0
        self._leave()
        if on and self._operations is not None:
            self._operations.reset()
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
        self._installed.close()

    def _install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        places = defaultdict[str, defaultdict[tuple[bool, int], Taps]](lambda: defaultdict(list))
        inside = defaultdict[str, defaultdict[Where, Taps]](lambda: defaultdict(list))
        for port, tap in self._placed.taps.items():
            if tap.tensors() and port.operation:
                where = port.call, port.operation, port.ordinal
                inside[port.module][where].append((port.place, tap))
            elif tap.tensors():
                places[port.module][port.is_output, port.call].append((port.place, tap))
        for name, taps in places.items():
            module = model.get_submodule(name)
            hook = Hook(self._switch, dict(taps), repeated=self._plan.calls[name] > 1)
            self._hooks.append(hook)
            # both on every module: the call is counted when it ends
            yield module.register_forward_pre_hook(hook.before, with_kwargs=True)
            yield module.register_forward_hook(hook.after)
        if inside:
            handlers = {name: TappedOperations(self._switch, at) for name, at in inside.items()}
            self._operations = Operations(self._plan, handlers, dict(model.named_modules()))
            yield from self._operations.install()
            yield model.register_forward_hook(self._end, always_call=True)

    @never_alone
    def _end(self, module: nn.Module, args: object, output: object) -> None:
        """The model's forward has ended; where it is a part of somebody's graph, nothing began."""
        if not torch.compiler.is_compiling():
            self._leave()

    def _leave(self) -> None:
        self._entered.close()
        if self._operations is not None:
            self._operations.running.clear()

    @guarded
    @torch.no_grad()
    def collect(self) -> None:
        """Hand on what the pass that has ended wrote, and wipe the taps."""
        self._drop_unseen()
        self._collect_moments()
        self._collect_skip()
        self._collect_activations()
        self._recorder.complete()
        self._collect_gradients()
        self._collect_custom()
        self._collect_classifier()
        self._cells.settle()  # before what was put is wiped
        if self._written:
            torch._foreach_mul_(self._written, math.nan)

    def _drop_unseen(self) -> None:
        """Note what was not written as it should have been, and make it NaN."""
        frames = {} if self._operations is None else self._operations.frames
        changed = {name for name, frame in frames.items() if frame.has_changed}
        entered = self._was_entered or self._was_captured
        for row, columns, tap in self._placed.users:
            if tap.port.operation and not (entered and tap.port.module not in changed):
                self.guard.miss(row, columns, CHANGED if entered else INSIDE)
                torch._foreach_mul_(tap.tensors(), math.nan)
                continue
            norm = tap.gradient.sums
            if norm is not None and reductions.on_host(norm.device):
                gradients = tuple(c for c in columns if c.startswith("grad_"))
                if gradients and norm[0].isnan() and not norm[1].isfinite():
                    self.guard.miss(row, columns, UNREACHED)
        self._was_entered = False

    def _collect_moments(self) -> None:
        first: dict[int, tuple[int, str]] = {}
        sites = self._recorder.sites
        for row, block in enumerate(self._plan.blocks):
            for site in self._placed.sites:
                trail = block.trail(site)
                tap, scale = self._placed.tap_of(trail), _scale(block, site)
                if tap is None or tap.forward.sums is None:
                    continue
                if scale != 1 or first.setdefault(id(trail), (row, site)) == (row, site):
                    sites.keep(row, site, _sums(tap.forward.sums, scale))
                else:
                    sites.repeat(row, site, first[id(trail)])

    def _collect_gradients(self) -> None:
        backward = self._recorder.backward
        for row, column, tap, factor in self._placed.gradients:
            assert tap.gradient.sums is not None
            size, broken, batch = _scalars(tap.gradient.sums)
            numel = batch * math.prod(self._blocks[row].shape)
            backward.write(row, column, size * abs(factor), broken, batch, numel)
            if column == "grad_sum" and self._blocks[row].ends_at_sum:
                backward.end_at_sum(row)
        for row, block in enumerate(self._plan.blocks):
            if block.addition is None or block.input is None or self._recorder.is_core:
                continue
            total, scale = self._placed.gradient_tap(row, block.input)
            via, factor = self._placed.shortcut_tap(row, block)
            if total and via and total.gradient.head is not None and via.gradient.head is not None:
                heads = via.gradient.head * factor, total.gradient.head * scale
                backward.write_share(row, *heads)

    def _collect_skip(self) -> None:
        skip, core, joined = self._recorder.skip, self._recorder.is_core, True
        head_of = self._placed.head_of
        for row, block in enumerate(self._plan.blocks):
            if core and not block.after and block.addition is not None:
                skip.pass_by(row)
                continue
            addition, u = block.addition, head_of(block.sum)
            h = u if core else head_of(block.shortcut)
            x = head_of(block.input) if addition is not None and addition.path else h
            if addition is None or u is None or h is None:
                joined = False
                continue
            scale, joined = addition.shortcut_scale, joined and block.joined
            if not core:
                stage, h = self._blocks[row].stage, h if scale == 1 else h * scale
                skip.open(
                    row, x, h, addition.path, scale, stage=stage,
                    projected=addition.kind == "projection", joined=joined, source="",
                )  # fmt: skip
            skip.add(row, u)
            output = head_of(block.output)
            skip.close(row, u if output is None else output, addition.after)
            joined = True

    def _collect_activations(self) -> None:
        if self._recorder.is_core:
            return
        for row, block in enumerate(self._plan.blocks):
            counts, sizes = list[Tensor](), list[int]()
            for call, trail in block.activations:
                if (x := self._placed.head_of(trail)) is not None:
                    # 0 or 1 for each unit; NaN where the tap did not write
                    closed = saturated(call, x).double() + 0 * x.double()
                    channel = self._placed.channel(row, trail)
                    counts.append(closed.sum([d for d in range(x.dim()) if d != channel]))
                    sizes.append(x.numel())
            if counts and len(counts) == len(block.activations):
                self._recorder.parts.write_saturation(row, counts, sizes)

    def _collect_custom(self) -> None:
        for row, name, written, index in self._placed.custom:
            if written.values is not None:
                self._cells.put(self._cells.slot, row, name, _scalars(written.values)[index])

    def _collect_classifier(self) -> None:
        features, tap, head = self._plan.features, self._placed.logits_tap(), self._recorder.head
        seen, gap = self._placed.tap_of(features), None if tap is None else tap.gradient.total
        if features and seen and seen.forward.sums is not None and gap is not None:
            sums = _sums(seen.forward.sums, 1.0)
            head.write_features(sums, features.shape[-1], gap.device)
            head.write_gap(head.slot, gap.clone())  # the tap is wiped before ranks meet


def _scalars(values: Tensor) -> list[Any]:
    """The numbers of a tap: plain ones on the CPU, tensors on an accelerator."""
    return values.tolist() if reductions.on_host(values.device) else list(values.clone().unbind())


def _sums(moments: Tensor, scale: float) -> Sums:
    """What a tap wrote, times a factor, as `moments.combine` takes it."""
    second, broken, count = _scalars(moments[SECOND:])
    return Sums(
        per_channel=moments[MEANS] * (scale * count),
        size=count,
        second=second * scale**2,
        spread=None,
        broken=broken,
    )


def _scale(block: BlockPlan, site: str) -> float:
    """The factor on an operand inside the addition."""
    if block.addition is None:
        return 1.0
    scales = {"branch": block.addition.branch_scale, "shortcut": block.addition.shortcut_scale}
    return scales.get(site, 1.0)
