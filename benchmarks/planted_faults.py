"""How often the verdict is right: plants faults in small trainings and counts what names them.

    python benchmarks/planted_faults.py                 # the quick set, half a minute of one core
    python benchmarks/planted_faults.py --set all --to benchmarks/results/pathologies.json

All sets but quick take about a quarter of an hour of one core. docs/generate.py makes the page
"How often the verdict is right" of what was written.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planted.calibration import (
    SETS,
    Result,
    cases,
    count_blocks_named,
    count_false_alarms,
    score,
    try_case,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the sets asked for and print a table of each, or with `--json` one document."""
    options = parse(arguments)
    sets = SETS if options.set == "all" else (options.set,)
    results = {name: try_set(name) for name in sets}
    document = {"schema": 1, "cases": [r.to_dict() for of in results.values() for r in of]}
    if options.to is not None:
        options.to.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if options.json:
        print(
            json.dumps({**document, "scores": {name: scores(of) for name, of in results.items()}})
        )
        return
    for name, of in results.items():
        print_scores(name, of)


def try_set(name: str) -> list[Result]:
    """Train and judge every case of a set, with a line on stderr for each."""
    every, results = cases(name), []
    for number, case in enumerate(every, 1):
        result = try_case(case, name)
        mark = "" if result.verdict == result.wanted else " !"
        print(f"{name} {number}/{len(every)} {case.name}: {result.verdict}{mark}", file=sys.stderr)
        results.append(result)
    return results


def scores(results: Sequence[Result]) -> dict[str, Any]:
    """For JSON: the counts; rates can be had from them."""
    named, placed = count_blocks_named(results)
    alarms, healthy = count_false_alarms(results)
    return {
        "verdicts": [vars(row) for row in score(results)],
        "blocks": {"named": named, "planted": placed},
        "healthy": {"alarms": alarms, "trainings": healthy},
    }


def print_scores(name: str, results: Sequence[Result]) -> None:
    """A table with a line per verdict."""
    named, placed = count_blocks_named(results)
    alarms, healthy = count_false_alarms(results)
    print(
        f"{name}: {len(results)} trainings; a finding in {alarms} of {healthy} healthy ones; "
        f"the ill block named in {named} of {placed}"
    )
    print(f"{'verdict':24}{'planted':>9}{'given':>9}{'right':>9}{'precision':>11}{'recall':>9}")
    for row in score(results):
        counts = "".join(f"{count:9}" for count in row.counts)
        print(f"{row.finding:24}{counts}{row.precision:11.3f}{row.recall:9.3f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=("quick", *SETS, "all"), default="quick")
    parser.add_argument("--to", type=Path, help="write every case as JSON there")
    parser.add_argument("--json", action="store_true", help="print cases and scores as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
