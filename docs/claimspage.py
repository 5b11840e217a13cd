"""The page of the paper's claims: what our committed results say of each, computed from them."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from measuredtables import HEAD, table
from scipy.special import nctdtr, stdtrit

from resdiag.diagnose.degraded import points
from resdiag.report.results import CellResult
from resdiag.report.storage import read_results
from resdiag.report.words import count
from resdiag.theory.intervals import difference

ROOT = Path(__file__).resolve().parents[1]
CONFIRMED, REFUTED, BOUNDED, OPEN = "confirmed", "refuted", "bounded", "open"
RESCUED = 0.60
"""Test error below which a setting of rescue-cpu counts as rescued; its study file says so."""

SPREADS = {"lowest": 0.23, "final": 0.31}
"""Points: standard deviation of an error over five runs with 110 layers (pelu.resnet.torch's logs)."""

TABLE_1 = {
    20: (8.38, 8.32),
    32: (7.51, 7.30),
    44: (7.17, 6.93),
    56: (6.97, 6.31),
    110: (6.42, 5.62),
}
"""Test errors of `original` and d, percent, as printed; one run each."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What our results say of one claim.

    Attributes:
        status: Confirmed, refuted, bounded (true in part, or of a part) or open.
        words: With numbers.
        n: How many trainings that rests on.
        source: Study or story, as a link.
        command: What computes it again.
    """

    status: str
    words: str
    n: str
    source: str
    command: str


@dataclass(frozen=True)
class Claim:
    """One claim, table or figure of the paper."""

    place: str
    words: str
    judge: Callable[[], Said]


def claims_page() -> str:
    """The whole page."""
    rows = []
    for number, claim in enumerate(CLAIMS, 1):
        said = claim.judge()
        rows.append(
            (str(number), claim.place, claim.words, f"**{said.status}**", said.words, said.n,
             said.source, f"`{said.command}`")
        )  # fmt: skip
    tally = [
        f"{sum(row[3] == f'**{s}**' for row in rows)} {s}"
        for s in (CONFIRMED, REFUTED, BOUNDED, OPEN)
    ]
    head = HEAD.format(source="studies/results and studies/stories, by docs/claimspage.py")
    columns = ("", "place", "claim", "", "what we measured", "n", "from", "command")
    return "\n\n".join(
        [head, "# The paper's claims", _ABOUT.format(tally=", ".join(tally)), table(columns, rows),
         "## Why the final errors are open", _power()]
    ) + "\n"  # fmt: skip


_ABOUT = """Every claim, table and figure of Shah et al. 2016 (arXiv:1604.04112), with what the results in this repository say of
it: {tally}. *Bounded* means shown for a part only, such as the first steps. Nothing here was trained to the
end, 164 epochs. Intervals are 95 % t intervals of differences in the same seed, in points of test error."""


# -- data ------------------------------------------------------------------------------------------


@cache
def cells(study: str) -> Sequence[CellResult]:
    """The cells of a committed study that ended."""
    return [item for item in read_results(ROOT / "studies/results" / study).cells if item.ended]


def select(study: str, **settings: Any) -> list[CellResult]:  # noqa: ANN401
    """Those whose request has these values."""
    return [
        item
        for item in cells(study)
        if all(getattr(item.cell.request, name) == value for name, value in settings.items())
    ]


@cache
def story(name: str) -> list[dict[str, Any]]:
    """The rows of a story's measurements."""
    rows: list[dict[str, Any]] = json.loads((ROOT / f"studies/stories/{name}.json").read_text())[
        "rows"
    ]
    return rows


def gap(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Final test error of `one` minus that of `other`, in degradation-cpu."""
    sides = [select("degradation-cpu", **which) for which in (one, other)]
    errors = [[item.number("test_error") for item in side] for side in sides]
    seeds = [[item.cell.request.seed for item in side] for side in sides]
    return points(difference(*errors, (seeds[0], seeds[1])))


def between(values: Iterable[float], digits: str = ".2g") -> str:
    """Lowest to highest."""
    found = sorted(values)
    low, high = f"{found[0]:{digits}}", f"{found[-1]:{digits}}"
    return low if low == high else f"{low} to {high}"


_DEGRADATION = {
    "source": "[degradation-cpu](degradation-cpu.md)",
    "command": "resdiag study run degradation-cpu",
}
_EXPLOSION = {"source": "[explosion](explosion.md)", "command": "resdiag study run explosion"}
_RESCUE = {"source": "[rescue-cpu](rescue-cpu.md)", "command": "resdiag study run rescue-cpu"}
_STORIES = "python studies/stories/measure.py --data folder:cifar10-jpeg.tar.gz"
_PAPER = {"source": "-", "command": "resdiag study run paper"}


def _story(letter: str) -> dict[str, str]:
    return {
        "source": f"[story {letter}](../explanation/stories/story-{letter}.md)",
        "command": _STORIES,
    }


# -- judgements ------------------------------------------------------------------------------------


def _learns_faster() -> Said:
    d, original, control = ({"variant": v} for v in ("elu", "original", "no_relu"))
    words = "; ".join(
        f"after 500 steps at depth {depth}, d minus `original` {gap({**d, 'depth': depth}, {**original, 'depth': depth})}, "
        f"d minus `no_relu` {gap({**d, 'depth': depth}, {**control, 'depth': depth})}"
        for depth in (20, 56)
    )
    tail = ". d is ahead early; `no_relu`, with ReLU and BatchNorm and nothing after the addition, is as far: the gain is not shown to be ELU's"
    return Said(status=BOUNDED, words=words + tail, n="3 seeds", **_DEGRADATION)


def _open(words: str) -> Callable[[], Said]:
    return lambda: Said(status=OPEN, words=words, n="0", **_PAPER)


def _mean_towards_zero() -> Said:
    rows = [r for r in story("steps") if (r["variant"], r["depth"], r["step"]) == ("elu", 56, 30)]
    other = [
        r for r in story("steps") if (r["variant"], r["depth"], r["step"]) == ("original", 56, 30)
    ]
    words = (
        f"on the residual stream of d at depth 56, the mean is {between(r['output_mean'] for r in rows)} after 30 steps and "
        f"B2, the mean over the spread, {between(r['output_bias'] for r in rows)}, against {between(r['output_bias'] for r in other)} in `original`"
    )
    return Said(status=REFUTED, words=words, n=f"{len(rows)} seeds", **_story("d"))


def _blows_up(variant: str, letter: str) -> Callable[[], Said]:
    def judge() -> Said:
        found = {d: select("explosion", variant=variant, depth=d, lr=0.1) for d in (20, 56, 110)}
        dead = sum(item.state == "diverged" for items in found.values() for item in items)
        total = sum(map(len, found.values()))
        when = "; ".join(
            f"depth {depth}: first non-finite step {between((i.number('first_nonfinite_step') for i in items), 'g')}"
            for depth, items in found.items()
        )
        status = CONFIRMED if dead == total else BOUNDED
        words = f"{dead} of {total} runs at rate 0.1 diverged ({when}). From depth 56 on, the signal explodes before the first update"
        return Said(status=status, words=words, n="3 seeds a depth", **_EXPLOSION)

    return judge


def _rescued(variant: str, *, claimed: bool) -> Callable[[], Said]:
    """Whether a rate lets the network with 20 layers learn, and whether the paper says so."""

    def judge() -> Said:
        lots: dict[float, list[CellResult]] = {}
        for item in select("rescue-cpu", variant=variant):
            lots.setdefault(item.cell.request.lr or math.nan, []).append(item)
        words, good = [], []
        for lr, items in sorted(lots.items(), reverse=True):
            errors = [item.number("test_error") for item in items]
            good.append(all(e < RESCUED for e in errors))
            words.append(
                f"rate {lr:g}: test error {between((100 * e for e in errors), '.3g')} % after 3 epochs"
            )
        least = min(map(len, lots.values()))
        status = OPEN
        if least >= 3:
            status = (
                (CONFIRMED if claimed else REFUTED)
                if any(good)
                else (REFUTED if claimed else CONFIRMED)
            )
        tail = "" if least >= 3 else "; its rule asks for 3 seeds"
        return Said(
            status=status,
            words="; ".join(words) + tail,
            n=count(least, "seed") + " a rate",
            **_RESCUE,
        )

    return judge


def _deep_a_stays_lost() -> Said:
    alive = {
        depth: sorted(
            {i.cell.request.lr for i in select("explosion", variant="elu_nobn", depth=depth)}
            - {
                i.cell.request.lr
                for i in select("explosion", variant="elu_nobn", depth=depth)
                if i.state == "diverged"
            }
        )
        for depth in (56, 110)
    }
    words = "; ".join(
        f"at depth {d} all seeds stay finite for 50 steps up to rate {max(rates):g}"
        for d, rates in alive.items()
    )
    return Said(
        status=BOUNDED,
        words=words + ". Whether they converge there was not tried",
        n="3 seeds a rate",
        **_EXPLOSION,
    )


def _exponential_is_the_cause() -> Said:
    arms = [
        r for r in story("lesions") if (r["variant"], r["name"]) == ("elu_pre", "swap_activation")
    ]
    growth = [between((a["growth_per_block"] for a in r["changed"]), ".3g") for r in arms]
    b = [
        r["growth_per_block"]
        for r in story("initialisation")
        if (r["variant"], r["depth"]) == ("elu_pre", 20)
    ]
    words = (
        f"ELU' is at most 1, so no ELU makes a gradient larger; with ReLU in its place E[H^2] still grows {growth[0]} times per "
        f"block at depth 20 ({between(b, '.3g')} with ELU), as He's initialisation doubles what the activation halves. The "
        f"doubling and the missing normalisation are told apart in [branch-dose](branch-dose.md)"
    )
    return Said(status=REFUTED, words=words, n="3 seeds", **_story("b"))


def _norm_controls_it() -> Said:
    arms = [
        r for r in story("lesions") if (r["variant"], r["name"]) == ("elu_pre", "bn_before_add")
    ]
    before, after = (
        [a["growth_per_block"] for r in arms for a in r[k]] for k in ("control", "changed")
    )
    alive = [sum(a["survived"] for r in arms for a in r[k]) for k in ("control", "changed")]
    words = (
        f"growth per block {between(before, '.3g')} becomes {between(after, '.3g')}; {alive[0]} of {len(before)} runs "
        f"survive without it, {alive[1]} of {len(after)} with it"
    )
    return Said(
        status=CONFIRMED if alive == [0, len(after)] else BOUNDED,
        words=words,
        n=f"{len(after)} pairs",
        **_story("b"),
    )


def _c_mean() -> Said:
    means = {v: [r["output_mean"] for r in story("initialisation") if (r["variant"], r["depth"]) == (v, 56)]
             for v in ("elu_after", "original", "elu")}  # fmt: skip
    words = "; ".join(f"`{v}` {between(values, '.3g')}" for v, values in means.items())
    tail = ". Nearer to zero than with ReLU there, further than with nothing there"
    return Said(
        status=BOUNDED,
        words=f"mean of the last block at initialisation, depth 56: {words}{tail}",
        n="3 seeds",
        **_story("c"),
    )


def _c_perturbs() -> Said:
    drift = {d: [r["identity_drift_stage_1"] for r in story("initialisation") if (r["variant"], r["depth"]) == ("elu_after", d)]
             for d in (20, 56, 110)}  # fmt: skip
    words = "; ".join(f"depth {d}: P4 {between(values, '.3g')}" for d, values in drift.items())
    return Said(
        status=CONFIRMED,
        words=f"{words} over stage 1; 0 in `original` and d by their definition",
        n="2 to 3 seeds",
        **_story("c"),
    )


def _degrades(variant: str, status: str, more: str) -> Callable[[], Said]:
    def judge() -> Said:
        change = gap({"variant": variant, "depth": 56}, {"variant": variant, "depth": 20})
        other = gap({"variant": "original", "depth": 56}, {"variant": "original", "depth": 20})
        words = f"after 500 steps, depth 56 minus depth 20: {change} (`original`: {other}). {more}"
        return Said(status=status, words=words, n="3 seeds", **_DEGRADATION)

    return judge


def _figure_2() -> Said:
    words = "drawn from PyTorch's functions; the tests hold the fast ELU to them"
    return Said(
        status=CONFIRMED, words=words, n="-", source="-", command="resdiag study run paper --mini"
    )


def _table_1() -> Said:
    return Said(
        status=OPEN,
        words="not trained to the end; how many seeds each row needs stands below",
        n="0",
        **_PAPER,
    )


# -- how many seeds --------------------------------------------------------------------------------


def seeds_needed(gap_: float, spread: float, power: float = 0.8, level: float = 0.05) -> int:
    """Runs per network with which a two-sided t test finds a gap, by the noncentral t distribution.

    Args:
        gap_: True difference of the means.
        spread: Standard deviation of single runs.
        power: Probability to find it.
        level: Of the test.
    """
    n = 2
    while True:
        freedom, shift = 2 * n - 2, gap_ / spread * math.sqrt(n / 2)
        if 1 - nctdtr(freedom, shift, stdtrit(freedom, 1 - level / 2)) >= power:
            return n
        n += 1


def _power() -> str:
    rows = [
        (
            str(depth), f"{original:.2f}", f"{d:.2f}", f"{original - d:.2f}",
            *(str(seeds_needed(original - d, spread)) for spread in SPREADS.values()),
        )
        for depth, (original, d) in TABLE_1.items()
    ]  # fmt: skip
    words = (
        "Table 1 has one run per network, at its epoch of lowest error. Over five runs of a network with 110 layers, BatchNorm, ReLU and "
        "nothing after the addition, that error has a standard deviation of 0.23 points, and the final error one of 0.31 (computed from "
        "the logs of pelu.resnet.torch). If the published differences were the true ones, the last two columns say how many runs of each "
        "network a two-sided t test at 5 % needs to find them with probability 0.8."
    )
    header = (
        "depth",
        "`original`, %",
        "d, %",
        "difference, points",
        *(f"runs of each, {name} error" for name in SPREADS),
    )
    return f"{words}\n\n{table(header, rows)}"


CLAIMS = (
    Claim("abstract; 4.2, Figure 5", "ELU speeds up learning in residual networks", _learns_faster),
    Claim("abstract", "it improves the accuracy as the depth increases", _open("final errors need full trainings")),
    Claim("abstract", "it improves the test error on CIFAR-10 and CIFAR-100", _open("final errors need full trainings")),
    Claim("1; 2; 5", "ELUs push mean activations towards zero, which reduces bias shift", _mean_towards_zero),
    Claim("2, Figure 2", "ReLU and ELU", _figure_2),
    Claim("3.2.1", "a: after few iterations, the gradients blew up", _blows_up("elu_nobn", "a")),
    Claim("3.2.1", "a: with a lower learning rate the 20-layer model starts converging", _rescued("elu_nobn", claimed=True)),
    Claim("3.2.1", "a: 56 and 110 layers still do not converge after decreasing it", _deep_a_stays_lost),
    Claim("3.2.2", "b: the gradients exploded after few iterations", _blows_up("elu_pre", "b")),
    Claim("3.2.2", "b: due to the exponential function, the gradients get larger", _exponential_is_the_cause),
    Claim("3.2.2", "b: decreasing the learning rate does not reduce this problem", _rescued("elu_pre", claimed=False)),
    Claim("3.2.2; 3.2.4", "BatchNorm before the addition controls it", _norm_controls_it),
    Claim("3.2.3", "c: ELU after the addition pushes the mean activation towards zero", _c_mean),
    Claim("3.2.3", "c: it forces each skip connection to perturb the output", _c_perturbs),
    Claim("3.2.3, Figure 4", "c: this leads to degradation of accuracy in very deep networks",
          _degrades("elu_after", BOUNDED, "c gets worse early, and `original` more; how it ends is open")),
    Claim("3.2.4", "d: no ELU after the addition does not degrade the accuracy",
          _degrades("elu", BOUNDED, "No change is shown early; the interval does not exclude one of its size")),
    Claim("4.1.1, Table 1", "d has the lower error on CIFAR-10 at every depth", _table_1),
    Claim("4.1.2, Table 2, Figure 7", "d has the lower error on CIFAR-100 with 110 layers: 26.55 against 27.23 %", _open("not trained")),
    Claim("4.2, Figure 6", "d classifies better, and the more so the deeper", _open("final errors need full trainings")),
)  # fmt: skip
