"""The tables of what was measured: of `benchmarks/performance.py` and `benchmarks/peers.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explanation" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
HEAD = "<!-- Written by docs/generate.py from {source}; edit that and run `make pages`. -->\n"


def performance_page() -> str:
    """The performance page with the tables of what was measured in their places."""
    page = PAGE.read_text("utf-8")
    results = json.loads((RESULTS / "performance.json").read_text("utf-8"))
    for part, make in _PERFORMANCE.items():
        begin, end = f"<!-- {part}: written by docs/generate.py -->\n", f"<!-- end of {part} -->\n"
        before, rest = page.split(begin)
        where = "\nNot measured yet.\n\n"
        if part in results:
            there = results[part]["where"]
            where = (
                f"\nMeasured {there['date']}: {there['machine']}, Python {there['python']}, torch "
                f"{there['torch']}, load average {there['load_before']} before it began.\n\n"
            ) + make(results[part]["result"])
        page = before + begin + where + end + rest.split(end)[1]
    peers = json.loads((RESULTS / "peers.json").read_text("utf-8"))
    begin, end = "<!-- peers: written by docs/generate.py -->\n", "<!-- end of peers -->\n"
    before, rest = page.split(begin)
    return before + begin + _deep_peers_table(peers) + end + rest.split(end)[1]


def _deep_peers_table(results: Mapping[str, Any]) -> str:
    """A row per tool that was timed on the deep network, the control first."""
    timed = [tool for tool in results["tools"] if "deep" in tool]
    if not timed:
        return "\nNot measured yet.\n\n"
    variant, depth, size, threads = timed[0]["deep"]["network"]
    rows = [
        (
            " ".join(filter(None, (tool["label"], tool.get("version")))),
            tool["records"] or "nothing: a second network",
            "{1:.3f} [{0:.3f} {2:.3f}]".format(*tool["deep"]["ratio"]),
            str(tool["deep"]["n"]),
        )
        for tool in timed
    ]
    where = f"{results['date']}: {variant}-{depth}, batch {size}, {threads} threads"
    header = ("tool", "what it records", "step time", "n")
    return f"\nMeasured {where}, every step recorded.\n\n" + table(header, rows) + "\n"


def _overhead_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per network and arm."""
    header = ("network", "batch", "arm", "every", "step time", "processor time", "n")
    return table(
        header,
        [
            (
                f"{r['variant']}-{r['depth']}",
                str(r["batch_size"]),
                f"`{r['name']}`",
                str(r["every"] or "-"),
                f"{r['ratio']:.3f} [{r['q25']:.3f} {r['q75']:.3f}]",
                f"{r['cpu']:.3f}",
                str(r["n"]),
            )
            for r in rows
        ],
    )


def _growth_table(result: Mapping[str, Any]) -> str:
    """A row per depth and batch, and a sentence about the long run."""
    rows = [
        (
            str(r["depth"]),
            str(r["blocks"]),
            str(r["batch_size"]),
            r["metrics"],
            f"{r['ms']:.1f}",
            f"{1000 * r['ms'] / r['blocks']:.0f}",
            f"{r['step_ms']:.0f}",
            str(r["n"]),
        )
        for r in result["rows"]
    ]
    header = ("depth", "blocks", "batch", "set", "ms a step", "us a block", "idle step, ms", "n")
    long = result["steps"]
    return table(header, rows) + (
        f"\nA run of {long['steps']:,} recorded steps of {long['blocks']} blocks that nobody "
        "drains: "
        f"{long['first_ms']:.2f} ms a step among the first 200, {long['last_ms']:.2f} among the "
        f"last 200; it holds {long['bytes_per_step']:.0f} bytes a step.\n\n"
    )


def _storage_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per form."""
    header = ("form", "us a recorded step", "processor's", "us a value", "bytes a value", "steps")
    cells = [
        (r["form"], "not installed", "-", "-", "-", "-")
        if "missing" in r
        else (
            r["form"],
            f"{r['us_per_step']:,.0f}",
            f"{r['cpu_us_per_step']:,.0f}",
            f"{r['us_per_value']:.3f}",
            f"{r['bytes_per_value']:.2f}",
            str(r["steps"]),
        )
        for r in rows
    ]
    return table(header, cells)


def _steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per kind of operation, two columns per network."""
    header = ["ms a step"]
    for r in rows:
        header += [f"ResNet-{r['depth']}", f"ResNet-{r['depth']}, full set recorded"]

    def line(name: str, plain: str, recorded: str | None) -> tuple[str, ...]:
        cells = [f"{r[k]:.0f}" if k else "-" for r in rows for k in (plain, recorded)]
        return (name, *cells)

    body = [
        (kind, *(f"{r[k][kind]:.1f}" for r in rows for k in ("kinds", "kinds_recorded")))
        for kind in rows[0]["kinds"]
    ]
    body += [
        line("**the step, on the clock**", "step_ms", "recorded_ms"),
        line("floor by arithmetic", "arithmetic_floor_ms", None),
        line("floor by traffic", "traffic_floor_ms", None),
    ]
    about = "; ".join(
        f"ResNet-{r['depth']}: {r['gflop']:.0f} GFLOP at {r['gflop_per_s']:.0f} GFLOP/s, "
        f"{r['gbyte']:.1f} GB at {r['gbyte_per_s']:.0f} GB/s"
        for r in rows
    )
    return table(header, body) + f"\nThe floors, batch {rows[0]['batch_size']}: {about}.\n\n"


