"""What every study engine must do: inherit `EngineConformance` and set its attributes.

class TestMyEngine(EngineConformance):
    engine = MY_ENGINE
    options = {"workers": 2}
"""

import json
import os
from typing import Any, ClassVar

import pytest
from once import once
from study_runs import HERE, digests, run_local
from studyfiles import TINY, write_study

from resdiag.errors import UsageError
from resdiag.study.engines.engine import (
    ENGINES,
    Engine,
    find_engine,
    register_engine,
)
from resdiag.study.engines.job import Job
from resdiag.study.ledger import read_ledger
from resdiag.study.study import load_study

FAILING = '[[include]]\nvariant = "plain"\ndepth = 8\ndata = "folder:nowhere"\n'
STUDY = TINY.replace("seeds = [0, 1]", "seeds = [0]").replace("[grid]", FAILING + "[grid]")


def digests_alone(tmp_path_factory):
    """What the cells of the study compute under the local engine, run once for all engines."""

    def make(folder):
        found = digests(run_local(folder, STUDY)[0])
        (folder / "digests.json").write_text(json.dumps(found))

    return json.loads((once(tmp_path_factory, "conformance", make) / "digests.json").read_text())


class EngineConformance:
    """Tests of one row of the table of engines.

    Attributes:
        engine: The row.
        options: Values of its own options, where the defaults will not do.
    """

    engine: Engine
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch):
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        with ENGINES.added(self.engine):
            yield

    def test_its_options_are_its_own(self):
        name = self.engine.name
        found, values = find_engine(name, None, self.options)
        assert found is self.engine
        assert values == {o.name: o.default for o in self.engine.options} | self.options
        with pytest.raises(ValueError, match=f"engine '{name}' exists already"):
            register_engine(self.engine)
        other = "slurm" if name == "local" else "local"
        for option in self.engine.options:
            changed = {option.name: f"{option.default}1" if option.default == "" else 99}
            with pytest.raises(UsageError, match=f"{option.written} is for the {name} engine"):
                find_engine(other, None, changed)

    def test_each_cell_ends_once_as_under_the_local_engine_and_a_failing_one_fails_alone(
        self, tmp_path, tmp_path_factory
    ):
        study = load_study(str(write_study(tmp_path, STUDY)))
        runs, looks = tmp_path / "runs", []
        job = Job(
            study=study,
            plan=study.write_plan(runs),
            cells=tuple(cell.id for cell in study.cells),
            runs=runs,
            device="cpu",
            say=lambda line: None,
            look=lambda: looks.append(1),
            slots=2,
        )
        assert self.engine.run(job, **find_engine(self.engine.name, None, self.options)[1]) == 0
        assert looks
        entries = read_ledger(study, runs)
        assert sorted(entry.state for entry in entries) == ["done", "done", "failed"]
        (failed,) = (entry for entry in entries if entry.state == "failed")
        assert "nowhere" in failed.message
        assert not list(runs.glob("**/lock-*"))
        assert digests(job) == digests_alone(tmp_path_factory)
        for entry in entries:
            log = (entry.folder / "log.txt").read_text()
            assert log.count(f"{entry.id}: done after") == (entry.state == "done")
