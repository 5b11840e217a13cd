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
        "`resdiag explain`, `resdiag.judge` and every run, at its end, apply these rules. They are "
        "ordered from causes to consequences. Every rule that fires adds a finding with its "
        "evidence; the first finding is the verdict. A condition is what a network is prone to. If "
        "the run learns in spite of it, the condition is reported and is not the verdict. If `"
        + "`, `".join(sorted(CAUSES_FROM_THE_START))
        + "` appear only during training, they are ranked after their possible causes, beside "
        "`exploded`. Rules whose metrics are missing are listed under *Unjudged*. The accuracy of "
        "the verdicts is measured: [](../explanation/calibration.md). You can also "
        "[add a finding](../howto/extend-finding.md).\n",
        table(("verdict", "fires when", "what to do"), rows),
        *map(_finding, FINDINGS.values()),
        "## Findings from several runs\n\n`resdiag explain RUN RUN ...` adds, per network:\n\n"
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
            f"had a finding. The faulty block was named in {named} of {placed} cases that have one."
            "\n\n" + table(header, rows)
        )
        wrong = [
            r for r in of if r.verdict != r.wanted or (r.block is not None and r.named != r.block)
        ]
        if wrong:
            parts.append(
                "Wrong verdicts:\n\n"
                + table(
                    ("fault, network, seed", "expected", "given"),
                    [
                        (r.name, _named_block(r.wanted, r.block), _named_block(r.verdict, r.named))
                        for r in wrong
                    ],
                )
            )
    parts.append(
        "## Faults\n\n"
        + table(
            ("fault", "expected verdict", "where"),
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
**What these figures are worth.** The rules were tuned to faults of this suite. In an independent
trial with 82 faults and 49 healthy trainings on 20 architectures that the rules had not been tuned
to (one seed, 60 to 120 steps, November 2026), 43 faults were named, 6 were reported as a symptom
only, 13 got a wrong cause and 20 none; 7 healthy trainings had a finding. Expect that of your own
training, and not the figures below. The faults of that trial are not in this repository.

`benchmarks/planted_faults.py` puts known faults into small trainings and counts how often resdiag
gives the verdict that names the fault. Precision is the share of trainings with a given verdict
that had the corresponding fault. Recall is the share of trainings with a fault that got the
corresponding verdict. Only the verdict counts: other findings of the run are ignored, because they
are consequences.

```sh
python benchmarks/planted_faults.py --set all --to benchmarks/results/pathologies.json
```

The thresholds were set on the development set. The held-out set has other networks, other seeds
and, if a fault has a magnitude, half and three times that magnitude. On the first evaluation of the
held-out set, precision was 0.971 and recall 0.936, the faulty block was named in 59 of 61 cases,
and 2 of 28 healthy trainings had a finding (both `stalled` after 30 steps). Afterwards, 3 faults
that did not fit their network were corrected, and four rules were changed: `stalled` waits for 50
steps and covers losses above ln K, `lr_too_low` has a wider margin, `lr_too_high` covers steps
larger than the weights, `branch_too_large` covers branches that begin small. The held-out figures
below are therefore no longer blind. The fresh set was generated and run after the last change. It
has the held-out networks, a further seed and twice the magnitudes. Every second training loop
passes its loss to the monitor, the others do not. Trainings have 30 to 120 steps on 16x16 digits or
on short sequences of tokens. Faults that need longer to show, and large networks, are not in the
suite.

Five faults were added later: a loss of the wrong sign, a sigmoid after every addition, a first step
beyond the critical one, biases that learn 100 times as fast, and a training set of sixteen samples.
They were developed on networks of every set, and the last two were also adjusted there until they
had the intended effect, so none of their figures is blind. At the same time, `bias_shift`,
`dead_block`, `vanishing`, `missing_norm` and `weight_decay_too_large` were changed after trainings
of about 100 other networks and faults outside the suite; no set has been blind since then. Every
second healthy training is evaluated ten times in 120 steps. At first it was evaluated every 6 of 30
steps, and five of the held-out ones got the verdict `overfit`, because the running averages of
BatchNorm lag behind in so few steps. Since then the rule requires 100 steps, a lasting rise, and
memorised training images.

On 30 November 2026 `undetermined` was added, conditions were told apart from events, `lr_too_high`
was restricted to runs that do not learn in the end, and all sets were run again: the fresh set too
has been seen by now. Since then the fault "NaN in a branch at step 9" leaves the operations of the
pass as they are, as a real one does.

`degraded` needs several runs and is not in the suite. With random labels, a loss that began above
ln K can still fall after 60 steps. It is then listed as unjudged and counts as a miss.
"""
