"""The studies that come with resdiag, and the template of a new one."""

from collections.abc import Mapping
from pathlib import Path

import resdiag
from resdiag.errors import unknown

_PACKAGE = Path(resdiag.__file__).parent


def shipped_studies() -> Mapping[str, Path]:
    """The shipped study files by name: the checkout's, or those that the wheel carries."""
    for folder in (_PACKAGE / "study" / "shipped", _PACKAGE.parent / "studies"):
        found = {path.stem: path for path in sorted(folder.glob("*.toml"))}
        if found:
            return found
    return {}


def find_study(name: str) -> Path:
    """The file of a shipped study.

    Raises:
        UsageError: No shipped study has this name.
    """
    known = shipped_studies()
    if name not in known:
        raise unknown("study", name, [*known, "or a path: FILE.toml"])
    return known[name]


TEMPLATE = """\
# A study is one question and a grid of runs. `resdiag study run {name}` trains the missing cells;
# `resdiag study run {name} --dry-run` only lists them, with time and disk space.

question = "Does the gradient reach the first block, whatever the depth?"
expects = "elu keeps it; elu_pre explodes with depth"
source = "reference for the question or the claim"
cost = "time and machine, to be filled in after the first run"
seeds = [0, 1]                    # each point of the grid is run with every seed

[fixed]                           # the same in every cell; options of `resdiag run`
data = "digits"                   # `resdiag data list` lists the data sets
recipe = "short"                  # short: the first 60 steps; paper: 164 epochs
steps = 30
batch_size = 32

[grid]                            # the product of these lists
variant = ["elu", "elu_pre"]      # `resdiag variants` lists them
depth = [8, 20]

# [[include]]                     # more cells; values or lists, which override [fixed]
# variant = "original"
# depth = 20
# lr = 0.01
# seed = 0

# [[exclude]]                     # cells of the grid to exclude
# variant = "elu_pre"
# depth = 20

[resources]                       # per cell
threads = 1                       # another number changes the bits of the results
gpus = 1.0                        # 0.25: four cells share one GPU
patience_s = 900                  # after this time without progress, a cell counts as hung
restarts = 2                      # restarts without progress before a cell is failed

[[figure]]                        # figures of the report; `resdiag plot --list` has the kinds
plot = "gradnorms"
title = "Gradient by block"

# [[expected]]                    # published values to compare with
# cells = {{ variant = "elu", depth = 20 }}
# measure = "test_error"          # status, verdict, best_test_error, ... or a metric's id
# value = 0.08
# tolerance = 0.01
# source = "Table 1 of ..."
"""
