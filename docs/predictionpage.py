"""The page "How often a prediction is right", of `benchmarks/results/predictions.jsonl`."""

import json
from typing import Any

from measuredtables import HEAD, RESULTS, table

from resdiag.models.variants import find_variant
from resdiag.pathologies.score import Rate

_FILE = RESULTS / "predictions.jsonl"
_RIGHT = {"survives": True, "dies": False, "non_finite": False}
"""Whether the network lives, by the fates that are firm."""

_ABOUT = """# How often a prediction is right

`resdiag predict` says of a network and a learning rate that it `survives` or `dies`, or that it is `at_risk`. Here, settings were drawn at
random (variant, depth 8 to 32, width, BatchNorm in the stem, branch scale, batch size, seed, and a learning rate between 0.0001 and 3),
forecast from one batch, and then trained for 50 steps on the built-in digits. A network lives if losses and weights stay finite.
Brackets are 95 % intervals.

```sh
python benchmarks/predictions.py --settings 200 --seed 20261201
```
"""


def prediction_page() -> str:
    """The whole page."""
    rows = [json.loads(line) for line in _FILE.read_text().splitlines()]
    lots = {
        "all": rows,
        "without normalisation": [row for row in rows if not _normed(row)],
        "with BatchNorm": [row for row in rows if _normed(row)],
    }
    header = ("networks", "settings", "firm", "firm ones that are right", "`at_risk` that lived")
    drawn = sorted({row["drawn"] for row in rows})
    counts = f"{len(rows)} settings, drawn by seed {', '.join(map(str, drawn))}.\n"
    parts = [HEAD.format(source=f"benchmarks/results/{_FILE.name}"), _ABOUT, counts]
    parts.append(table(header, [_row(name, lot) for name, lot in lots.items()]))
    parts.append("## Firm and wrong\n")
    wrong = [row for row in rows if row["fate"] in _RIGHT and _RIGHT[row["fate"]] != row["lived"]]
    parts.append(_wrong(wrong) if wrong else "None.\n")
    return "\n".join(parts)


def _normed(row: dict[str, Any]) -> bool:
    return find_variant(row["variant"]).norm


def _row(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    firm = [row for row in rows if row["fate"] in _RIGHT]
    right = sum(_RIGHT[row["fate"]] == row["lived"] for row in firm)
    risk = [row for row in rows if row["fate"] == "at_risk"]
    return (
        name, str(len(rows)), str(Rate(len(firm), len(rows))), str(Rate(right, len(firm))),
        f"{sum(row['lived'] for row in risk)} of {len(risk)}",
    )  # fmt: skip


def _wrong(rows: list[dict[str, Any]]) -> str:
    names = ("variant", "depth", "width", "stem_bn", "branch_scale", "batch_size", "seed")
    header = (*names, "lr", "measured critical_lr", "said", "lived")
    return table(
        header,
        [
            (*(str(row[name]) for name in names), f"{row['lr']:.3g}", f"{row['critical_lr']:.3g}",
             row["fate"], "yes" if row["lived"] else "no")
            for row in rows
        ],
    )  # fmt: skip
