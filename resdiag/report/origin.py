"""Where results are from: data, devices, versions, what was changed, and how to make them again."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resdiag.errors import ResdiagError
from resdiag.report.parts import Code, Entry, Folded, Part, Section, Table, Text
from resdiag.report.results import Results
from resdiag.report.words import listing, tame
from resdiag.study.shipped import shipped_studies
from resdiag.study.study import Study, load_study

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

_FREE = ("variant", "depth")
"""Settings of a grid that may be cut down without changing any cell."""


def is_lossy(data: str) -> bool:
    """Whether a name is that of images that were compressed once more than the original.

    >>> is_lossy("cifar10-jpeg"), is_lossy("folder:x/cifar10-jpeg.tar.gz"), is_lossy("cifar10")
    (True, True, False)
    """
    return bool(re.search(r"(?<![a-z])(jpe?g|lossy)", data.lower()))


def shipped_version(study: Study) -> Study | None:
    """The shipped study of the same name; None if there is none."""
    name = study.name.removesuffix("-mini")
    if name not in shipped_studies():
        return None
    try:
        return load_study(name)
    except ResdiagError:
        return None


def changed_settings(study: Study) -> list[str]:
    """What makes the training another one than the shipped study's, as `epochs = 3 (not 164)`.

    Fewer variants, depths or seeds are no other training.
    """
    shipped = shipped_version(study)
    if shipped is None or shipped.digest == study.digest:
        return []
    if study.name.endswith("-mini"):
        return ["--mini"]
    ours, theirs = _settings(study), _settings(shipped)
    names = [n for n in dict.fromkeys([*ours, *theirs]) if n not in _FREE]
    return [
        f"{name} = {_value(ours.get(name))} (not {_value(theirs.get(name))})"
        for name in names
        if not set(map(repr, ours.get(name, []))) <= set(map(repr, theirs.get(name, [])))
        or bool(ours.get(name)) != bool(theirs.get(name))
    ]


def _settings(study: Study) -> dict[str, list[Any]]:
    """Every value of each setting in any table of the file."""
    file = study.file
    found = {name: [value] for name, value in file.fixed.given.items()}
    for table in (file.grid.given, *(more.given for more in file.include)):
        for name, values in table.items():
            if name != "seed":
                found.setdefault(name, []).extend(values)
    return found


def _value(values: Sequence[Any] | None) -> str:
    words = list(dict.fromkeys(map(str, values or ["the recipe's"])))
    return ", ".join(words)


def list_sources(runs: "Sequence[Run]", part: str, names: Sequence[str]) -> list[tuple[str, int]]:
    """Distinct identities of the data or environments of runs, with their numbers, most first.

    Args:
        runs: The runs.
        part: "data" or "environment".
        names: The keys to tell, in order.
    """
    counted: dict[str, int] = {}
    for run in runs:
        about: Mapping[str, Any] = getattr(run, part)
        words = ", ".join(
            f"{name.replace('_', ' ')} {about[name]}" for name in names if about.get(name)
        )
        counted[words] = counted.get(words, 0) + 1
    return sorted(counted.items(), key=lambda pair: -pair[1])


def remake_commands(results: Results) -> list[str]:
    """The commands that make the results again, as far as the study file says how."""
    import shlex

    study = results.study
    mini = study.name.endswith("-mini")
    name = study.name.removesuffix("-mini")
    shipped = shipped_version(study)
    where = name if shipped is not None else f"{name}.toml"
    words = ["--mini"] if mini else []
    if shipped is not None and not mini:
        words += _assignments(study.document, shipped.document)
    tail = "".join(f" {shlex.quote(word)}" for word in words)
    return [f"resdiag study run {where}{tail}", f"resdiag study report {where}{tail}"]


def _assignments(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The `--set` options that turn one document into the other, where options can."""
    words: list[str] = []
    pairs: list[tuple[str, Any, Any]] = [("seeds", ours.get("seeds"), theirs.get("seeds"))]
    for table in ("fixed", "grid", "resources"):
        mine, other = ours.get(table, {}), theirs.get(table, {})
        pairs += [(f"{table}.{key}", value, other.get(key)) for key, value in mine.items()]
    for key, value, other in pairs:
        if value is not None and value != other:
            words += ["--set", f"{key}={_toml(value)}"]
    return words


def _toml(value: object) -> str:
    """A value as `--set` takes it.

    >>> _toml([0, 1]), _toml("digits"), _toml(True), _toml(["elu", "plain"])
    ('[0, 1]', 'digits', 'true', '["elu", "plain"]')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
        if len(rows) == 1:
            parts.append(Text(f"{caption}, in all {noun}: {tame(found[0][0]) or 'not known'}."))
        elif rows:
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
        title="How to reproduce it",
        parts=[Code(commands), Folded("The study as it was run", [Code(document, "json")], True)],
    )
