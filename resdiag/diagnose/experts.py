"""Rules about mixtures of experts: a router that sends everything to a few of them."""

import math

from resdiag.diagnose.finding import NotJudged, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, held_since, trailing

MOST_DEAD = Threshold(0.5, "Share of a block's experts that get no token.")
LEAST_TOKENS = Threshold(
    8.0, "Tokens per expert of a pass; with fewer, a balanced router misses experts, too."
)
LEAST_STREAK = Threshold(3, "Last records of experts that show it.")


def router_collapsed(seen: RunData) -> Outcome:
    """Half of the experts of a block or more get no token in the last 3 records.

    Although the passes have 8 tokens per expert or more: a balanced router would then leave out
    any expert once in 3,000 passes. Named is the block with the most such experts.
    """
    dead = seen.table("expert_dead").dropna(how="all")
    if dead.empty:
        yield _without_experts(seen)
        return
    if len(dead) < LEAST_STREAK:
        reason = f"experts were recorded in {len(dead)} steps, {LEAST_STREAK} needed"
        yield ROUTER_COLLAPSED.not_judged(reason, "more records of experts")
        return
    last = dead.ffill().iloc[-1].dropna()
    for block in last.sort_values(ascending=False, kind="stable").index:
        shares = dead[block].dropna()
        idle = shares >= MOST_DEAD
        step = int(shares.index[-1])
        enough = seen.value("expert_tokens", step, int(block)) >= LEAST_TOKENS
        if enough and trailing(idle) >= LEAST_STREAK:
            since, value = held_since(idle), float(shares.iloc[-1])
            busiest = seen.value("expert_busiest", step, int(block))
            most = seen.value("expert_load", step, int(block))
            text = f"{value:.0%} of the experts of {seen.name(int(block))} get no token since step "
            text += f"{since}"
            if math.isfinite(busiest) and math.isfinite(most):
                text += f"; expert {busiest:.0f} gets {most:.0%} of all at step {step}"
            item = ROUTER_COLLAPSED.evidence(
                "expert_dead", value, MOST_DEAD, text, step=since, block=int(block)
            )
            yield ROUTER_COLLAPSED.found(item)
            return


def _without_experts(seen: RunData) -> NotJudged:
    if not seen.inspected:
        return seen.without_inventory(ROUTER_COLLAPSED)
    return ROUTER_COLLAPSED.not_applicable("no router was seen")


ROUTER_COLLAPSED = Rule(
    name="router_collapsed",
    judge=router_collapsed,
    needs=("expert_dead", "expert_tokens"),
    applies="networks with mixtures of experts, recorded in 3 steps",
    cause="the router has collapsed",
    why="Experts that are chosen are trained and chosen more often; those without tokens stay as "
    "they are",
    remedy="balance the load: an auxiliary loss, or a bias per expert that only the choice sees; "
    "look at the size of the router's logits (z-loss)",
    thresholds=(MOST_DEAD, LEAST_TOKENS, LEAST_STREAK),
    source="Shazeer et al. 2017, arXiv:1701.06538, section 4; Fedus et al. 2021, arXiv:2101.03961",
)
