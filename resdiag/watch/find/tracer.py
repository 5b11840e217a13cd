"""Follows one forward pass and sees it as residual blocks.

Every tensor of the pass is a node of a `Dataflow`. At an addition, walk back from both operands to
the last tensor that they share: that is the block's input x, and the two ways from there are the
branch and the shortcut (`Residuals.judge` has the conditions). No list of classes, no names: what
counts are the operations on the two ways. An activation or a normalisation applied to the sum is
the after-add.

One block is one residual unit: in `x + attention(h) + mlp(h)` the second sum adds a parallel branch
to the unit that the first one began, however the terms are put in order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resdiag.watch.base.functions import Call, is_question
from resdiag.watch.base.safety import never_alone
from resdiag.watch.base.tensors import first_floating, tensors_in
from resdiag.watch.find.additions import ADDITIONS, Addition, Stacks, Sum, Ways, read_sum
from resdiag.watch.find.dataflow import Dataflow
from resdiag.watch.find.module_stack import Frame, Makers, ModuleStack
from resdiag.watch.find.passes import Bus, Observer, Operands, Surveyor
from resdiag.watch.find.residual import Residuals
from resdiag.watch.find.units import Search


class Tracing:
    """What is known of a model from one traced pass to the next.

    `units` are names of modules that are blocks even without a residual addition; if given,
    additions elsewhere are not blocks. Without, a network whose first pass has no residual addition
    has the units that `choose_units` finds in it.
    """

    def __init__(self, model: nn.Module, units: frozenset[str] | None = None) -> None:
        self.model, self.units = model, units
        self.names = {module: name for name, module in model.named_modules()}
        # names of units, and how many activations and normalisations after each belong to it
        self.tails = dict.fromkeys(units or (), 0)
        self.searching = units is None  # units are still to be found
        self.with_makers = True  # only the first pass needs the modules that made tensors
        self._framed = {module for module in self.names if module is model or _can_add(module)}

    def is_framed(self, module: nn.Module) -> bool:
        """Whether additions can run in a module's own forward, or it is a unit."""
        return module in self._framed or self.names.get(module) in self.tails


