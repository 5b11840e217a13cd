"""Which recorded runs, or which study, a command means."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.cli.output import say
from resdiag.errors import UsageError
from resdiag.runs.folder import Run, find_runs, is_run_folder, latest_run, read_run

if TYPE_CHECKING:
    from resdiag.study.study import Study

_FEW = 5


def open_runs(paths: Sequence[Path] | None, root: Path) -> list[Run]:
    """The runs named, or the latest."""
    found = {path: find_runs(path) for path in paths or [root]}
    for path, folders in found.items():
        if not folders:
            raise _no_run(path)
    if not paths:
        return [read_run(latest_run(root))]
    return [read_run(run) for run in dict.fromkeys(chain(*found.values()))]


def open_runs_or_logs(paths: Sequence[Path] | None, root: Path, log_format: str) -> list[Run]:
    """The runs named, or the latest; what is no run is read as a log of another tool."""
    if not paths:
        return open_runs(paths, root)
    from resdiag.trackers.logs.formats import load_log

    opened: list[Run] = []
    for path in dict.fromkeys(paths):
        is_log = (
            log_format
            or path.is_file()
            or (path.is_dir() and not find_runs(path) and not is_run_folder(path))
        )
        opened += [load_log(path, log_format)] if is_log else open_runs([path], root)
    return opened


def open_study(where: str, settings: Sequence[str] | None, mini: bool) -> "Study":
    """The study, with a word on what of it `--set` left without a cell."""
    from resdiag.study.study import load_study

    study = load_study(where, settings or (), mini=mini)
    if study.dropped:
        more = ", ..." if len(study.dropped) > _FEW else ""
        some = f"{', '.join(study.dropped[:_FEW])}{more}"
        say(
            f"dropped, because --set leaves no cell of theirs: {some} ({len(study.dropped)} in all)"
        )
    return study


def _no_run(path: Path) -> UsageError:
    what = "no run at" if path.exists() else "no such folder:"
    return UsageError(f"{what} {path}", "resdiag run --variant elu_pre --depth 20 makes one")
