"""What a model, its optimizers and its loop consist of, as plain data for the verdict.

Faults that no number of a block shows are facts about the whole: parameters that no optimizer has,
updates in evaluation mode, a normalisation whose statistics never move.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.watch.base.tensors import mesh_of
from resdiag.watch.find.blocks import Anatomy, Block
from resdiag.watch.find.inspection import Inspection, Place

_NAMES = 8
"""Names that an entry lists at most."""

_RANDOM = (nn.modules.dropout._DropoutNd,)
_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


class Events:
    """How often things happened in a loop, and in which steps first and last."""

    def __init__(self) -> None:
        self._seen: dict[str, list[int]] = {}

    def note(self, name: str, step: int) -> None:
        """It happened in a step."""
        count, first, _ = self._seen.get(name, [0, step, step])
        self._seen[name] = [count + 1, first, step]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """By name: count, first and last step."""
        keys = ("count", "first", "last")
        return {name: dict(zip(keys, seen, strict=True)) for name, seen in self._seen.items()}


@dataclass(eq=False)
class Holding:
    """One group of an optimizer's parameters, and its rates.

    Attributes:
        optimizer: Its class.
        parameters: The group's parameters.
        lr: The learning rate of the last step that was seen.
        highest: The highest one of the steps that were seen.
    """

    optimizer: str
    parameters: Sequence[Tensor]
    lr: float
    highest: float


class Holdings:
    """Which parameters the optimizers of a model hold, and at what rates."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._groups: dict[int, list[Holding]] = {}
        for optimizer in optimizers:
            self.see(optimizer)

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer was seen before."""
        return id(optimizer) in self._groups

    def see(self, optimizer: Optimizer) -> None:
        """Note the groups and the rates of an optimizer as of now."""
        known = self._groups.get(id(optimizer), [])
        now = []
        for index, group in enumerate(optimizer.param_groups):
            lr = group.get("lr", 0.0)
            lr = float(lr) if not isinstance(lr, Tensor) or lr.is_cpu else float("nan")
            before = known[index].highest if index < len(known) else lr
            now.append(Holding(type(optimizer).__name__, group["params"], lr, max(before, lr)))
        self._groups[id(optimizer)] = now

    def groups(self) -> Iterator[Holding]:
        """The groups of all optimizers."""
        for groups in self._groups.values():
            yield from groups


class Inventory:
    """Takes stock of what a monitor watches.

    Args:
        model: The model.
        optimizers: Those that `attach` was given.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.events, self.holdings = Events(), Holdings(optimizers)
        self._model = model
        self._running = {
            name: statistics.clone()
            for name, module in model.named_modules()
            if (statistics := _running(module)) is not None
        }

    @property
    def trains_nothing(self) -> bool:
        """Whether there are optimizers, and all that they hold is not the model's."""
        held = {id(p) for group in self.holdings.groups() for p in group.parameters}
        return bool(held) and held.isdisjoint(map(id, self._model.parameters()))

    def take(
        self,
        anatomy: Anatomy,
        inspection: Inspection | None,
        later: Inspection | None,
        activation: str,
    ) -> dict[str, Any]:
        """Everything, as of now; waits for the device.

        Args:
            anatomy: The blocks.
            inspection: What the first traced pass showed.
            later: What another one showed.
            activation: Name of the activation that the model ends with, or "".

        Returns:
            `trainable`: per block, the share of its parameters that require gradients;
            `parameters`: how many require gradients, and which of those no optimizer holds;
            `groups`: of the optimizers; `events`: updates, and updates in evaluation mode;
            `evaluating`: kinds of modules that evaluation mode changes and that are in it;
            `recurrent`: names of recurrent modules; `stuck`: BatchNorms in training mode whose
            running statistics have not moved; `activation`; and, if a pass was traced,
            `normalisations`, `attentions`, `constant` weight matrices out of `matrices`, and
            modules `lacking` an addition; the first and the last of these again as
            `later_attentions` and `later_lacking` of the last pass, at `later_step`, that was
            traced again.
        """
        names = {id(p): name for name, p in self._model.named_parameters()}
        places = {id(p): row for row, own in enumerate(anatomy.parameters) for p in own}
        found: dict[str, Any] = {
            "trainable": [_trainable(own) for own in anatomy.parameters],
            "parameters": self._parameters(names, places),
            "groups": [self._group(one, names, places) for one in self.holdings.groups()],
            "events": self.events.to_dict(),
            "evaluating": sorted(set(self._evaluating())),
            "recurrent": [
                n for n, m in self._model.named_modules() if isinstance(m, nn.RNNBase | nn.RNNCell)
            ][:_NAMES],
            "stuck": self._stuck(anatomy.blocks),
            "activation": activation,
        }
        if inspection is not None and inspection.is_whole:
            found |= _inspected(inspection, anatomy.blocks)
        if later is not None and later.is_whole:
            found |= {
                "later_attentions": _attentions(later, anatomy.blocks),
                "later_lacking": later.lacking(),
                "later_step": later.step,
            }
        return found

    def _parameters(self, names: Mapping[int, str], places: Mapping[int, int]) -> dict[str, Any]:
        held = {id(p) for group in self.holdings.groups() for p in group.parameters}
        trained = [p for p in self._model.parameters() if p.requires_grad]
        missing = [p for p in trained if id(p) not in held]
        foreign = [p for g in self.holdings.groups() for p in g.parameters if id(p) not in names]
        shapes = sorted(tuple(p.shape) for p in trained)
        return {
            "known": bool(held),
            "trainable": len(trained),
            "unheld": len(missing),
            "names": [names[id(p)] for p in missing[:_NAMES]],
            "blocks": sorted({places[id(p)] for p in missing if id(p) in places}),
            "outside": sum(id(p) not in places for p in missing),
            "foreign": len(foreign),
            "copies": bool(foreign) and sorted(tuple(p.shape) for p in foreign) == shapes,
        }

    @staticmethod
    def _group(one: Holding, names: Mapping[int, str], places: Mapping[int, int]) -> dict[str, Any]:
        own = [p for p in one.parameters if id(p) in names]
        return {
            "optimizer": one.optimizer,
            "lr": one.lr,
            "highest": one.highest,
            "parameters": len(own),
            "size": sum(p.numel() for p in own),
            "names": [names[id(p)] for p in own[:2]],
            "blocks": sorted({places[id(p)] for p in own if id(p) in places}),
        }

    def _evaluating(self) -> Iterator[str]:
        for module in self._model.modules():
            drops = isinstance(module, _RANDOM) and module.p > 0
            if not module.training and (drops or isinstance(module, _STATISTICS)):
                yield type(module).__name__

    def _stuck(self, blocks: Sequence[Block]) -> list[dict[str, Any]]:
        stuck = []
        for name, before in self._running.items():
            module = self._model.get_submodule(name)
            now = _running(module)
            if module.training and now is not None and now.shape == before.shape:
                stuck.append((name, module.momentum, torch.equal(now, before.to(now.device))))
        return [
            {"name": name, "momentum": momentum, "block": _owner(name, None, blocks)}
            for name, momentum, is_still in stuck
            if is_still
        ]


