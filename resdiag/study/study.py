"""A study that was read: its file, its cells, its folder, and the plan that engines work by."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError, unknown
from resdiag.runs.config import from_stored
from resdiag.runs.files import from_json, hash_json, list_folder, make_folder, to_json, write_file
from resdiag.study.document import StudyError, override, read_document
from resdiag.study.grid import FILTERED, Cell, expand, find_unmatched, list_cells
from resdiag.study.mini import shrink
from resdiag.study.shipped import shipped_studies
from resdiag.study.spec import StudyFile, check_document

SCHEMA = 1
_MOST_BYTES = 20_000_000  # of a plan, which is a study file as JSON
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PLAN = re.compile(r"plan-[0-9a-f]{8}\.json")


@dataclass(frozen=True)
class Study:
    """One question with its cells.

    Attributes:
        name: Of the file, and of the folder of its runs.
        document: What the file says, after `--set` and `--mini`, as plain data.
        file: The same, checked.
        cells: In the order of the file.
        dropped: Figures and expected values of the file that `--set` left without a cell.
    """

    name: str
    document: Mapping[str, Any]
    file: StudyFile
    cells: tuple[Cell, ...]
    dropped: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the study says."""
        return hash_json(self.document, before=f"{self.name}\n")

    @cached_property
    def _by_id(self) -> dict[str, Cell]:
        return {cell.id: cell for cell in self.cells}

    def folder(self, runs: Path) -> Path:
        """Where its cells lie."""
        return runs / self.name

    def cell(self, id: str) -> Cell:
        """One of its cells.

        Raises:
            UsageError: It has none of this id.
        """
        found = self._by_id
        if id not in found:
            raise unknown("cell", id[:100], [*list(found)[:20], *["..."][: len(found) > 20]])
        return found[id]

    def write_plan(self, runs: Path) -> Path:
        """Write down what is to be done, once: engines read this, and the file may change.

        Returns:
            `<runs>/<name>/plan-<hash8>.json`.

        Raises:
            StorageError: It cannot be written.
        """
        folder = self.folder(runs)
        make_folder(folder)
        path = folder / f"plan-{self.digest[:8]}.json"
        if not path.exists():
            plan = {"schema": SCHEMA, "name": self.name, "study": dict(self.document)}
            write_file(path, to_json({**plan, "digest": self.digest}))
        return path


def load_study(where: str, settings: Sequence[str] = (), *, mini: bool = False) -> Study:
    """Read a study.

    Args:
        where: Path of a TOML file, of a plan or of a folder with plans; or the name of a shipped
            study.
        settings: `--set` assignments; see `override`.
        mini: Shrink it to seconds.

    Raises:
        StudyError: The file has mistakes; all are named.
        UsageError: There is no such file.
    """
    path, shipped = Path(where), shipped_studies()
    names = list_folder(path) if path.is_dir() else []
    plans = [path / name for name in names if _PLAN.fullmatch(name)]
    if plans:
        path = max(plans, key=lambda plan: plan.stat().st_mtime_ns)
    elif path.is_dir() and where not in shipped:
        raise UsageError(f"no study in {path}", _HINT)
    elif not path.suffix and len(path.parts) == 1:
        if where not in shipped:
            raise unknown("study", where, [*shipped, "or a path: FILE.toml"])
        path = shipped[where]  # also where `--runs` left a folder of the study's name
    if path.suffix == ".json":
        return _read_plan(path, settings, mini)
    name = path.stem
    if not _NAME.fullmatch(name) or path.suffix != ".toml":
        raise UsageError(f"{str(path)!r} is not a study: letters, digits, - and _, then .toml")
    return build_study(name, read_document(_read(path), str(path)), settings, mini, str(path))


_HINT = "resdiag study list shows the shipped ones; resdiag study init FILE.toml writes a template"


def _read(path: Path) -> bytes:
    """What a file holds; enough of it to see that it is too large."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise UsageError(f"{path} is not a file", _HINT)
        with path.open("rb") as file:
            return file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", _HINT) from error


def build_study(
    name: str, document: Mapping[str, Any], settings: Sequence[str], mini: bool, shown: str
) -> Study:
    """Check and expand what was read.

    Args:
        name: Of the study; a mini one is called `<name>-mini`.
        document: Parsed TOML.
        settings: `--set` assignments.
        mini: Shrink it to seconds.
        shown: What messages call the file.

    Raises:
        StudyError: It has mistakes; all are named.
    """
    written, document = document, override(document, settings)
    file = check_document(document, shown)
    dropped = _left_over(written, file, shown) if settings else []
    if dropped:
        document = _without(document, dropped)
        file = check_document(document, shown)
    cells = expand(file, shown)
    if mini:
        file, name = shrink(file), f"{name}-mini"
        document = file.model_dump(exclude_unset=True)
        cells = expand(file, shown)
    words = tuple(f"[[{table}]] no. {index + 1}" for table, index in dropped)
    return Study(name, json.loads(json.dumps(document)), file, cells, words)


def _left_over(written: Mapping[str, Any], file: StudyFile, shown: str) -> list[tuple[str, int]]:
    """Figures and expected values with cells in the file as it was written, and with none now."""
    missing = find_unmatched(file, list_cells(file, shown))
    if not missing:
        return []
    try:
        before = check_document(written, shown)
        slips = find_unmatched(before, list_cells(before, shown))
    except StudyError:  # a file that is whole with --set only: nothing to compare with
        return []
    same = [table for table in FILTERED if getattr(before, table) == getattr(file, table)]
    wrong = {(table, index) for table, index, _ in slips}
    places = [(table, index) for table, index, _ in missing if table in same]
    return [place for place in places if place not in wrong]


def _without(document: Mapping[str, Any], dropped: Sequence[tuple[str, int]]) -> dict[str, Any]:
    gone = set(dropped)
    kept = {
        table: [item for index, item in enumerate(document[table]) if (table, index) not in gone]
        for table in {table for table, _ in dropped}
    }
    return {**document, **kept}


def _read_plan(path: Path, settings: Sequence[str], mini: bool) -> Study:
    """The study of a plan; its hash says whether it is what was written."""
    if settings or mini:
        raise UsageError(f"{path} is a plan and is not changed by --set or --mini")
    plan = from_json(_read(path), path)
    name, document = plan.get("name"), plan.get("study")
    if plan.get("schema") != SCHEMA or not isinstance(name, str) or not isinstance(document, dict):
        raise UsageError(f"{path} is not a plan of this resdiag")
    check_name(name, path)
    digest = hash_json(document, before=f"{name}\n")
    if digest != plan.get("digest"):  # as it was written, in the words of then
        raise UsageError(f"{path} was altered", "pass the study file: it writes a new plan")
    return build_study(name, from_stored(document), (), False, str(path))


def check_name(name: str, path: Path) -> None:
    """Refuse an invalid study name in a file: folders are named after it.

    Raises:
        UsageError: It is none.
    """
    if not _NAME.fullmatch(name.removesuffix("-mini")):
        raise UsageError(f"{path} names no study")


__all__ = ["Study", "StudyError", "build_study", "check_name", "load_study"]
