"""Rules about parts of a network that do not do their work: skips, normalisations, attention."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from resdiag.diagnose.finding import DEFINITION, Evidence, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, trailing

LEAST_EPSILON = Threshold(0.01, "Epsilon that no library has by default, above the variance.")
LEAST_COUNT = Threshold(4, "Numbers per channel up to which BatchNorm has too few.")
OTHERS = (
    Threshold(3, "Normalisations of one role before one of them is an exception,"),
    Threshold(0.34, "and the share of exceptions up to which they are ones."),
)
LEAST_UPDATES = Threshold(3, "Updates before statistics that stayed are called stuck.")
CONSTANT_SHARE = Threshold(0.5, "Share of such layers from which on no single block is named.")


def missing_skip(seen: RunData) -> Outcome:
    """A module adds nothing to its input although its likes before and after it do."""
    if not seen.inspected:
        yield seen.without_inventory(MISSING_SKIP)
        return
    lacking, step = seen.inventory["lacking"], 0
    if not lacking:
        lacking = seen.inventory.get("later_lacking") or []
        step = int(seen.inventory.get("later_step", 0))
    if lacking:
        first = min(lacking, key=lambda entry: int(entry["block"]))
        more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        text = f"{first['name']} has no skip, {first['like']} modules of its kind have one{more}"
        item = MISSING_SKIP.evidence(
            "inventory", len(lacking), 0, text, step=step, block=int(first["block"])
        )
        yield MISSING_SKIP.found(item)


def dropout_on_skip(seen: RunData) -> Outcome:
    """Dropout lies on the shortcut of a block."""
    rows = [row for row in seen.rows if "shortcut_path" in row]
    if not rows:
        yield DROPOUT_ON_SKIP.not_judged("the operations on the shortcuts are not known")
        return
    drops = [r["index"] for r in rows if any("drop" in str(n) for n in r["shortcut_path"])]
    if drops:
        many = f", and of {len(drops) - 1} more" if len(drops) > 1 else ""
        text = f"dropout is on the shortcut of {seen.name(drops[0])}{many}"
        item = DROPOUT_ON_SKIP.evidence(
            "shortcut_path", len(drops), 0, text, step=0, block=drops[0]
        )
        yield DROPOUT_ON_SKIP.found(item)


def detached_output(seen: RunData) -> Outcome:
    """Blocks that run, and whose parameters require gradients, get none while other blocks do.

    No gradient comes to their outputs either: that is what tells them from blocks whose branch is
    detached or dead. Of blocks in a row the last one is named: behind it the gradient stops.
    """
    trainable = seen.inventory.get("trainable", [])
    gradient = seen.table("grad_param").reindex(columns=seen.indices)
    if not trainable or gradient.empty:
        yield seen.without_inventory(DETACHED_OUTPUT)
        return
    wants = [b for b in seen.indices if b < len(trainable) and trainable[b]]
    flows = gradient.fillna(0.0)[wants] > 0
    arrives, ran = (
        seen.table(name).reindex(index=flows.index, columns=wants).notna()
        for name in ("grad_output", "output_second_moment")
    )
    lasts = {b: trailing(~flows[b] & ~arrives[b] & ran[b]) for b in wants}
    cut = [b for b in wants if lasts[b]]
    others = flows.iloc[-1].any() or (len(cut) == len(wants) and _others_learn(seen))
    if not cut or not others:
        return
    after = iter(wants[wants.index(cut[0]) :])
    block = [b for b, kept in zip(after, cut, strict=False) if b == kept][-1]
    since = int(flows.index[len(flows) - lasts[block]])
    before = "" if block == wants[0] else " and the blocks before it" * (cut[0] == wants[0])
    text = f"no gradient comes back to {seen.name(block)}{before} from step {since} on, although "
    text += "the parameters require gradients"
    item = DETACHED_OUTPUT.evidence("grad_output", 0.0, 0.0, text, step=since, block=block)
    yield DETACHED_OUTPUT.found(item)


def _others_learn(seen: RunData) -> bool:
    """Whether parameters outside the blocks, such as those of the head, get a gradient."""
    norms = seen.series("grad_norm").dropna()
    return bool(len(norms)) and float(norms.iloc[-1]) > 0


def symmetric_units(seen: RunData) -> Outcome:
    """All units of a layer begin with equal weights that are not zero."""
    if not seen.inspected:
        yield seen.without_inventory(SYMMETRIC_UNITS)
        return
    constant, total = seen.inventory["constant"], int(seen.inventory.get("matrices", 0))
    blocks = sorted({int(e["block"]) for e in constant if e.get("block") is not None})
    everywhere = total > 1 and len(constant) >= CONSTANT_SHARE * total
    if not constant:
        return
    names = ", ".join(str(entry["name"]) for entry in constant[:3])
    text = f"in {len(constant)} of {total} weight matrices all units are equal: {names}"
    block = None if everywhere or not blocks else blocks[0]
    item = SYMMETRIC_UNITS.evidence("inventory", len(constant), 0, text, step=0, block=block)
    yield SYMMETRIC_UNITS.found(item)


def norm_fault(seen: RunData) -> Outcome:
    """A normalisation does not normalise: its epsilon, its factor, its statistics or its batch.

    - *epsilon above the variance*: it is 0.01 or more, and larger than what it is added to;
    - *gain of zero*: the learned factor begins at 0, that of most others in the same role does not;
    - *statistics do not move*: 3 updates leave the running mean of a BatchNorm that is in training
      mode as it was;
    - *batch too small*: a BatchNorm has 4 numbers per channel or fewer.
    """
    if not seen.inspected:
        yield seen.without_inventory(NORM_FAULT)
        return
    for cause, why, item in (
        *_epsilons(seen.inventory["normalisations"]),
        *_gains(seen.inventory["normalisations"]),
        *_stuck(seen),
        *_batches(seen.inventory["normalisations"]),
    ):
        yield NORM_FAULT.found(item, summary=f"{cause}: {item.text}", cause=cause, why=why)
        return


_Fault = Iterator[tuple[str, str, Evidence]]


def _epsilons(norms: list[Mapping[str, Any]]) -> _Fault:
    for norm in norms:
        eps, variance = _number(norm, "eps"), _number(norm, "variance")
        if eps >= LEAST_EPSILON and eps > variance:
            text = f"{norm['name']} adds {eps:.3g} to a variance of {variance:.3g}"
            item = _evidence(norm, eps, variance, text)
            yield "epsilon above the variance", "It divides by a constant instead", item


def _gains(norms: list[Mapping[str, Any]]) -> _Fault:
    roles: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for norm in norms:
        if norm.get("gain") is not None:
            roles[str(norm["kind"]), _role(str(norm["name"]))].append(norm)
    for members in roles.values():
        zero = [norm for norm in members if _number(norm, "gain") == 0]
        if zero and len(members) >= OTHERS[0] and len(zero) <= OTHERS[1] * len(members):
            text = f"the factor of {zero[0]['name']} begins at 0, that of {len(members)} others "
            text += "in its role does not"
            yield "gain of zero", "Nothing passes it", _evidence(zero[0], 0.0, 0.0, text)


def _stuck(seen: RunData) -> _Fault:
    stuck, updates = seen.inventory.get("stuck", []), seen.event("update")
    if stuck and updates is not None and updates["count"] >= LEAST_UPDATES:
        more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
        text = f"the running mean of {stuck[0]['name']}{more} is what it was before "
        text += f"{updates['count']} updates (momentum {stuck[0].get('momentum')})"
        item = _evidence(stuck[0], 0.0, 0.0, text)
        yield "statistics do not move", "Evaluation normalises with other numbers", item


def _batches(norms: list[Mapping[str, Any]]) -> _Fault:
    small = [n for n in norms if n["kind"] == "batch_norm" and _number(n, "count") <= LEAST_COUNT]
    if small:
        more = f" and {len(small) - 1} more" if len(small) > 1 else ""
        count = _number(small[0], "count")
        text = f"{small[0]['name']}{more} has {count:g} numbers per channel"
        item = _evidence(small[0], count, LEAST_COUNT, text)
        yield "batch too small", "Its statistics are noise, and change from batch to batch", item


def _evidence(norm: Mapping[str, Any], value: float, limit: float, text: str) -> Evidence:
    return NORM_FAULT.evidence("inventory", value, limit, text, step=0, block=norm.get("block"))


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


_NUMBERED = re.compile(r"(\w*(layer|block|stage)s?_?)?\d+")


def _role(name: str) -> str:
    """What a module is called in its block: the name behind the number of a layer.

    >>> _role("layer1.0.bn2"), _role("stages.0.2.branch.4"), _role("layers.encoder_layer_3.ln_1")
    ('bn2', 'branch.4', 'ln_1')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if _NUMBERED.fullmatch(part)]
    return ".".join(parts[numbers[-1] + 1 if numbers else 0 :])


