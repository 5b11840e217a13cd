"""Names of blocks on an axis, and which blocks of a transformer are attention, which are MLPs."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ATTENTION, MLP, OTHER = "attention", "MLP", "other blocks"
"""What the blocks of a network with attention are called in a legend."""

LONGEST = 16
"""Letters of a name on an axis; of a longer one the end is shown."""

_ATTENTION = ("attention", "softmax")
_LINEAR = {"linear", "addmm"}  # GPT-2 of Hugging Face calls the latter
_TELLING = ("att", "mlp", "ff", "feed", "expert", "moe")
_SHORT = {ATTENTION: "attn", MLP: "mlp"}


def block_parts(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each block of a network with attention does; empty if the blocks are of one sort.

    >>> block_parts([{"branch": ["layer_norm", "multi_head_attention_forward"]},
    ...              {"branch": ["layer_norm", "linear", "gelu", "linear"]}])
    ['attention', 'MLP']
    """
    attends = [any(word in op for op in _calls(b) for word in _ATTENTION) for b in blocks]
    if all(attends) or not any(attends):
        return []
    rest = [_calls(block) for block, is_one in zip(blocks, attends, strict=True) if not is_one]
    plain = all(not _LINEAR.isdisjoint(ops) and not any("conv" in op for op in ops) for ops in rest)
    other = MLP if plain else OTHER
    return [ATTENTION if is_one else other for is_one in attends]


def _calls(block: Mapping[str, Any]) -> Sequence[str]:
    return block.get("branch") or ()


def block_names(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The modules of the blocks in a few letters, and the beginning that all of them share.

    A module with several blocks is followed by its child that makes the branch, or by "attn" and
    "mlp" where that child says less, such as a dropout.

    >>> block_names([{"name": "h.0", "owner": "h.0", "branch_module": "h.0.attn"},
    ...              {"name": "h.0#1", "owner": "h.0", "branch_module": "h.0.mlp.out"},
    ...              {"name": "h.1", "owner": "h.1", "branch_module": "h.1.attn"}])
    ('h', ['0.attn', '0.mlp', '1'])
    """
    several = Counter(str(block.get("owner", "")) for block in blocks)
    parts = block_parts(blocks) or [""] * len(blocks)
    long = [
        _name(block, part) if several[str(block.get("owner", ""))] > 1 else str(block["name"])
        for block, part in zip(blocks, parts, strict=True)
    ]
    if len(set(long)) < len(long):
        long = [str(block.get("name", "")) for block in blocks]
    paths = [name.split(".") for name in long]
    levels = zip(*(path[:-1] for path in paths), strict=False) if len(paths) > 1 else ()
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    names = [".".join(path[shared:]) for path in paths]
    begin, names = _without_beginning(names)
    words = [*paths[0][:shared], *([begin] if begin else [])] if paths else []
    return ".".join(words), [_shortened(name) for name in names]


def _without_beginning(names: list[str]) -> tuple[str, list[str]]:
    """What long names such as "encoder_layer_0.mlp" share in front of "_", and the rest of each.

    >>> _without_beginning(["encoder_layer_0.attn", "encoder_layer_10.attn"])
    ('encoder_layer', ['0.attn', '10.attn'])
    """
    letters = itertools.takewhile(lambda here: len(set(here)) == 1, zip(*names, strict=False))
    begin, found, _ = "".join(letter for letter, *_ in letters).rpartition("_")
    if not found or "." in begin or max(map(len, names)) <= LONGEST:
        return "", names
    return begin, [name.removeprefix(f"{begin}_") for name in names]


def _name(block: Mapping[str, Any], part: str) -> str:
    """The name of one of several blocks of a module."""
    name, owner = str(block.get("name", "")), str(block.get("owner", ""))
    branch, begin = str(block.get("branch_module", "")), f"{owner}." if owner else ""
    child = branch.removeprefix(begin).split(".")[0] if branch.startswith(begin) else ""
    if part and not any(word in child.lower() for word in _TELLING):
        child = _SHORT.get(part, child)
    return begin + child if child else name


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
