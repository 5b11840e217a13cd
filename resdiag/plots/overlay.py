"""Theory on top of a measurement: the prediction for a run's network, on its own input."""

import numpy as np

from resdiag.plots.view import Floats, Record
from resdiag.theory.prediction import Prediction, predict_run


def predicted(record: Record, metric: str) -> Floats | None:
    """The prediction of `metric` at initialisation by block, or None where there is none.

    Only E[H] and E[H^2] behind the stem are taken from the run, at its first step. The gradient at
    the outputs is predicted up to its level, which is the measured one at the last block.
    """
    theory = prediction(record)
    if theory is None or len(theory.second_moment) != record.n_blocks:
        return None
    if metric == "grad_output":
        level = record.grid(metric)[-1, 0]
        growth = np.append(theory.grad_growth[1:], 1.0)
        back = np.exp(np.cumsum(np.log(growth)[::-1])[::-1] / 2)
        values = level * back
        return values if np.isfinite(values).all() else None
    return theory.series(metric)


def prediction(record: Record) -> Prediction | None:
    """The prediction for a run's network; None where theory has nothing, or the run not step 0."""
    if record.steps[0] != 0:
        return None
    s0, m0 = (float(record.grid(f"input_{name}")[0, 0]) for name in ("second_moment", "mean"))
    return predict_run(record.run.config, record.run.blocks, s0=s0, m0=m0)
