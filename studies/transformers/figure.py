"""Draws the figure of the transformers' story and writes the table of its page: results.json."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
PICTURE = DOCS / "_static" / "story-transformers.png"
PAGE = DOCS / "explanation" / "stories" / "transformers.md"
_ILL, _CURED, _OTHER = "#c44e52", "#4c72b0", "0.75"
_LAST = 20


def _read() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / "results.json").read_text("utf-8"))
    return found


def _lines(axes: Axes, run: dict[str, Any], column: str, named: int, colour: str) -> None:
    """Every block of a run, the named one in colour."""
    curves = dict(run["curves"][column])
    steps = curves.pop("step")
    for block, values in curves.items():
        is_named = int(block) == named
        axes.plot(steps, values, color=colour if is_named else _OTHER, zorder=2 + is_named)
    # beyond the right end of the line
    last = curves[str(named)][-1]
    axes.annotate(f" block {named}", (steps[-1], last), color=colour, fontsize=8, va="center")


def _pair(axes: Axes, runs: dict[str, Any], arms: tuple[str, str], column: str, named: int) -> None:
    ill, cured = (runs[arm] for arm in arms)
    _lines(axes, ill, column, named, _ILL)
    curves = cured["curves"][column]
    axes.plot(curves["step"], curves[str(named)], color=_CURED, zorder=4)
    axes.axvline(ill["step"], color=_ILL, linewidth=0.8, linestyle=":", zorder=1)
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.14 * curves["step"][-1])
    axes.spines[["top", "right"]].set_visible(False)


def draw() -> None:
    """The three panels, of the first seed."""
    runs = {run["arm"]: run for run in _read() if run["seed"] == 0}
    fast = ("fast q and k", "fast q and k, QK norm")
    experts = ("experts, no balance", "experts, balanced")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    _pair(left, runs, fast, "attention_logit", 2)
    left.set_yscale("log")
    left.axhline(100, color="0.6", linewidth=0.8, linestyle="--")
    left.set_title("largest attention logit", fontsize=10)
    _pair(middle, runs, fast, "attention_entropy_share", 2)
    middle.set_ylim(0, 1.05)
    middle.set_title("entropy of attention / ln T", fontsize=10)
    _pair(right, runs, experts, "expert_entropy", runs[experts[0]]["block"])
    right.set_ylim(0, 1.05)
    right.set_title("evenness of the experts' load", fontsize=10)
    left.plot([], [], color=_ILL, label="the block that is named")
    left.plot([], [], color=_OTHER, label="the other blocks")
    left.plot([], [], color=_CURED, label="the same block with QK norm; with a balancing bias")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    figure.savefig(PICTURE, dpi=110)


def table() -> str:
    """A row per training."""
    rows = ["| training | seed | verdict | block | since step | loss, last 20 steps |"]
    rows.append("|---|---|---|---|---|---|")
    for run in sorted(_read(), key=lambda run: list(_arms()).index(run["arm"])):
        loss = sum(run["losses"][-_LAST:]) / _LAST
        block, step = ("-" if run[key] is None else run[key] for key in ("block", "step"))
        rows.append(
            f"| {run['arm']} | {run['seed']} | `{run['verdict']}` | {block} | {step} | {loss:.2f} |"
        )
    return "\n".join(rows)


def _arms() -> dict[str, None]:
    return dict.fromkeys(run["arm"] for run in _read())


def main() -> None:
    """Draw, and write the table."""
    draw()
    text = PAGE.read_text("utf-8")
    marked = re.sub(
        r"(<!-- table -->\n).*?(\n<!-- end -->)", rf"\1\n{table()}\n\2", text, flags=re.DOTALL
    )
    PAGE.write_text(marked, "utf-8")


if __name__ == "__main__":
    main()
