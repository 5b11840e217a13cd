"""A model's blocks as a tree for the terminal; what repeats is folded."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple

from rich.text import Text
from rich.tree import Tree

from resdiag.models.inspection import Inspection, count_parameters, words_of
from resdiag.watch.find.blocks import Block, describe_units

_LONGEST = 8
"""Blocks in a group that repeats."""


class Row(NamedTuple):
    """A block and the number of its parameters."""

    block: Block
    parameters: int


class Group(NamedTuple):
    """Rows that come `times` times in succession: the first of them and the last."""

    times: int
    first: list[Row]
    last: list[Row]


def draw_tree(found: Inspection, *, fold: bool = True) -> Tree:
    """The tree of `resdiag inspect`: stages, then blocks.

    Args:
        found: What was inspected.
        fold: Whether groups of blocks that repeat are shown once.
    """
    tree = Tree(Text(_title(found)), guide_style="dim")
    rows = list(map(Row, found.blocks or found.units, found.parameters))
    for stage, members in groupby(rows, key=lambda row: row.block.stage):
        stage_rows = list(members)
        count = len(stage_rows)
        kind = "block" if found.blocks else "unit"
        words = f"stage {stage}: {count} {kind}{'s' * (count > 1)}, {_size(stage_rows[0].block)}"
        branch = tree.add(Text(words, style="bold"))
        _add_groups(branch, fold_rows(stage_rows) if fold else [Group(1, stage_rows, stage_rows)])
    for note in found.built.notes:
        tree.add(Text(note))
    return tree


def fold_rows(rows: Sequence[Row]) -> list[Group]:
    """Fold neighbours that repeat: the same but for the numbers in their names.

    The blocks of one owner stay together. Of several ways the one that hides most is taken, from
    the front.
    """
    units = [list(unit) for _, unit in groupby(rows, key=lambda row: row.block.owner)]
    signs = [list(map(_sign, unit)) for unit in units]
    groups, start = list[Group](), 0
    while start < len(units):
        period, times = max(_repeats(signs, start), key=lambda pair: pair[0] * (pair[1] - 1))
        end = start + period * times
        first, last = units[start : start + period], units[end - period : end]
        groups.append(Group(times, list(chain(*first)), list(chain(*last))))
        start = end
    return groups


def _repeats(signs: Sequence[object], start: int) -> Iterator[tuple[int, int]]:
    """Period and number of repetitions from `start`; (1, 1) among them."""
    for period in range(1, _LONGEST + 1):
        group, times = signs[start : start + period], 1
        while signs[start + period * times : start + period * (times + 1)] == group:
            times += 1
        if times > 1 or period == 1:
            yield period, times


def _sign(row: Row) -> tuple[object, ...]:
    """What has to be equal in blocks that are shown once."""
    block = row.block
    plain = {**block.to_dict(), "index": 0, "shape": tuple(block.shape)}
    named = ("name", "owner", "branch_module", "shortcut_module")
    numberless = {key: re.sub(r"\d+", "*", str(plain[key])) for key in named}
    return (*sorted((key, str(value)) for key, value in {**plain, **numberless}.items()),
            row.parameters)  # fmt: skip


def _title(found: Inspection) -> str:
    model = found.built.model
    total = f"{words_of(count_parameters(model))} parameters"
    head = f"{found.built.name}: {type(model).__name__}, {total}; {found.example.describe()}"
    count = len(found.blocks)
    if found.units:
        return f"{head}\n{describe_units(found.units)}; --blocks 'layers.*' names others"
    if not count:
        return f"{head}\nno residual addition: name its units, e.g. --blocks 'layers.*'"
    if all(block.shortcut == "none" for block in found.blocks):
        return f"{head}\nno residual addition; {count} units without a shortcut"
    stages = found.blocks[-1].stage + 1
    return f"{head}\n{count} block{'s' * (count > 1)} in {stages} stage{'s' * (stages > 1)}"


def _size(block: Block) -> str:
    return "x".join(map(str, block.shape)) or "scalars"


def _add_groups(branch: Tree, groups: Sequence[Group]) -> None:
    """The lines of a stage in columns; several blocks that repeat get a node of their own."""
    nested = [group.times > 1 and len(group.first) > 1 for group in groups]
    lines = [[_cells(*pair) for pair in zip(g.first, g.last, strict=True)] for g in groups]
    widths = [max(map(len, column)) for column in zip(*chain(*lines), strict=True)]
    for group, inner, cells in zip(groups, nested, lines, strict=True):
        node = branch.add(Text(f"{group.times} times")) if inner else branch
        if group.times > 1 and not inner:
            cells[0].append(f"{group.times} times")
        # an inner line begins four columns further in
        first = widths[0] + (4 if any(nested) and not inner else 0)
        for line in cells:
            padded = map(str.ljust, line, [first, *widths[1:], 0])
            node.add(Text("  ".join(filter(None, padded)).rstrip()))


def _cells(first: Row, last: Row) -> list[str]:
    """The columns of a line."""
    block, name = first.block, first.block.name
    if last.block is not block:
        name += f" .. {last.block.name}"
    return [
        name,
        {"none": "no shortcut"}.get(block.shortcut, block.shortcut),
        f"{'then' if block.shortcut == 'none' else 'after-add'} {block.after_add}",
        {"none": ""}.get(block.order, f"{block.order}-activation"),
        f"{words_of(first.parameters)} parameters",
        "transition" if block.transition else "",
    ]
