"""Draws docs/_static/stories-lesions.png from lesions.json: every seed is a point."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "docs" / "_static" / "stories-lesions.png"
EXPLOSIONS = (("elu_nobn", 20), ("elu_pre", 20), ("elu_nobn", 56), ("elu_pre", 56))
SKIPS = (("elu_after", 20), ("original", 20), ("elu_after", 56), ("original", 56))


def _row(variant: str, depth: int, name: str) -> dict[str, Any]:
    found = json.loads((HERE / "lesions.json").read_text(encoding="utf-8"))["rows"]
    key = (variant, depth, name)
    return next(r for r in found if (r["variant"], r["depth"], r["name"]) == key)


def _pairs(axes: Axes, cases: tuple[tuple[str, int], ...], name: str, metric: str) -> None:
    for place, (variant, depth) in enumerate(cases):
        row = _row(variant, depth, name)
        pairs = zip(row["control"], row["changed"], strict=True)
        for seed, (old, new) in enumerate(pairs):
            x = [place - 0.18 + 0.05 * seed, place + 0.12 + 0.05 * seed]
            axes.plot(x, [old[metric], new[metric]], color="0.75", zorder=1)
            first = place == 0 and seed == 0
            axes.scatter(x[0], old[metric], color="#c44e52", label="control" if first else None)
            axes.scatter(x[1], new[metric], color="#4c72b0", label="lesion" if first else None)
    axes.set_xticks(range(len(cases)), [f"{v}\n{d}" for v, d in cases], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw it."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    _pairs(left, EXPLOSIONS, "bn_before_add", "growth_per_block")
    left.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    left.set_title("BN before the addition:\ngrowth of E[H²] per block", fontsize=10)
    left.set_ylim(0.9, None)
    _pairs(middle, SKIPS, "no_after_add", "skip_gain_end")
    middle.set_title("nothing after the addition:\nskip gain P3 after 12 steps", fontsize=10)
    _pairs(right, SKIPS, "no_after_add", "loss")
    right.set_yscale("log")
    right.set_title("nothing after the addition:\nloss at step 11", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