MISSING_SKIP = Rule(
    name="missing_skip",
    judge=missing_skip,
    needs=("inventory",),
    applies="blocks in a list of modules of one class, 3 of which have a skip",
    cause="a block without its skip",
    why="Signal and gradient have to pass its branch; a difference f(x) - x is no skip either",
    remedy="add the block's input to what its branch makes of it",
    source="He et al. 2016, arXiv:1603.05027, section 3",
)
DROPOUT_ON_SKIP = Rule(
    name="dropout_on_skip",
    judge=dropout_on_skip,
    needs=("blocks",),
    applies="networks with shortcuts",
    cause="dropout on the skip path",
    why="It scales the shortcut at random: the signal is lost over many blocks",
    remedy="put the dropout on the branch",
    source="He et al. 2016, arXiv:1603.05027, section 3.1 (dropout shortcut)",
)
DETACHED_OUTPUT = Rule(
    name="detached_output",
    judge=detached_output,
    needs=("grad_param", "grad_output", "output_channel_std"),
    applies="blocks whose parameters require gradients",
    cause="the gradient stops in the network",
    why="A detach or no_grad behind this block cuts off everything before it",
    remedy="remove the detach or no_grad behind the block",
)
SYMMETRIC_UNITS = Rule(
    name="symmetric_units",
    judge=symmetric_units,
    needs=("inventory",),
    cause="units are equal",
    why="Equal units get equal gradients and stay equal: the layer has one unit",
    remedy="initialise the weights at random",
    thresholds=(CONSTANT_SHARE,),
    source="Goodfellow et al. 2016, Deep Learning, section 8.4",
)
NORM_FAULT = Rule(
    name="norm_fault",
    judge=norm_fault,
    needs=("inventory",),
    applies="networks with normalisations",
    cause="a normalisation does not normalise",
    why="What follows it expects numbers of size 1",
    remedy="use the library's default epsilon, factor and momentum; for small batches GroupNorm",
    thresholds=(LEAST_EPSILON, LEAST_COUNT, *OTHERS, LEAST_UPDATES),
    source="Ioffe & Szegedy 2015, arXiv:1502.03167; " + DEFINITION,
)
