"""Judge committed results again, after a change of rules: verdicts that change are rewritten.

    python studies/rejudge.py studies/results/explosion ...

The numbers that were recorded stay as they are. Committed tables are thinned, so that a step "since
when" may be later than in the run; a verdict of the same name keeps its words. `docs/generate.py`
then makes the pages again.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from resdiag.diagnose.verdict import judge
from resdiag.report.storage import read_results


def rejudge(folder: Path) -> Counter[tuple[str, str]]:
    """Rewrite the verdicts of `results.json`; how often which name became which."""
    place = folder / "results.json"
    text = place.read_text("utf-8")
    document = json.loads(text)
    changed: Counter[tuple[str, str]] = Counter()
    for packed, cell in zip(document["cells"], read_results(folder).cells, strict=True):
        if cell.run is None or packed["run"]["verdict"] is None:
            continue
        before, verdict = packed["run"]["verdict"], judge(cell.run).to_dict()
        changed[before["name"], str(verdict["name"])] += 1
        if before["name"] == verdict["name"]:
            continue
        said = {name: verdict[name] for name in before if name != "not_judged"}
        packed["run"]["verdict"] = {**before, **said}
        packed["outcomes"]["verdict"] = verdict["name"]
    indent = 1 if "\n" in text.strip() else None
    place.write_text(json.dumps(document, indent=indent, sort_keys=True) + "\n", "utf-8")
    return changed


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for (old, new), count in sorted(rejudge(Path(name)).items()):
            print(f"{name}: {count} {old} -> {new}")
