"""Studies with made-up results, for tests of what is reported."""

from dataclasses import replace

import synthetic_runs

from resdiag.report.collect import columns_of, thin
from resdiag.report.outcomes import measure
from resdiag.report.results import CellResult, Results
from resdiag.study.document import read_document
from resdiag.study.spec import OUTCOMES
from resdiag.study.study import build_study

ENVIRONMENT = {
    "python": "3.11.7", "platform": "Linux", "resdiag": "0.1.0", "torch": "2.15.0", "device": "cpu",
    "device_name": "a processor", "dtype": "float32", "threads": 1, "git": None,
}  # fmt: skip

GRID = """
question = "Do deeper networks explode?"
expects = "elu_pre does"
source = "nobody"
seeds = [0, 1]
[fixed]
data = "digits"
[grid]
variant = ["elu", "elu_pre"]
depth = [20, 56]
[[figure]]
plot = "gradnorms"
title = "Gradient"
[[figure]]
plot = "curves"
[[expected]]
cells = { variant = "elu_pre", depth = 56 }
measure = "status"
value = "diverged"
source = "someone"
[[expected]]
cells = { variant = "elu" }
measure = "test_error"
value = 0.5
tolerance = 0.2
source = "someone"
[[expected]]
cells = { variant = "elu", depth = 20 }
measure = "output_second_moment"
step = 0
block = -1
value = 5.4
factor = 3
source = "theory"
"""


def make_study(text=GRID, *sets, name="made"):
    return build_study(name, read_document(text, "made.toml"), sets, False, "made.toml")


def make_results(study=None, *, broken=None, missing=(), failed=(), data=None, steps=12):
    """Results of a study: `broken(request)` says which cells diverge, and at which step."""
    study = study or make_study()
    broken = broken or (lambda request: 4 if request.variant == "elu_pre" else None)
    cells = []
    for number, cell in enumerate(study.cells):
        if number in missing or number in failed:
            state, why = ("failed", "SIGSEGV") if number in failed else ("missing", "")
            cells.append(CellResult(cell=cell, state=state, message=why, outcomes={}))
        else:
            cells.append(_made(study, cell, broken(cell.request), data, steps))
    return Results(study=study, cells=cells, source="runs/made")


def make_run(request, explode=None, data=None):
    """A run of a cell; its verdict is a word and a sentence."""
    run = synthetic_runs.make_run(
        request.variant, request.depth, seed=request.seed, lr=request.lr or 0.1, explode=explode
    )
    name = "exploded" if explode is not None else "healthy"
    verdict = {"name": name, "step": explode, "block": 0, "summary": "A sentence.", "why": "Why."}
    about = {"name": data or request.data, "classes": 10, "train": 1437, "sha256": "0" * 64}
    return replace(run, environment=ENVIRONMENT, data=about, written_verdict=verdict)


def _made(study, cell, explode, data, steps):
    run = make_run(cell.request, explode, data)
    expected = [item for item in study.file.expected if cell.matches(item.cells.given)]
    metrics = {item.measure for item in expected if item.measure not in OUTCOMES}
    columns = columns_of({figure.plot for figure in study.file.figure}, metrics)
    wanted = {item.step for item in expected if item.step is not None}
    small, size = thin(run, steps=steps, wanted=wanted, columns=columns)
    outcomes = measure(run, expected)
    return CellResult(cell=cell, state=run.status, run=small, outcomes=outcomes, thinned=size)
