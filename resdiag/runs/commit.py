"""A commit: which files, with which content, make up a run at one step."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError
from resdiag.runs.files import Damaged, list_folder, read_file, seal, unseal

SCHEMA = 1
COMMIT, PREVIOUS = "COMMIT.json", "COMMIT.prev.json"
RUN, BLOCKS, VERDICT = "run.json", "blocks.json", "verdict.json"
TABLES = ("metrics", "curve")
STATUSES = ("running", "done", "diverged", "stopped")

# Only such names are ever read or removed, whatever a COMMIT.json says.
_FILE_NAMES = re.compile(
    r"(run|blocks|verdict|state-\d{8,20})\.json|ckpt-\d{8,20}\.safetensors"
    r"|(metrics|curve)/part-\d{8,20}\.parquet"
)
_TEMPORARY = re.compile(r"((metrics|curve)/)?\.[\w.-]+\.(json|parquet|safetensors)\.tmp")


def part_name(table: str, step: int) -> str:
    """Name of the segment of a table whose last row is at `step`; names sort as steps do."""
    return f"{table}/part-{step:08d}.parquet"


def tensors_name(step: int) -> str:
    """Name of the file with a checkpoint's tensors."""
    return f"ckpt-{step:08d}.safetensors"


def state_name(step: int) -> str:
    """Name of the file with the rest of a checkpoint's state."""
    return f"state-{step:08d}.json"


@dataclass(frozen=True)
class Commit:
    """One row of a run's history, as COMMIT.json holds it.

    Attributes:
        step: Optimizer steps that are kept.
        status: One of STATUSES.
        files: SHA-256 by name relative to the folder. A named file is never written again.
        drift: Changes of environment at a resume: step, differences, environment.
    """

    step: int
    status: str
    files: Mapping[str, str]
    drift: tuple[dict[str, Any], ...] = ()

    def to_bytes(self) -> bytes:
        """Content of COMMIT.json."""
        return seal({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "Commit":
        """Read COMMIT.json or COMMIT.prev.json.

        Raises:
            Damaged: It is missing, altered, or names files that are not a run's.
            UsageError: Another version of resdiag wrote it.
        """
        document = unseal(read_file(path), path)
        if document.get("schema") != SCHEMA:
            schema = reprlib.repr(document.get("schema"))
            raise UsageError(f"{path} has schema {schema}; this resdiag reads {SCHEMA}")
        match document:
            case {"step": int(step), "status": str(status), "files": dict(files), "drift": drift}:
                commit = cls(step, status, files, _drift(drift, path))
            case _:
                raise Damaged(f"{path} is damaged: a key is missing")
        unknown = [name for name in files if not _FILE_NAMES.fullmatch(name)]
        hashes = all(isinstance(sha256, str) for sha256 in files.values())
        if unknown or not hashes or RUN not in files or status not in STATUSES or step < 0:
            raise Damaged(f"{path} is damaged: not a commit of a run")
        return commit

    def verify(self, folder: Path) -> None:
        """Check the content of every named file.

        Raises:
            Damaged: One is missing or altered; the message names it.
        """
        for name in self.files:
            self.read_file(folder, name)

    def read_file(self, folder: Path, name: str) -> bytes:
        """The content of a named file.

        Raises:
            Damaged: It is not named, missing or altered.
        """
        if name not in self.files:
            raise Damaged(f"{folder / COMMIT} is damaged: it does not name {name}")
        return read_file(folder / name, self.files[name])

    def parts(self, table: str) -> list[str]:
        """Names of a table's segments in the order of their steps."""
        return sorted(
            (name for name in self.files if name.startswith(f"{table}/")),
            key=lambda name: (len(name), name),
        )

    def kept_files(self) -> dict[str, str]:
        """The files that the next commit keeps: all but checkpoint and verdict."""
        replaced = (tensors_name(self.step), state_name(self.step), VERDICT)
        return {name: sha256 for name, sha256 in self.files.items() if name not in replaced}

    def without_verdict(self) -> "Commit":
        """The same commit as a point to continue from."""
        files = {name: sha256 for name, sha256 in self.files.items() if name != VERDICT}
        return replace(self, status="running", files=files)


def _drift(value: object, path: Path) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("environment"), dict) for item in value
    ):
        raise Damaged(f"{path} is damaged: drift is not a list of environments")
    return tuple(value)


def our_files(folder: Path) -> list[str]:
    """Names of the data files and temporary files in a run's folder; no commits, no locks."""
    names = list_folder(folder)
    for table in TABLES:
        names += [f"{table}/{name}" for name in list_folder(folder / table)]
    return [name for name in names if _FILE_NAMES.fullmatch(name) or _TEMPORARY.fullmatch(name)]
