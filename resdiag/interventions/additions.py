"""Change the residual additions of any model while it runs, without an edit of the model.

The blocks are found as everywhere (`resdiag.find_blocks`). Each residual addition is then known by
its place among the additions of equal shapes of one forward pass, and a function mode that is
switched on for each pass multiplies the branch or the shortcut that enters it. A pass whose
additions differ from those of the pass that found the blocks is refused, and so is torch.compile.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resdiag.errors import UsageError, unknown
from resdiag.interventions.table import Intervention, find_for_model
from resdiag.watch.base.functions import Call
from resdiag.watch.find.additions import ADDITIONS, Addition, read_sum
from resdiag.watch.find.blocks import Block, BlockFinder, trace_once
from resdiag.watch.find.passes import Operands


@dataclass(frozen=True, kw_only=True)
class Site:
    """One residual addition in the order of a pass.

    Attributes:
        block: The block that it makes.
        ordinal: Its place among the additions of two floating tensors of equal shapes.
        branch_first: Whether the branch is the left operand.
        in_place: Whether it writes into its left operand, which then can have no learned factor.
    """

    block: Block
    ordinal: int
    branch_first: bool
    in_place: bool


class Lesion:
    """An intervention in force on a model, until `remove()` or the end of a `with`.

    Attach a monitor before it, so that the monitor sees the changed additions.

    Attributes:
        name: Of the intervention.
        words: What was changed.
        blocks: The blocks that it changes.
        parameters: Learned factors, for the optimizer; empty unless the intervention learns.
    """

    def __init__(
        self, model: nn.Module, row: Intervention, sites: Sequence[Site], depth: int
    ) -> None:
        assert row.addition is not None
        self.name, self.words = row.name, row.words
        self.blocks = [site.block for site in sites]
        self._change, self._sites = row.addition, {site.ordinal: site for site in sites}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        scale = float(row.addition.branch(depth))
        self.parameters = [
            nn.Parameter(torch.tensor(scale, device=device)) for _ in sites if row.addition.learned
        ]
        self._scales: dict[int, float | Tensor] = dict.fromkeys(self._sites, scale)
        self._scales |= dict(zip(self._sites, self.parameters, strict=False))
        self._count, self._met = 0, 0
        self._last: Tensor | None = None
        self._mode = ExitStack()
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True, prepend=True),
        ]

    def remove(self) -> None:
        """Give the model back as it was; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Lesion":
        """The lesion itself: it is in force since it was made."""
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            raise UsageError(
                "a model with a lesion cannot be compiled", "run it without torch.compile"
            )
        self._count = self._met = 0
        self._last = None
        self._mode.enter_context(_EachCall(self.call))

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        self._mode.close()
        self._last = None
        if output is not None and self._met != len(self._sites):
            raise UsageError(
                f"this pass ran {self._met} of {len(self._sites)} additions to change: the model "
                "has changed since its blocks were found"
            )

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """One torch call of the pass, changed if it is one of the additions or follows one."""
        if self._last is not None and args and args[0] is self._last:
            call = Call(func, args[1:], kwargs)
            if call.is_activation or call.is_normalisation:
                self._last = None
                return args[0]
        operands = _equal_operands(func, args, kwargs)
        if operands is None:
            return func(*args, **kwargs)
        ordinal, self._count = self._count, self._count + 1
        site = self._sites.get(ordinal)
        if site is None:
            return func(*args, **kwargs)
        if tuple(operands[0].shape[1:]) != site.block.shape and operands[0].dim() > 1:
            shape = tuple(operands[0].shape[1:])
            raise UsageError(f"block {site.block.name} had {site.block.shape}, now {shape}")
        self._met += 1
        result = self._add(func, operands, kwargs, site)
        self._last = None if self._change.after_add else result
        return result

    def _add(
        self,
        func: Callable[..., Any],
        operands: tuple[Tensor, Tensor],
        kwargs: dict[str, Any],
        site: Site,
    ) -> Tensor:
        scales = [self._scales[site.ordinal], self._change.shortcut]
        left, right = scales if site.branch_first else reversed(scales)
        first, second = operands
        alpha = kwargs.get("alpha", 1)
        second = second if right == 1 and isinstance(right, float) else second * right
        if func is not Tensor.add_:
            first = first if left == 1 and isinstance(left, float) else first * left
            return torch.add(first, second, alpha=alpha)
        return first.mul_(left).add_(second, alpha=alpha)


