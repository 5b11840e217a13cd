"""What every engine is given: the cells that are missing, and where they belong."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import resdiag
from resdiag.study.failure import LOG
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

    def log(self, cell: str) -> str:
        """The file for what a cell prints, absolute."""
        return str((self.folder(cell) / LOG).absolute())

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

    def environment(self) -> dict[str, str]:
        """What a cell's process needs to find this very resdiag, and to use as many threads."""
        package = str(Path(resdiag.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(self.study.file.resources.threads)
        return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}

    def sign_of_life(self, cell: str) -> tuple[int, ...]:
        """Something that changes while a cell gets on."""
        times = []
        for name in (PROGRESS, LOG):
            try:
                times.append((self.folder(cell) / name).stat().st_mtime_ns)
            except OSError:
                times.append(0)
        return tuple(times)
