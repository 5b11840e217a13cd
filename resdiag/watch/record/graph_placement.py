"""Decides which tensor of a plan is tapped where, and says what cannot be."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resdiag.catalog.table import LOCAL, RECORDED, SITES
from resdiag.watch.measure import reductions
from resdiag.watch.measure.skip_path import COLUMNS
from resdiag.watch.plan.ports import BlockPlan, Plan, Port, Trail
from resdiag.watch.record.backward import OUTPUT_GRADIENT
from resdiag.watch.record.forward import NO_ADDITION, Recorder
from resdiag.watch.record.graph_taps import Tap, Written, numbers
from resdiag.watch.record.sites import SITE_COLUMNS

HIDDEN = "no module takes or returns this tensor, nor does an operation that a graph shows"
SPLIT = "its gradient comes together where no module or operation can be told in a compiled pass"
CUSTOM = "custom metrics are computed in compiled passes only if registered with compiles=True"
UNKNOWN = "this metric is not recorded in compiled passes"
_BESIDE = {"grad_param", "update_ratio", "branch_ratio", "elasticity"}  # no tap of their own
_CORE_SITES = ("branch", "shortcut", "output")
_LOST = {"input": ("grad_input",), "sum": ("grad_sum",), "output": OUTPUT_GRADIENT}


class Placement:
    """The taps of one plan; notes in the recorder what cannot be tapped.

    `users` says which columns of which row each tap feeds; `gradients` has row, column, tap and the
    factor to apply; `custom` row and id of each metric, where it is written and its index there.
    """

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self.plan, self._recorder = plan, recorder
        self._samples, self._moments = recorder.parts.samples, recorder.parts.moments
        self.sites = _CORE_SITES if recorder.is_core else SITES
        self.taps: dict[Port, Tap] = {}
        self.users: list[tuple[int, tuple[str, ...], Tap]] = []
        self.gradients: list[tuple[int, str, Tap, float]] = []
        self.custom: list[tuple[int, str, Written, int]] = []
        self._values: dict[int, Tap] = {}
        recorder.head.miss(*LOCAL, reason="a compiled pass does not show its batch")
        for row, block in enumerate(plan.blocks):
            self._place(row, block)
        self._place_classifier()
        fed = {column for _, columns, _ in self.users for column in columns}
        for column in set(RECORDED) - fed - _BESIDE if plan.blocks else ():
            if column not in recorder.guard.reasons:
                recorder.guard.reasons[column][UNKNOWN] = set()

    def tap_of(self, trail: Trail | None) -> Tap | None:
        """The tap that reads a tensor's values, one for all sites that it is."""
        if trail is not None and id(trail) not in self._values:
            tap = self._tap_at(trail.gradient_port() or trail.value_port())
            if tap is not None:
                self._values[id(trail)] = tap
        return self._values.get(id(trail))

    def head_of(self, trail: Trail | None) -> Tensor | None:
        """The first samples of a tensor, if they are kept."""
        tap = self._values.get(id(trail))
        return None if tap is None else tap.forward.head

    def channel(self, row: int, trail: Trail) -> int:
        """The dimension of the channels in a tensor of a block."""
        block, dims = self.plan.anatomy.blocks[row], len(trail.shape)
        known = block.features if dims == len(block.shape) + 1 else None
        return reductions.channel_dimension(dims, known)

    def gradient_tap(self, row: int, trail: Trail) -> tuple[Tap | None, float]:
        """Where the whole gradient of a tensor passes, and what to multiply it with.

        The gradient of a sum is also that of an operand which nothing but the addition uses.
        """
        if (port := trail.gradient_port()) is not None:
            return self._tap_at(port), 1.0
        for other in self.plan.blocks[: row + 1]:
            if other.sum is trail and other.addition is not None:
                for operand, scale in (
                    (other.branch, other.addition.branch_scale),
                    (other.shortcut, other.addition.shortcut_scale),
                ):
                    port = None if operand is None else operand.operand_port(other.begin)
                    if port is not None and scale:
                        return self._tap_at(port), 1 / scale
        return self._tap_at(trail.gradient_port(operations=True)), 1.0

    def shortcut_tap(self, row: int, block: BlockPlan) -> tuple[Tap | None, float]:
        """Where the gradient that enters x through the shortcut passes, and its factor."""
        if block.addition is None or block.sum is None:
            return None, 1.0
        if block.shortcut is block.input:
            tap, factor = self.gradient_tap(row, block.sum)
            return tap, factor * block.addition.shortcut_scale
        if block.addition.is_gated:
            return None, 1.0
        tap = self._tap_at(block.projection)
        if tap is not None:
            tap.separate = True  # x may be used elsewhere: of its gradient only this part is meant
        return tap, 1.0

    def logits_tap(self) -> Tap | None:
        """Where the whole gradient of the logits passes."""
        logits = self.plan.logits
        if logits is None:
            return None
        return self._tap_at(logits.gradient_port() or logits.gradient_port(operations=True))

    def _place(self, row: int, block: BlockPlan) -> None:
        for site in self.sites:
            self._place_values(row, site, block.trail(site))
        if block.addition is None:
            self._recorder.guard.miss(row, NO_ADDITION, "the block has no residual addition")
        self._place_gradients(row, block)
        self._place_skip(row, block)
        if not self._recorder.is_core:
            self._place_activations(row, block)
            self._place_share(row, block)
        self._place_custom(row, block)

    def _tap_at(self, port: Port | None) -> Tap | None:
        return None if port is None else self.taps.setdefault(port, Tap(port, self._moments))

    def _place_values(self, row: int, site: str, trail: Trail | None) -> None:
        if trail is None:
            return
        tap = self.tap_of(trail)
        if tap is None:
            self._recorder.guard.miss(row, SITE_COLUMNS[site], HIDDEN)
            return
        self.users.append((row, SITE_COLUMNS[site], tap))
        _place_moments(tap, trail, self.channel(row, trail))

    def _place_heads(
        self, row: int, columns: tuple[str, ...], trails: Sequence[Trail | None]
    ) -> None:
        """Keep the first samples of some tensors, or say that not all can be seen."""
        for trail in trails:
            tap = self.tap_of(trail)
            if trail is None or tap is None:
                self._recorder.guard.miss(row, columns, HIDDEN)
                continue
            self.users.append((row, columns, tap))
            self._place_head(tap.forward, trail)

    def _place_head(self, written: Written, trail: Trail) -> None:
        if written.head is None:
            count = trail.shape[0] if self._samples is None else self._samples
            shape = count, *trail.shape[1:]
            dtype = torch.promote_types(trail.dtype, torch.float32)
            written.head = torch.full(shape, math.nan, dtype=dtype, device=trail.device)

    def _place_gradients(self, row: int, block: BlockPlan) -> None:
        at_sum = self.plan.anatomy.blocks[row].ends_at_sum
        ends = {"sum": block.sum, "output": None if at_sum else block.output, "input": block.input}
        if self._recorder.is_core:
            ends = {"output": block.output}
        for site, trail in ends.items():
            if trail is None:
                continue
            tap, factor = self.gradient_tap(row, trail)
            lost = (*_LOST[site], *(OUTPUT_GRADIENT if at_sum and site == "sum" else ()))
            if tap is None:
                self._recorder.guard.miss(row, lost, SPLIT if trail.visits else HIDDEN)
            else:
                if tap.gradient.sums is None:
                    tap.gradient.sums = numbers(3, trail)
                self.gradients.append((row, f"grad_{site}", tap, factor))
                self.users.append((row, lost, tap))

    def _place_skip(self, row: int, block: BlockPlan) -> None:
        """Keep first samples of the shortcut and the sum, and of what else the skip path needs."""
        if block.addition is None:
            return
        core = self._recorder.is_core
        trails = [block.sum] if core else [block.shortcut, block.sum]
        if core and not block.after:
            return
        if block.addition.path and not core:
            trails.append(block.input)
        if not all(call.is_activation for call in block.after):
            trails.append(block.output)
        columns = COLUMNS[:1] if core else (*COLUMNS[:5], *COLUMNS[6:])
        self._place_heads(row, columns, trails)

    def _place_activations(self, row: int, block: BlockPlan) -> None:
        columns = ("saturated_fraction", "dead_fraction")
        if not block.activations:
            self._recorder.guard.miss(row, columns, "no known activation inside the block")
        self._place_heads(row, columns, [trail for _, trail in block.activations])

    def _place_share(self, row: int, block: BlockPlan) -> None:
        """Keep first samples of dL/dx and of what came to it through the shortcut."""
        if block.addition is None or block.input is None:
            return
        total, _ = self.gradient_tap(row, block.input)
        via, _ = self.shortcut_tap(row, block)
        if total is None or via is None:
            reason = HIDDEN if via is None else SPLIT
            self._recorder.guard.miss(row, ("shortcut_share",), reason)
            return
        for tap in (total, via):
            self.users.append((row, ("shortcut_share",), tap))
            self._place_head(tap.gradient, block.input)

    def _place_custom(self, row: int, block: BlockPlan) -> None:
        """Custom metrics of which the user says that they may become part of a graph."""
        for one in self._recorder.custom.metrics:
            name, site = one.entry.id, one.entry.site
            backward = site.startswith("grad_")
            trail = block.trail(site.removeprefix("grad_"))
            if trail is None or not one.compiles:
                self._recorder.guard.reasons[name].setdefault(CUSTOM, set())
                continue
            tap = self.gradient_tap(row, trail)[0] if backward else self.tap_of(trail)
            if tap is None:
                self._recorder.guard.miss(row, (name,), HIDDEN)
            else:
                written = tap.gradient if backward else tap.forward
                self.custom.append((row, name, written, len(written.functions)))
                written.functions = (*written.functions, one.function)
                written.values = numbers(len(written.functions), trail)

    def _place_classifier(self) -> None:
        features, logits = self.plan.features, self.plan.logits
        seen, tap = self.tap_of(features), self.logits_tap()
        if features is None or logits is None or seen is None or tap is None:
            self._recorder.head.miss("head_mean", "head_bias", "head_kick")
            return
        _place_moments(seen, features, reductions.channel_dimension(len(features.shape)))
        tap.gradient.total = numbers(logits.shape[-1], logits)


def _place_moments(tap: Tap, trail: Trail, channel: int) -> None:
    if tap.forward.sums is None:
        tap.channel = channel
        tap.forward.sums = numbers(trail.shape[channel] + 3, trail)
