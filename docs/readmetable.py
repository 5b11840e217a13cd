"""The table of the README: what was measured, out of the results in `benchmarks/results`."""

import json
from typing import Any

from measuredtables import RESULTS, ROOT, table

from resdiag.pathologies.score import Rate, Score
from resdiag.pathologies.suite import read_results

_BEGIN = "<!-- measured: written by docs/generate.py from benchmarks/results -->\n"
_END = "<!-- end of measured -->\n"


def readme_page() -> str:
    """The README with its table of measurements in its place."""
    before, rest = (ROOT / "README.md").read_text("utf-8").split(_BEGIN)
    return before + _BEGIN + _table() + _END + rest.split(_END)[1]


def _table() -> str:
    every = read_results(RESULTS / "pathologies.jsonl")
    newest = max(result.case.drawn for result in every if result.case.set == "locked")
    locked = [r for r in every if (r.case.set, r.case.drawn) == ("locked", newest)]
    score = Score(locked)
    networks = len({result.case.architecture for result in locked})
    peers = json.loads((RESULTS / "peers.json").read_text("utf-8"))["tools"]
    rows = [
        (
            f"planted faults named with their cause, in {networks} kinds of networks that the "
            "rules were not tuned on",
            _share(score.recall),
        ),
        ("named faults that were the planted one", _share(score.precision)),
        ("healthy trainings in which a fault was named", _share(score.false_alarms)),
        ("the block named is the right one", _share(score.block_named)),
        ("time of a recorded step, ResNet-110, batch 128", _cost("original", 110, 128)),
        (
            "time of a recorded step, ResNet-20, batch 32: a small network",
            _cost("original", 20, 32),
        ),
        (
            "weights after a watched training",
            "the same bits as without resdiag: `tests/watch/test_watching_changes_nothing.py`",
        ),
        ("wrong numbers on torchvision's ResNet-18, in-place operations included", _wrong(peers)),
        ("other tools that name a block whose branch is 1000 times too large", _rivals(peers)),
    ]
    return table(("what", "measured"), rows)


def _share(rate: Rate) -> str:
    low, high = rate.interval
    return (
        f"{100 * rate.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]: "
        f"{rate.count:,} of {rate.of:,}"
    )


def _cost(variant: str, depth: int, batch: int) -> str:
    """The step with recording over the step without, of both sets of metrics."""
    results = json.loads((RESULTS / "performance.json").read_text("utf-8"))
    found = {
        (row["name"], row["every"]): row["ratio"]
        for row in results["overhead"]["result"]
        if (row["variant"], row["depth"], row["batch_size"]) == (variant, depth, batch)
    }
    return (
        f"×{found['full', 1]:.2f}, ×{found['core', 1]:.2f} with the core metrics, "
        f"×{found['full', 10]:.2f} if every tenth step is recorded"
    )


def _wrong(peers: list[dict[str, Any]]) -> str:
    ours = next(tool for tool in peers if tool["name"] == "resdiag")["values"]
    return f"{ours['wrong']} of {ours['compared']}, compared with plain autograd"


def _rivals(peers: list[dict[str, Any]]) -> str:
    """Which other tools say in words which block is too large, with what they say of a good one."""
    found = [
        f"{tool['label']}, with {tool['alarms']['count']} messages about the healthy network"
        for tool in peers
        if tool["package"] not in ("", "resdiag") and tool.get("large", {}).get("names")
    ]
    return "; ".join(found) or "none"