class _EachCall(TorchFunctionMode):
    """Hands every torch call to a function; what that function calls does not come here."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return self._call(func, args, dict(kwargs or {}))


def lesion(
    model: nn.Module,
    name: str,
    *inputs: object,
    blocks: Sequence[int | str] | None = None,
    **kwargs: object,
) -> Lesion:
    """Change one thing about a model's residual blocks, and undo the change afterwards.

    Args:
        model: Any module; its blocks are found with one pass over the inputs, in evaluation mode.
        name: no_shortcut, drop_block, half_branch, sqrt_depth, skipinit, no_after_add, or the name
            of a registered intervention.
        *inputs: Example inputs of its forward.
        blocks: Indices or names of the blocks to change; None changes all.
        **kwargs: Keyword inputs of its forward.

    Returns:
        A handle with `remove()`, and a context manager. Give its `parameters` to the optimizer:
            the factors that the lesion learns, if any.

    Raises:
        UsageError: The lesion or a block is unknown, or a block cannot be changed so: it adds more
            than two tensors, or nothing follows its addition.

    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(2, 3, 64, 64)
    >>> with lesion(model, "no_after_add", x, blocks=["layer4.1"]) as handle:
    ...     len(handle.blocks), bool((model(x) < 0).any())
    (1, True)
    """
    return apply(find_for_model(name), model, *inputs, blocks=blocks, **kwargs)


def apply(
    row: Intervention,
    model: nn.Module,
    *inputs: object,
    blocks: Sequence[int | str] | None = None,
    **kwargs: object,
) -> Lesion:
    """As `lesion`, with a row that changes additions and need not be in the table."""
    found, sites = find_sites(model, *inputs, **kwargs)
    picked = pick_sites(row, found, sites, blocks)
    if not picked:
        raise UsageError(f"lesion '{row.name}' has nothing to change in {type(model).__name__}")
    return Lesion(model, row, picked, len(found))


def pick_sites(
    row: Intervention,
    found: Sequence[Block],
    sites: Sequence[Site],
    blocks: Sequence[int | str] | None,
) -> list[Site]:
    """The additions that an intervention changes; without `blocks` all that it can change.

    Args:
        row: The intervention.
        found: The model's blocks, see `find_sites`.
        sites: Their additions.
        blocks: Indices or names of the blocks to change.

    Raises:
        UsageError: A block is unknown, adds more than two tensors, or was named and cannot be
            changed so.
    """
    picked, able = list[Site](), {site.block.index: site for site in sites}
    for block in _choose(found, blocks):
        if block.index not in able:
            raise UsageError(f"block {block.name} has no addition of two tensors to change")
        obstacle = _obstacle(row, able[block.index])
        if obstacle and blocks is not None:
            raise UsageError(f"block {block.name} {obstacle}")
        if not obstacle:
            picked.append(able[block.index])
    return picked


def _obstacle(row: Intervention, site: Site) -> str:
    """Why an intervention cannot change an addition, or ""."""
    change = row.addition
    if change and not change.after_add and site.block.after_add == "none":
        return "has nothing after its addition"
    if change and change.learned and site.in_place:
        return "adds in place: its factor cannot be learned"
    return ""


def find_sites(
    model: nn.Module, *inputs: object, **kwargs: object
) -> tuple[list[Block], list[Site]]:
    """The blocks of a model, and the additions that can be changed; at most one a block."""
    finder = _Residual()
    with _EachCall(finder.call):
        trace_once(model, inputs, kwargs, [finder])
    every = finder.anatomy.blocks
    return [block for block in every if block.shortcut != "none"], [
        Site(block=every[row], ordinal=ordinal, branch_first=first, in_place=in_place)
        for row, (ordinal, first, in_place) in sorted(finder.found.items())
        if row not in finder.parallel
    ]


class _Residual(BlockFinder):
    """Learns from the tracer which addition of the pass is a residual one.

    Attributes:
        found: By the block's row, the place of its residual addition among the additions, whether
            the branch is on the left, and whether the sum is written there.
        parallel: Rows of blocks to which more branches are added.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next: Operands | None = None  # of a residual addition about to be computed
        self._place: tuple[int, bool, bool] | None = None  # of that addition, once it is computed
        self._count = 0
        self.found: dict[int, tuple[int, bool, bool]] = {}
        self.parallel: set[int] = set()

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """A residual addition is about to be computed."""
        self._next, self._place = tensors, None

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """One torch call, after the tracer has seen it."""
        operands = _equal_operands(func, args, kwargs)
        if operands is not None:
            if self._next is not None:
                first = self._next.branch is operands[0]
                self._place = self._count, first, func is Tensor.add_
            self._count += 1
        return func(*args, **kwargs)

    def added(self, addition: Addition, total: Tensor) -> None:
        """It is done; if it was no addition of two tensors, it cannot be changed."""
        super().added(addition, total)
        if addition.extends:
            self.parallel.add(len(self.anatomy.blocks) - 1)
        elif self._place is not None:
            row = self.anatomy.rows[addition.owner, addition.ordinal]
            self.found[row] = self._place
        self._next = self._place = None


def _choose(found: Sequence[Block], wanted: Sequence[int | str] | None) -> list[Block]:
    if not found:
        raise UsageError("the model has no residual addition")
    if wanted is None:
        return list(found)
    by_key: dict[int | str, Block] = {block.index: block for block in found}
    by_key |= {block.name: block for block in found}
    for key in wanted:
        if key not in by_key:
            raise unknown("block", str(key), [block.name for block in found])
    return [by_key[key] for key in wanted]


def _equal_operands(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Both tensors of a plain addition of equal shapes; BatchNorm's counter is not one."""
    spelled = read_sum(func, args, kwargs) if func in ADDITIONS else None
    if spelled is None or spelled.left.call or spelled.right.call or spelled.is_difference:
        return None
    if spelled.left.scale != 1 or func.__name__.startswith("lerp"):
        return None
    left, right = spelled.left.inputs[0], spelled.right.inputs[0]
    if left.shape != right.shape or not left.dim() or not left.is_floating_point():
        return None
    return left, right
