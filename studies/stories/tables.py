"""Writes the tables of the stories' pages from the results beside this file; `--check` compares.

A page says `<!-- table NAME VARIANT... -->`; what follows until `<!-- end -->` is written here.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent.parent / "docs" / "explanation" / "stories"
_TABLE = re.compile(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def rows(question: str, **wanted: object) -> list[dict[str, Any]]:
    """The results of one question that have these values."""
    document = json.loads((HERE / f"{question}.json").read_text(encoding="utf-8"))
    return [r for r in document["rows"] if all(r[key] == value for key, value in wanted.items())]


def spread(values: Iterable[float | None]) -> str:
    """Lowest and highest of all seeds; a number that was not finite is said."""
    kept = [value for value in values if isinstance(value, int | float)]
    if not kept:
        return "not finite"
    low, high = f"{min(kept):.3g}", f"{max(kept):.3g}"
    return low if low == high else f"{low} to {high}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def growth(*variants: str) -> str:
    """Growth of signal and gradient at initialisation, theory beside measurement."""
    head = ("variant", "depth", "seeds", "growth per block: theory", "measured",
            "gradient ratio: theory", "measured", "loss at step 0", "gradient norm")  # fmt: skip
    body = []
    for variant in variants:
        for depth in (20, 56, 110):
            found = rows("initialisation", variant=variant, depth=depth)
            theory = [row["theory"] for row in found]
            body.append([
                f"`{variant}`", str(depth), str(len(found)),
                spread(t["growth_per_block"] for t in theory),
                spread(row["growth_per_block"] for row in found),
                spread(t["gradient_ratio"] for t in theory),
                spread(row["gradient_ratio"] for row in found),
                spread(row["loss"] for row in found),
                spread(row["grad_norm"] for row in found),
            ])  # fmt: skip
    return table(head, body)


def skip(*variants: str) -> str:
    """What the activation after the addition does at initialisation, theory in brackets."""
    named = {
        "perturbation": "P1, last block", "identity_defect_stage_1": "P2, end of stage 1",
        "identity_drift_stage_1": "P4, stage 1", "skip_gain": "P3, last block",
        "output_mean": "mean of H, last block",
    }  # fmt: skip
    body = []
    for variant in variants:
        for depth in (20, 56, 110):
            found = rows("initialisation", variant=variant, depth=depth)
            cells = [
                f"{spread(row[name] for row in found)} ({found[0]['theory'][name]:.3g})"
                for name in named
            ]
            body.append([f"`{variant}`", str(depth), *cells])
    return table(["variant", "depth", *named.values()], body)


def steps(*variants: str) -> str:
    """The first 30 steps at learning rate 0.1."""
    named = {
        "output_mean": "mean of H, last block", "output_bias": "B2, last block",
        "skip_gain": "P3, last block", "gradient_ratio": "gradient ratio",
        "worst_loss": "highest loss so far", "loss": "loss",
    }  # fmt: skip
    body = []
    for variant in variants:
        for depth in (20, 56):
            for step in (0, 10, 30):
                found = rows("steps", variant=variant, depth=depth, step=step)
                cells = [spread(row[name] for row in found) for name in named]
                body.append([f"`{variant}`", str(depth), str(step), *cells])
    return table(["variant", "depth", "step", *named.values()], body)


def lesions(*variants: str) -> str:
    """Each lesion against its control."""
    head = ("variant", "depth", "lesion", "seeds", "growth per block", "P3 at the end",
            "survived", "last loss", "verdict")  # fmt: skip
    body = []
    for variant in variants:
        for row in rows("lesions", variant=variant):
            arms = row["control"], row["changed"]
            cells = [
                " → ".join(spread(arm[name] for arm in side) for side in arms)
                for name in ("growth_per_block", "skip_gain_end")
            ]
            alive = " → ".join(str(sum(arm["survived"] for arm in side)) for side in arms)
            losses = " → ".join(spread(arm["loss"] for arm in side) for side in arms)
            said = "confirmed" if row["confirmed"] else f"not confirmed: {row['reason']}"
            body.append([
                f"`{variant}`", str(row["depth"]), row["words"], str(len(arms[0])), *cells,
                alive, losses, said,
            ])  # fmt: skip
    return table(head, body)


def energies() -> str:
    """Plain networks with and without equal energies of the samples."""
    head = ("input", "depth", "as they are", "equal", "variance of q: first", "middle", "last")
    body = []
    for source in ("photographs", "noise"):
        for depth in (56, 110):
            free, equal = (
                rows("energies", input=source, depth=depth, reset=arm) for arm in (False, True)
            )
            ratios = [geometric_mean(row["over_theory"] for row in arm) for arm in (free, equal)]
            columns = zip(*(row["spread"] for row in free), strict=True)
            cells = [f"{ratio:.2f}" for ratio in ratios] + [spread(column) for column in columns]
            body.append([source, str(depth), *cells])
    return table(head, body)


TABLES: dict[str, Callable[..., str]] = {
    "growth": growth, "skip": skip, "steps": steps, "lesions": lesions,
    "energies": energies,
}  # fmt: skip


def written(text: str) -> str:
    """A page with its tables as the results have them."""

    def write(match: "re.Match[str]") -> str:
        name, *variants = match[1].split()
        return f"<!-- table {match[1]} -->\n\n{TABLES[name](*variants)}\n\n<!-- end -->"

    return _TABLE.sub(write, text)


def main() -> int:
    """Write the pages, or with `--check` name those that are out of date."""
    stale = 0
    for page in [*sorted(PAGES.glob("*.md")), PAGES.parent / "theory.md"]:
        text = page.read_text(encoding="utf-8")
        if written(text) == text:
            continue
        stale += 1
        print(page.name)
        if "--check" not in sys.argv:
            page.write_text(written(text), encoding="utf-8")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
