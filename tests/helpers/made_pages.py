"""Reports of made-up results, as HTML: of a study, and of a run that explodes."""

from dataclasses import replace
from functools import cache

import synthetic_runs
from made_studies import make_results

from resdiag.report.figures import draw_figures, draw_runs
from resdiag.report.render import to_html
from resdiag.report.runpage import write_run_page
from resdiag.report.sections import write_page


@cache
def study_html():
    """A study with a missing cell and a failed one."""
    results = make_results(missing=(1,), failed=(2,))
    page = write_page(results, list(draw_figures(results)))
    return to_html(replace(page, made="Made now."))


@cache
def run_html():
    """A run that explodes at step 4, with two figures and a heat map."""
    one = synthetic_runs.make_run("elu_pre", 20, explode=4)
    page = write_run_page([one], list(draw_runs(["curves", "signal"], [one])))
    return to_html(replace(page, made="Made now."))
