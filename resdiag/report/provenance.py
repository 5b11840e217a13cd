"""The chapters on where results are from and how to make them again."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resdiag.report.origin import list_sources, remake_commands
from resdiag.report.parts import Code, Entry, Folded, Part, Section, Table, Text
from resdiag.report.results import Results
from resdiag.report.words import listing, tame

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

_DATA = ("name", "train", "test", "classes", "sha256")
_MACHINE = (
    "device", "device_name", "dtype", "threads", "cpu_capability", "torch", "cuda", "resdiag",
    "python", "git",
)  # fmt: skip
_MOST_NOTES = 5


def origin_section(runs: "Sequence[Run]", seeds: Sequence[int], noun: str) -> Section:
    """Data, devices and versions with their number of runs, the seeds, what was not watched.

    Args:
        runs: What was run.
        seeds: Of all that was to be run.
        noun: What a run is called: "cells" of a study, or "runs".
    """
    parts: list[Part] = []
    for part, names, caption in (
        ("data", _DATA, "Data"),
        ("environment", _MACHINE, "Device and versions"),
    ):
        found = list_sources(runs, part, names)
        rows: list[list[Entry]] = [[tame(words) or "not known", str(n)] for words, n in found]
        if rows:
            header = [caption.lower(), noun]
            parts.append(Table(caption=caption, header=header, rows=rows, numeric=(1,)))
    parts.append(Text(f"Seeds: {listing(list(map(str, sorted(set(seeds)))), 20)}."))
    notes = sorted({note for run in runs for note in run.notes})
    parts += [Text(f"Not watched: {tame(note)}") for note in notes[:_MOST_NOTES]]
    return Section(id="origin", title="Data, device, versions, seeds", parts=parts)


def remake_section(results: Results) -> Section:
    """The commands, and the study as it was run."""
    commands = "\n".join(remake_commands(results))
    document = json.dumps(results.study.document, indent=1, sort_keys=True, ensure_ascii=False)
    return Section(
        id="remake",
        title="How to remake it",
        parts=[Code(commands), Folded("The study as it was run", [Code(document, "json")], True)],
    )
