"""The pages about verdicts: every finding with its thresholds, and how often they are right."""

import inspect
import json
import sys
from collections.abc import Sequence

from measuredtables import HEAD, RESULTS, ROOT, table

from resdiag.diagnose import degraded
from resdiag.diagnose.finding import Rule, Threshold
from resdiag.diagnose.registry import CAUSES_FROM_THE_START, FINDINGS

sys.path.insert(0, str(ROOT / "benchmarks"))  # folders of scripts are no package
from planted.calibration import (
    SETS,
    Result,
    count_blocks_named,
    count_false_alarms,
    score,
)
from planted.faults import FAULTS

_HEALTHY = (
    "No rule names the verdict, a third of the checks could run in full, and the run shows that it "
    "learns: of 20 losses or more the last lie below that of guessing, or they fall where the "
    "number of classes is not known."
)
_UNDETERMINED = "No rule names the verdict, and something of that is missing."


def findings_page() -> str:
    """Every finding: a table, then its row with the definition and the thresholds."""
    rows = [(f"[`{r.name}`](#{r.name})", r.fires_when, r.remedy) for r in FINDINGS.values()]
    rows.append(("`healthy`", _HEALTHY, "see what could not be judged"))
    rows.append(("`undetermined`", _UNDETERMINED, "see what is missing"))
    parts = [
        HEAD.format(source="resdiag/diagnose/registry.py") + "\n# Findings\n",
        "`resdiag explain`, `resdiag.judge` and the end of every run apply these rules, most "
        "upstream cause first. Every rule that fires is a finding, with its evidence; the first "
        "names the verdict. A condition is what a network is prone to: where the run learned all "
        "the same it is reported and does not name the verdict. What came only with training (`"
        + "`, `".join(sorted(CAUSES_FROM_THE_START))
        + "`) stands behind its possible causes, beside `exploded`. A rule that lacks its numbers "
        "says so under *Unjudged*. How often the verdicts are right is measured: "
        "[](../explanation/calibration.md). [Add a finding](../howto/extend-finding.md) of your "
        "own.\n",
        table(("verdict", "fires when", "what to do"), rows),
        *map(_finding, FINDINGS.values()),
        "## Of several runs\n\n`resdiag explain RUN RUN ...` says in addition, per network:\n\n"
        f"{inspect.cleandoc(degraded.compare.__doc__ or '').split(chr(10) * 2, 1)[1]}\n",
        _thresholds((degraded.LEAST_SEEDS, degraded.LEAST_GAP, degraded.ERRORS)),
    ]
    return "\n".join(parts)


def _finding(row: Rule) -> str:
    needs = ", ".join(f"`{name}`" for name in row.needs)
    plots = ", ".join(f"`resdiag plot {kind}`" for kind in row.plots)
    about = (
        ("Applies to", row.applies),
        ("Kind", "a condition" if row.is_condition else ""),
        ("Needs", needs),
        ("Usual cause", row.cause),
        ("Why", row.why),
        ("What to do", row.remedy),
        ("Look at", plots),
        ("Source", row.source),
    )
    lines = "\n".join(f"- **{name}:** {text}" for name, text in about if text)
    thresholds = _thresholds(row.thresholds) if row.thresholds else ""
    return f"## `{row.name}`\n\n{row.definition}\n\n{lines}\n\n{thresholds}"


def _thresholds(numbers: Sequence[Threshold]) -> str:
    rows = [(f"{number:g}", number.meaning) for number in numbers]
    return table(("threshold", "meaning"), rows)