def _backends_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per network and backend."""
    header = ("network", "batch", "backend", "images/s", "speed by the clock", "by processor", "n")
    cells = [
        (
            f"{r['variant']}-{r['depth']}",
            str(r["batch_size"]),
            f"`{r['name']}`",
            f"{r['images_per_s']:.0f}",
            "{ratio:.2f} [{q25:.2f} {q75:.2f}]".format(**r["clock"]),
            f"{r['cpu']['ratio']:.2f}",
            str(r["n"]),
        )
        for r in rows
    ]
    return table(header, cells) + "\n"


def _slices_table(result: Mapping[str, Any]) -> str:
    """A row per number of samples, a column per metric."""
    metrics = list(dict.fromkeys(r["metric"] for r in result["rows"]))
    cells = {
        (r["samples"], r["metric"]): f"{100 * r['median']:.1f} ({100 * r['q95']:.1f})"
        for r in result["rows"]
    }
    counts = sorted({samples for samples, _ in cells})
    header = ("samples", *(f"`{metric}`" for metric in metrics))
    rows = [(str(count), *(cells[count, metric] for metric in metrics)) for count in counts]
    return table(header, rows) + "\n"


_PERFORMANCE: Mapping[str, Any] = {
    "overhead": _overhead_table,
    "growth": _growth_table,
    "storage": _storage_table,
    "steps": _steps_table,
    "backends": _backends_table,
    "slices": _slices_table,
}


def peers_table(results: Mapping[str, Any]) -> str:
    """What `benchmarks/peers.py` measured, a row per tool."""
    rows = [_peer(tool) for tool in results["tools"] if tool["name"] != "nothing"]
    torch = next(tool["torch"] for tool in results["tools"] if "torch" in tool).partition("+")[0]
    where = f"{results['date']}, {results['machine']}, Python {results['python']}, torch {torch}"
    header = (
        "tool",
        "runs",
        "wrong numbers",
        "training changed",
        "1000 times too large",
        "overflow",
        "explosion by depth",
        "words on a healthy net",
        "step time",
    )
    timed = [tool["time"] for tool in results["tools"] if "time" in tool]
    nulls = sorted(time["null"][1] for time in timed)
    noise = f" Two unwatched models: {nulls[0]:.2f} to {nulls[-1]:.2f}." if nulls else ""
    return f"Measured {where}.{noise}\n\n" + table(header, rows)


def _peer(tool: Mapping[str, Any]) -> tuple[str, ...]:
    """A row: what could not be asked is a dash, what failed says so."""
    version = tool.get("version") if tool["package"] != "resdiag" else None
    label = " ".join(filter(None, (tool["label"], version)))
    if "missing" in tool or "runs" not in tool:
        why = "not installed" if "missing" in tool else tool.get("failed", "not measured")
        return (label, why, *["-"] * 7)
    runs = "yes" if tool["runs"] is True else "no"
    if runs == "no" and tool.get("runs_without_inplace") is True:
        runs = "only without in-place operations"
    values, time = tool.get("values", {}), tool.get("time")
    wrong = f"{values['wrong']} of {values['compared']}" if values.get("compared") else "-"
    changes = tool.get("changes")
    changed = "-" if not isinstance(changes, list) else ", ".join(changes) or "no"
    depth = tool.get("depth", {})
    told = "-" if "says" not in depth else "words" if depth["says"] else "no"
    if depth.get("healthy_findings"):
        told += f"; {depth['healthy_findings']} words on the healthy one"
    alarms = tool.get("alarms", {}).get("count") if tool["speaks"] else "-"
    cost = tool.get("failed", "-").removeprefix("time: ")
    if time:
        first, median, third = time["ratio"]
        cost = f"{median:.2f} [{first:.2f} {third:.2f}]"
    found = (_found(tool.get(question)) for question in ("large", "overflow"))
    return (label, runs, wrong, changed, *found, told, "-" if alarms is None else str(alarms), cost)


def _found(answer: Mapping[str, Any] | None) -> str:
    """What pointed to the planted block: the tool's words, its numbers, or neither."""
    if answer is None:
        return "-"
    if "error" in answer:
        return "stops with an error"
    ways = [
        way
        for way, hit in (
            ("words", answer["names"]),
            ("numbers", answer["points_to"] == "layer2.1"),
        )
        if hit
    ]
    if ways:
        return " and ".join(ways)
    if answer["points_to"]:
        return f"points to {answer['points_to']}"
    if answer["points_to"] is None:  # its numbers were not read: histograms, traces, files
        return "-" if answer["names"] is None else "no words"
    return "no"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped, in code as well."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
