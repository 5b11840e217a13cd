"""The page "How often the verdict is right", of the results in `benchmarks/results`."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from measuredtables import HEAD, RESULTS, table

from resdiag.pathologies.architectures import SETS
from resdiag.pathologies.grammar import FORMS, KINDS, PER_RECIPE, REPEATS, WAYS, draw
from resdiag.pathologies.result import Result
from resdiag.pathologies.score import NEAR, Score, explain_miss, order
from resdiag.pathologies.suite import read_results

_FILE = RESULTS / "pathologies.jsonl"
_LONG = 110
_PLACES = {"one": "a block", "stage": "a stage", "all": "all blocks"}


def calibration_page() -> str:
    """How often the verdict is right, from what `resdiag bench pathologies --to` has written."""
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in read_results(_FILE):
        groups[result.case.set, result.case.drawn].append(result)
    parts = [HEAD.format(source=f"benchmarks/results/{_FILE.name}"), _ABOUT]
    if not any(which == "locked" for which, _ in groups):
        parts.append(
            "## Locked set\n\nNot scored yet: its first score is taken at a release, by a new seed."
        )
    for (which, seed), results in sorted(groups.items(), reverse=True):
        parts += _of_set(which, seed, Score(results))
    parts += [_kinds(), _architectures(), _recipes()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _of_set(which: str, seed: int, score: Score) -> list[str]:
    whole = len(draw(which, seed))
    part = "" if len(score.results) == whole else f" of the set's {whole}"
    counts = (
        f"{len(score.results)}{part} trainings: {len(score.planted)} with a fault, "
        f"{len(score.healthy)} healthy, {score.harmless.count} with a fault that did no harm and "
        "is not counted."
    )
    return [
        f"## {which.capitalize()} set, seed {seed}\n\n{counts}\n\n" + _rates(score),
        "### By finding\n\n" + _by_finding(score),
        "### Confusion matrix\n\nA row per planted finding, with the verdicts that were given.\n\n"
        + _confusion(score),
        "### Misses\n\n" + _misses(score),
    ]


def _rates(score: Score) -> str:
    rows = [
        ("precision: right verdicts among those that name a fault", str(score.precision)),
        ("recall: faults that are named, with their cause", str(score.recall)),
        ("block named, of faults found in a block", str(score.block_named)),
        (f"begin dated to within {NEAR} steps, of faults found", str(score.date_near)),
        ("median error of the date, in steps", f"{score.date_error:g}"),
        ("healthy trainings whose verdict names a fault", str(score.false_alarms)),
        ("healthy trainings with any finding", str(score.any_finding)),
        ("healthy trainings that are called healthy", str(score.called_healthy)),
        ("crashed", str(score.crashed)),
    ]
    return table(("measure", "value [95 %] (count)"), rows)


def _by_finding(score: Score) -> str:
    rows = []
    given = Counter(r.verdict for r in score.counted if r.names_a_fault)
    parts = score.by(lambda r: r.wanted)
    for name in sorted(parts, key=order):
        part = parts[name]
        if name == "healthy" or not part.planted:
            continue
        date = f"{part.date_error:g}" if part.found else "-"
        rows.append((f"`{name}`", str(given[name]), str(part.recall), str(part.block_named), date))
    header = ("finding", "given", "recall", "block named", "error of the date")
    return table(header, rows)


def _confusion(score: Score) -> str:
    rows = [
        (f"`{wanted}`", ", ".join(f"`{n}` {row[n]}" for n in sorted(row, key=order)))
        for wanted, row in score.confusion().items()
    ]
    return table(("planted", "given"), rows)


def _misses(score: Score) -> str:
    """Misses with one reason are one row."""
    grouped: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for miss in score.misses():
        reason = explain_miss(miss)
        reason = reason if len(reason) <= _LONG else reason[:_LONG].rsplit(" ", 1)[0] + " ..."
        what = miss.case.kind or f"healthy, {miss.case.recipe}"
        grouped[miss.wanted, what, reason].append(miss)
    rows = [
        (f"{what}: `{wanted}`", _escape(reason), str(len(some)), _names(some))
        for (wanted, what, reason), some in sorted(
            grouped.items(), key=lambda item: (order(item[0][0]), item[0])
        )
    ]
    return table(("fault", "reason", "cases", "architectures"), rows) if rows else "None."


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _names(results: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(result.case.architecture for result in results))


def _kinds() -> str:
    rows = [
        (
            kind.name,
            " or ".join(f"`{name}`" for name in (kind.finding, *kind.also))
            + (f": {kind.cause}" if kind.cause else ""),
            ", ".join(_PLACES[extent] for extent in kind.extents) if kind.place else "-",
            ", ".join(map(str, kind.onsets)),
            ", ".join(f"{strength:g}" for strength in kind.strengths),
            "yes" if kind.hurts else "",
        )
        for kind in KINDS.values()
    ]
    header = ("fault", "named by", "place", "begins at step", "strength", "compared with a twin")
    return f"## Kinds of faults\n\n{table(header, rows)}"


def _architectures() -> str:
    rows = [
        (row.family, row.name, which, row.task)
        for which, members in SETS.items()
        for row in members
    ]
    return "## Architectures\n\n" + table(("family", "architecture", "set", "task"), rows)


def _recipes() -> str:
    return "## Healthy trainings\n\n" + ", ".join(WAYS) + "."


_ABOUT = f"""\
# How often the verdict is right