class TracedPass(TorchFunctionMode):
    """A forward pass followed from `start` to `finish`, which tells `ended`, or to `stop`."""

    def __init__(
        self,
        tracing: Tracing,
        observers: Sequence[Observer],
        surveyors: Sequence[Surveyor] = (),
        ended: "Callable[[TracedPass], None]" = lambda followed: None,
    ) -> None:
        super().__init__()
        self._ended = ended
        self.calls: Counter[str] = Counter()  # of each module
        self._tracing, self._surveyors = tracing, surveyors
        self._sees_all = len(surveyors) > 0 or tracing.searching  # modules that add nothing, too
        self._bus = Bus([*observers, *surveyors])
        self._flow = Dataflow()
        chosen = tracing.units is not None
        self._stack = ModuleStack(self._flow, self._bus, tracing.tails, chosen=chosen)
        self._residuals, self._stacked = Residuals(self._flow), Stacks()
        self._makers = Makers(tracing.names)
        self._search: Search | None = None
        if tracing.searching:
            self._search = Search(self._flow, self._stack.activations, self._stack.tell_passing)
        self._root = tracing.model
        self._head: tuple[Tensor | None, Tensor | None] = (None, None)
        self._thread = get_ident()  # replicas in other threads (DataParallel) are not followed
        self._entered = ExitStack()

    def start(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The forward of a module begins: the model's, or of one that runs alone."""
        self._root = root
        for one in self._surveyors:
            one.begin(self._flow)
        if root is self._tracing.model:
            self._bus.tell("started", [*tensors_in(args), *tensors_in(kwargs)])
        self._install(root)
        self._entered.enter_context(self)
        self._enter(self._tracing.names[root], root, args, kwargs)

    def finish(self, root: nn.Module, output: object) -> None:
        """It has ended as it should."""
        if self._stack.frames:
            self._leave(self._tracing.names[root], root, output)
            if root is self._tracing.model:
                self._choose(root, output)
                self._bus.tell("finished", *self._head, list(tensors_in(output)))
                self._tracing.with_makers = False
        self.stop()
        self._ended(self)

    def stop(self) -> None:
        """Leave the function mode and remove the hooks; safe to call twice."""
        self._entered.close()

    def same(self, old: Tensor, new: Tensor) -> None:
        """Follow on with `new` where a wrapper of the module's hands on `old` as another tensor."""
        if get_ident() == self._thread and self._flow.number(old) is not None:
            self._flow.mark(new, self._flow.descend([old]), None, alone=True)
            self._makers.same(old, new)
            self._bus.tell("same", old, new)

    def _install(self, root: nn.Module) -> None:
        """Hooks on the modules below the root, for this pass only."""
        for module, name in self._tracing.names.items():
            if module is not root and (self._sees_all or self._tracing.is_framed(module)):
                enter, leave = self._hooks(name, module)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                self._entered.callback(handle.remove)
                self._entered.callback(module.register_forward_hook(leave).remove)
        if self._tracing.with_makers:
            handle = nn.modules.module.register_module_forward_hook(self._makers.remember)
            self._entered.callback(handle.remove)

    def _hooks(
        self, name: str, owner: nn.Module
    ) -> tuple[Callable[..., None], Callable[..., object]]:
        """Hooks of one module; a copy of the model took them along, and calls them with another."""

        @never_alone
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            if module is owner and get_ident() == self._thread:
                self._enter(name, module, args, kwargs)

        @never_alone
        def leave(module: nn.Module, args: object, output: object) -> object:
            if torch.compiler.is_compiling():
                return None
            if module is owner and get_ident() == self._thread and self._stack.frames:
                return self._leave(name, module, output)
            return None

        return enter, leave

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """A module's forward begins."""
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if self._search is not None:
            self._search.enter(name, module, first_floating(inputs))
        if self._tracing.is_framed(module) or module is self._root:
            self.calls[name] += 1
            self._stack.push(name, module, inputs)
        for one in self._surveyors:
            one.enters(name, args, kwargs)

    def _leave(self, name: str, module: nn.Module, output: Any) -> Any:  # noqa: ANN401
        """A module's forward has ended."""
        if self._search is not None and module is not self._root:
            self._search.leave(module, first_floating(tensors_in(output)))
        if any(frame.module is module for frame in self._stack.frames):
            self._stack.pop(module, output)
        handed_on = output
        for one in self._surveyors:
            handed_on = one.leaves(name, module, handed_on)
        if handed_on is not output and isinstance(output, Tensor):
            self.same(output, handed_on)
        return handed_on

    def _choose(self, root: nn.Module, output: object) -> None:
        """The first pass ends without a residual addition: its modules are the units."""
        if self._search is not None:
            self._search.leave(root, first_floating(tensors_in(output)))
            for unit in self._search.units():
                self._tracing.tails[unit.owner] = len(unit.after)
                self._bus.tell("unit", unit)
            self._tracing.searching, self._search = False, None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run one torch function and follow it, unless it only reads an attribute."""
        kwargs = kwargs or {}
        if is_question(func) or not self._stack.frames:
            return func(*args, **kwargs)
        for one in self._surveyors:
            one.reads(func, args, kwargs)
        is_sum = func in ADDITIONS
        spelled = read_sum(func, args, kwargs) if is_sum else self._stacked.read(func, args)
        residual = None if spelled is None else self._residual(spelled)
        call = Call(func, args[1:], kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if call.is_activation and first is not None:
            self._stack.activations.append(call)
            self._bus.tell("activation", call, first)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        descent = self._flow.descend(call.operands(inputs))
        result = func(*args, **kwargs)
        for one in self._surveyors:
            result = one.returns(result)
        # setitem returns nothing, and makes the whole what it is
        results = list(tensors_in(args[:1] if call.name == "setitem" else result))
        for index, tensor in enumerate(results):
            piece = _piece(call, index, len(results))
            number = self._flow.mark(tensor, descent, call, alone=len(inputs) == 1, piece=piece)
            if number is None:
                continue
            owner = self._stack.owner_of(first, call, tensor)
            for one in self._surveyors:
                one.wrote(tensor)
            self._stack.trail(first, call, number, tensor)
            if self._search is not None:
                self._search.operation(call, descent.parents, number, tensor)
            if residual is not None:
                self._flow.set_stream(number, residual[0].stream)
                self._stack.open(self._stack.frames[-1], *residual, tensor)
                self._bus.tell("added", residual[0], tensor)
            elif owner is not None:
                owner.tail, owner.chain = tensor, (*owner.chain, call)
                owner.chain_parameters += self._flow.node(number).parameters
        linear = call.name == "linear" and descent.weighted and len(results) == 1
        if linear and residual is None and first is not None:
            # the last linear layer of the pass is the classifier, unless it turns a sum into more
            self._head = first, results[0]
        if call.name == "stack" and results:
            self._stacked.add(args, kwargs, results[0])
        return result

    def _residual(self, spelled: Sum) -> tuple[Addition, Operands] | None:
        """The addition, if the rule calls it residual; the block before it in this frame ends."""
        frame = self._stack.frames[-1]
        if self._tracing.units is not None and frame.name not in self._tracing.units:
            return None
        found = self._residuals.parallel(frame, spelled) or self._meet(frame, spelled)
        if found is not None:
            self._bus.tell("operands", *found)
        return found

    def _meet(self, frame: Frame, spelled: Sum) -> tuple[Addition, Operands] | None:
        """A new block whose shortcut and branch the operands are."""
        meeting = self._residuals.meet(spelled, self._stack.frames)
        if meeting is None:
            return None
        shortcut, branch = meeting.sides
        self._stack.close_before(frame, meeting.origin)
        with torch._C.DisableTorchFunction():
            h, f = shortcut.make(), branch.make()
        addition = Addition(
            owner=frame.name,
            ordinal=self._stack.ordinal(frame.name),
            entered=None if meeting.origin is None else meeting.origin.shape,
            shape=h.shape,
            dtype=h.dtype,
            shortcut_scale=shortcut.scale,
            branch_scale=branch.scale,
            branch_module=self._makers.of(f),
            shortcut_module=self._makers.of(h),
            **{field.name: getattr(meeting, field.name) for field in fields(Ways)},
        )
        if self._search is not None:  # the network is divided into blocks, not into units
            self._tracing.searching, self._search = False, None
            self._bus.tell("dismiss")
        return addition, Operands(meeting.origin, f, h)


def _piece(call: Call, index: int, count: int) -> str:
    """What part of its operand a result is, "" for the whole."""
    if count > 1 and call.name in ("chunk", "split", "unbind", "tensor_split", "split_with_sizes"):
        return f"{call.name} {index}"
    if call.name in ("getitem", "narrow", "select") and not list(tensors_in(call.args)):
        return f"{call.name} {call.args}"
    return ""


def _can_add(module: nn.Module) -> bool:
    """Whether an addition can run in a module's own forward: not in torch's leaves and lists."""
    leaf = next(module.children(), None) is None
    ours = not type(module).__module__.startswith("torch.nn.modules")
    return (ours or not leaf) and not isinstance(module, nn.Sequential | nn.ModuleList)
