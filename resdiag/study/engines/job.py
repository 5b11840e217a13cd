"""What every engine is given: the cells that are missing, and where they belong."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resdiag.study.failure import LOG, name_signal, read_failure, write_failure
from resdiag.study.progress import PROGRESS
from resdiag.study.study import Study
from resdiag.study.work import Task


@dataclass(frozen=True, kw_only=True)
class Job:
    """A study's missing cells, and how to start them.

    Attributes:
        study: What is run.
        plan: Path of its plan, which every machine must see.
        cells: Ids of the cells to bring to their end.
        runs: Folder that holds the study's folder.
        data_root: Folder of downloaded data sets; "" for the default places.
        device: auto, cpu, cuda or cuda:N.
        allow_drift: Continue in a changed environment.
        say: Told one line now and then.
        look: Called about once a second while cells run.
    """

    study: Study
    plan: Path
    cells: tuple[str, ...]
    runs: Path
    data_root: str = ""
    device: str = "auto"
    allow_drift: bool = False
    say: Callable[[str], None]
    look: Callable[[], None] = lambda: None

    def folder(self, cell: str) -> Path:
        """A cell's folder."""
        return self.study.folder(self.runs) / cell

    def task(self, cell: str) -> dict[str, Any]:
        """A cell's `Task` as plain data."""
        return asdict(
            Task(
                study=str(self.plan.absolute()),
                cell=cell,
                runs=str(self.runs.absolute()),
                data_root=self.data_root and str(Path(self.data_root).absolute()),
                device=self.device,
                allow_drift=self.allow_drift,
            )
        )

    def sign_of_life(self, cell: str) -> tuple[int, ...]:
        """Something that changes while a cell gets on."""
        times = []
        for name in (PROGRESS, LOG):
            try:
                times.append((self.folder(cell) / name).stat().st_mtime_ns)
            except OSError:
                times.append(0)
        return tuple(times)

    def give_up(self, cell: str, code: int, hung: bool = False) -> None:
        """Note that a cell failed, unless it has said so itself.

        Args:
            cell: Its id.
            code: Exit code of its process, negative for a signal.
            hung: Whether it was killed because it did not get on.
        """
        self.say(f"{cell}: failed; see {self.folder(cell) / LOG}")
        patience = self.study.file.resources.patience_s
        if code > 0:
            if read_failure(self.folder(cell)) is None:
                words = f"ended with exit code {code} and gave no reason"
                write_failure(self.folder(cell), "error", words, f"see {LOG} in its folder")
        elif hung:
            words = f"no progress for {patience:g} s, and killed for it"
            write_failure(self.folder(cell), "hung", words, "resources.patience_s is the limit")
        else:
            kill = " (out of memory?)" if code == -9 else ""
            words = f"killed by {name_signal(-code)}{kill}"
            write_failure(self.folder(cell), "signal", words)
