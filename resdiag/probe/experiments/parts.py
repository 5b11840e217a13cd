"""Named parts of a model: its blocks or top-level modules, and in which order they run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from resdiag.probe.experiments.copies import kept_buffers, trainable
from resdiag.probe.experiments.task import Task

MOST = 24
"""Parts at most: a container with more members stays one part."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_DOMINANT = 0.5  # share of all parameters from which on any module is divided


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A module, or a parameter that belongs to no module below the model.

    Attributes:
        name: In the model.
        parameters: Its trainable ones by their names in the model, those of an earlier part
            left out.
    """

    name: str
    parameters: Mapping[str, Tensor]


def find_parts(model: nn.Module) -> list[Part]:
    """Divide a model into parts, in the order of their definition.

    Containers are divided into their members, and so is a module that has more than half of the
    parameters, as long as there are at most `MOST` parts.
    """
    wanted = trainable(model)
    total = sum(p.numel() for p in wanted.values())
    names, done = [""], set[str]()
    while True:
        divisible = [n for n in names if n not in done and _is_divisible(model, n, total)]
        if not divisible:
            break
        chosen = divisible[0]
        done.add(chosen)
        inside = _members(model, chosen)
        if len(names) - 1 + len(inside) <= MOST or chosen == "":
            at = names.index(chosen)
            names[at : at + 1] = inside
    parts, taken = list[Part](), set[str]()
    for name in names:
        own = {k: p for k, p in wanted.items() if k == name or k.startswith(f"{name}.")}
        own = {k: p for k, p in own.items() if k not in taken}
        taken |= own.keys()
        if own:
            parts.append(Part(name=name, parameters=own))
    return parts


def order_of_run(model: nn.Module, task: Task, parts: Sequence[Part]) -> list[Part]:
    """The parts in the order in which a forward pass reaches them; parameters come first."""
    order, handles = list[str](), []
    for part in parts:
        module = dict(model.named_modules()).get(part.name)
        if module is not None:
            # pre-hooks of members too: a ModuleList is never called itself
            for member in module.modules():
                handles.append(
                    member.register_forward_pre_hook(lambda *_, name=part.name: order.append(name))
                )
    try:
        with kept_buffers(model):
            task.run(model)
    finally:
        for handle in handles:
            handle.remove()
    first = {name: i for i, name in reversed(list(enumerate(order)))}
    return sorted(parts, key=lambda part: first.get(part.name, -1))


def _is_divisible(model: nn.Module, name: str, total: int) -> bool:
    if name == "":
        return True
    module = dict(model.named_modules()).get(name)
    if module is None or not any(p.requires_grad for p in module.parameters()):
        return False
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    inner = any(True for child in module.children() if any(True for _ in child.parameters()))
    return inner and (isinstance(module, _CONTAINERS) or size > _DOMINANT * total)


def _members(model: nn.Module, name: str) -> list[str]:
    """Names of a module's children with parameters, and of its own parameters, as defined."""
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    own = [prefix + key for key, _ in module.named_parameters(recurse=False)]
    inside = [
        prefix + key
        for key, child in module.named_children()
        if any(p.requires_grad for p in child.parameters())
    ]
    return [*own, *inside]