def _running(module: nn.Module) -> Tensor | None:
    """Means and variances (2, C) of a BatchNorm that keeps them; of a dead input both tell."""
    if not isinstance(module, _STATISTICS):
        return None
    kept = module.running_mean, module.running_var
    if not all(isinstance(x, Tensor) and not x.is_meta and mesh_of(x) is None for x in kept):
        return None
    return torch.stack([x.detach() for x in kept if x is not None])


def _trainable(parameters: Collection[nn.Parameter]) -> float | None:
    total = sum(p.numel() for p in parameters)
    return sum(p.numel() for p in parameters if p.requires_grad) / total if total else None


def _inspected(seen: Inspection, blocks: Sequence[Block]) -> dict[str, Any]:
    """What a pass showed, its tensors read in one transfer each kind."""
    norms = seen.normalisations
    variances = _read([one.variance for one in norms])
    gains = iter(_read([one.gain for one in norms if one.gain is not None]))
    constant = _read([same.double() for _, same in seen.constant])
    return {
        "normalisations": [
            {
                "name": one.name, "block": _owner(one.name, one, blocks), "kind": one.kind,
                "count": one.count, "eps": one.eps, "variance": variance,
                "gain": None if one.gain is None else next(gains),
            }
            for one, variance in zip(norms, variances, strict=True)
        ],
        "attentions": _attentions(seen, blocks),
        "matrices": len(constant),
        "constant": [
            {"name": name, "block": _owner(name, None, blocks)}
            for (name, _), same in zip(seen.constant, constant, strict=True)
            if same
        ],
        "lacking": seen.lacking(),
    }  # fmt: skip


def _attentions(seen: Inspection, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Each attention of a pass: its name and block, the entropy and the spread of its logits."""
    entropies = _read([one.entropy for one in seen.attentions])
    spreads = _read([one.spread for one in seen.attentions])
    return [
        {
            "name": one.name, "block": _owner(one.name, one, blocks), "entropy": entropy,
            "spread": spread,
        }
        for one, entropy, spread in zip(seen.attentions, entropies, spreads, strict=True)
    ]  # fmt: skip


def _read(values: Sequence[Tensor]) -> list[float]:
    if not values:
        return []
    numbers: list[float] = torch.stack([v.double() for v in values]).tolist()
    return numbers


def _owner(name: str, place: Place | None, blocks: Sequence[Block]) -> int | None:
    """Index of the block that something with this name belongs to; None outside all of them.

    Of several blocks of one module it is the one that was being made, or whose sum is normalised.
    """
    inside = [b.index for b in blocks if f"{name}.".startswith(f"{b.owner}.") and b.owner]
    if not inside:
        inside = [b.index for b in blocks if f"{name}.".startswith(f"{b.branch_module}.")]
    if not inside:
        return None
    if place is None or len(inside) == 1:
        return inside[0]
    before = place.blocks - 1
    if before in inside and "norm" in blocks[before].after_add:
        return before
    return min(max(place.blocks, inside[0]), inside[-1])