`resdiag bench pathologies` trains small networks, most of them with a planted fault, and counts how
often the verdict names the fault, its block and the step at which it begins.

**What these figures are worth.** Rules are written and tuned on the development set. In an
independent trial with 82 faults and 49 healthy trainings on 20 architectures that the rules had not
been tuned to (one seed, 60 to 120 steps, November 2026), 43 of 82 faults were named, 6 were
reported as a symptom only, 13 got a wrong cause and 20 none; 7 healthy trainings had a finding. The
faults of that trial are not in this repository. The suite before this one, with 34 kinds of faults,
gave a recall above 0.96 at the same time: its held-out networks and seeds had been looked at while
rules were changed, and after the first look a score is no longer blind. Hence the locked set. It
has other families of architectures, it is drawn by a new seed at every release, no threshold is set
on it, and its first score is the one that is published here. The kinds of faults are the same in
both sets, and the rules were written with these kinds in mind: the score says how well the rules
carry over to other networks, places and seeds, and not what they make of a kind of fault that
nobody has planted. For that, the independent trial is the only figure, and it has not been repeated
with the rules of today.

```sh
resdiag bench pathologies                       # the quick set
resdiag bench pathologies --set locked --seed 7 --jobs 8 --to results.jsonl
```

A set is drawn by a seed: for every kind of fault up to {FORMS} combinations of place, step and
strength, each in {REPEATS} architectures of different families with {REPEATS} seeds of weights and
data, under different optimizers; and {PER_RECIPE} healthy trainings by each of {len(WAYS)} recipes.
Faults that need what few families have are planted in fewer. Trainings have 60 steps, a few 120, on
16x16 or 32x32 digits, short sequences of words, or vectors. A quarter of the loops do not pass
their loss to the monitor.

- A verdict is right if it is the finding below, and its cause contains the words below, if any. A
  training in which nothing is wrong is right if its verdict names no fault; it may be undetermined.
- Only the verdict counts. Other findings of a run are its consequences.
- Intervals are Wilson's, of 95 %. Cases are not independent: the same fault and the same
  architecture occur several times. A case that crashes counts as a miss.
- The error of the date is the distance between the step at which the fault begins and the step of
  the verdict. A verdict on the whole run is dated 0.
- Some faults do no harm in some networks. Where the table of kinds says so, the same training
  without the fault is run too, and the case counts only if the loss on unseen batches is higher
  with the fault by 5 % of the loss before training. The other kinds are not compared: a block that
  is not trained is a fault also where the rest of the network makes up for it.

Faults that need longer to show, large networks, several processes and `degraded`, which needs
several runs, are not in the suite.
"""
