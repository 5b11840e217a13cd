"""Rules about mixtures of experts: a router that sends everything to a few of them."""

import math

from resdiag.diagnose.finding import Finding, NotJudged, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, held_since, last_known, trailing

LEAST_EVEN = Threshold(
    0.25, "Evenness of the load: 0 if every token goes to the same k experts, 1 if it is balanced."
)
LEAST_TOKENS = Threshold(
    8.0, "Tokens per expert of a pass; with fewer, a balanced router misses experts, too."
)
LEAST_STREAK = Threshold(3, "Last records of experts that show it.")


def router_collapsed(seen: RunData) -> Outcome:
    """The router of a block sends almost all tokens to the same experts in the last 3 records.

    The evenness of the load is below 0.25: the entropy of the experts' shares, from that of top-k
    routing to the same k experts (0) to that of a balanced load (1). Only of passes with 8 tokens
    per expert or more. Named is the block with the least even load.
    """
    table = seen.table("expert_entropy").dropna(how="all")
    if table.empty:
        yield _without_experts(seen)
        return
    if len(table) < LEAST_STREAK:
        reason = f"experts were recorded in {len(table)} steps, {LEAST_STREAK} needed"
        yield ROUTER_COLLAPSED.not_judged(reason, "more records of experts")
        return
    last = last_known(table)
    for block in last.sort_values(kind="stable").index:
        evenness = table[block].dropna()
        uneven, step = evenness < LEAST_EVEN, int(evenness.index[-1])
        enough = seen.value("expert_tokens", step, int(block)) >= LEAST_TOKENS
        if enough and trailing(uneven) >= LEAST_STREAK:
            yield _collapsed(seen, int(block), float(last[block]), held_since(uneven), step)
            return


def _collapsed(seen: RunData, block: int, value: float, since: int, step: int) -> Finding:
    busiest, most, dead = (
        seen.value(name, step, block) for name in ("expert_busiest", "expert_load", "expert_dead")
    )
    text = f"the router of {seen.name(block)} is uneven since step {since}: evenness {value:.2g}"
    if math.isfinite(busiest) and math.isfinite(most):
        text += f", expert {busiest:.0f} gets {most:.0%} of all tokens at step {step}"
    text += f", {dead:.0%} of the experts get none" if dead > 0 else ""
    item = ROUTER_COLLAPSED.evidence(
        "expert_entropy", value, LEAST_EVEN, text, step=since, block=block
    )
    return ROUTER_COLLAPSED.found(item)


def _without_experts(seen: RunData) -> NotJudged:
    if not seen.inspected:
        return seen.without_inventory(ROUTER_COLLAPSED)
    return ROUTER_COLLAPSED.not_applicable("no router was seen")


ROUTER_COLLAPSED = Rule(
    name="router_collapsed",
    judge=router_collapsed,
    needs=("expert_entropy", "expert_tokens"),
    applies="networks with mixtures of experts, recorded in 3 steps",
    cause="the router has collapsed",
    why="Experts that are chosen are trained and chosen more often; those without tokens stay as "
    "they are",
    remedy="balance the load: an auxiliary loss, or a bias per expert that only the choice sees; "
    "look at the size of the router's logits (z-loss)",
    thresholds=(LEAST_EVEN, LEAST_TOKENS, LEAST_STREAK),
    source="Shazeer et al. 2017, arXiv:1701.06538, section 4; Fedus et al. 2021, arXiv:2101.03961",
)