def calibration_page() -> str:
    """How often the verdict is right, from the results of `benchmarks/planted_faults.py`."""
    results = json.loads((RESULTS / "pathologies.json").read_text("utf-8"))
    tried = [Result.from_dict(case) for case in results["cases"]]
    parts = [
        HEAD.format(source="benchmarks/results/pathologies.json")
        + "\n# How often the verdict is right\n",
        _SUITE,
    ]
    for name in reversed(SETS):
        title = name.capitalize()
        of = [result for result in tried if result.set == name]
        if not of:
            continue
        named, placed = count_blocks_named(of)
        alarms, healthy = count_false_alarms(of)
        rows = [
            (f"`{s.finding}`", *map(str, s.counts), _rate(s.precision), _rate(s.recall))
            for s in score(of)
        ]
        header = ("verdict", "planted", "given", "right", "precision", "recall")
        parts.append(
            f"## {title} set\n\n{len(of)} trainings, {healthy} of them healthy, of which {alarms} "
            f"had a finding. The ill block was named in {named} of {placed} cases that have one."
            "\n\n" + table(header, rows)
        )
        wrong = [
            r for r in of if r.verdict != r.wanted or (r.block is not None and r.named != r.block)
        ]
        if wrong:
            parts.append(
                "What was not right:\n\n"
                + table(
                    ("planted, network, seed", "wanted", "given"),
                    [
                        (r.name, _named_block(r.wanted, r.block), _named_block(r.verdict, r.named))
                        for r in wrong
                    ],
                )
            )
    parts.append(
        "## What is planted\n\n"
        + table(
            ("fault", "verdict that names it", "where"),
            [
                (
                    fault.name,
                    f"`{fault.finding}`",
                    {"block": "a block", "first": "several blocks"}.get(fault.where, "-"),
                )
                for fault in FAULTS
            ],
        )
    )
    return "\n".join(parts)


def _rate(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def _named_block(name: str, block: int | None) -> str:
    return f"`{name}`" + ("" if block is None else f", block {block}")


_SUITE = """\
`benchmarks/planted_faults.py` plants known faults in small trainings and counts how often the
verdict is the one that names the fault. Precision: of the trainings that got a verdict, the share
in which it was the planted one. Recall: of those in which it was planted, the share that got it. A
verdict is right only if its name is the planted cause's; findings below it in the list are
consequences and do not count.

```sh
python benchmarks/planted_faults.py --set all --to benchmarks/results/pathologies.json
```

The thresholds were set on the development set. The held-out set has other networks, other seeds
and, where a fault has a magnitude, half and three times that magnitude. On the first look at it the
rules had a precision of 0.971 and a recall of 0.936, named the block in 59 of 61 cases, and had a
finding in 2 of 28 healthy trainings (both `stalled` after 30 steps). Then the faults that did not
fit their network were corrected (3 cases), and four rules were changed: `stalled` waits for 50
steps and knows losses above ln K, `lr_too_low` has a wider margin, `lr_too_high` knows a step
larger than the weights, `branch_too_large` knows branches that begin small. So the held-out figures
below are no longer blind. The fresh set was drawn and run after the last change: the held-out
networks, a further seed, twice the magnitudes. Every second loop tells
the monitor its loss, the others do not. Trainings are of 30 to 120 steps on 16x16 digits or on
short sequences of tokens: faults that need longer to show are not in the suite, nor are large
networks.

Five faults were planted later: a loss of the wrong sign, a sigmoid behind every addition, a first
step beyond the critical one, biases that learn 100 times as fast, and a training set of sixteen.
They were tried on networks of every set while they were written, the last two also changed there
until they made what they are named for, so none of their figures is blind. At the same time
trainings of about 100 other networks and faults, outside the suite, changed `bias_shift`,
`dead_block`, `vanishing`, `missing_norm` and `weight_decay_too_large`; no set has been blind since.
Every second healthy training is evaluated ten times in 120 steps. When they were evaluated first,
every 6 of 30 steps, five of the held-out ones were called `overfit`: BatchNorm's running averages
lag there. The rule then came to ask for 100 steps, a lasting rise, and training images that are
memorised.
`degraded` needs several runs and is not in the suite. With random labels a loss that began above
that of guessing can still fall after 60 steps, which is said to be unjudged and counts as a miss.
"""
