"""The page of findings: every rule with its definition and its thresholds."""

import inspect
from collections.abc import Sequence

from measuredtables import HEAD, table

from resdiag.diagnose import degraded
from resdiag.diagnose.finding import Rule, Threshold
from resdiag.diagnose.registry import CAUSES_FROM_THE_START, FINDINGS

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
        _thresholds((degraded.LEAST_SEEDS, degraded.LEAST_GAP)),
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
