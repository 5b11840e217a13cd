"""What draws, imported when something of it is used first.

matplotlib, seaborn, pandas and numpy take a second or two to import. Every command of the terminal
looks up the kinds of plots by their rows, and few draw one; so the modules of the kinds take these
names from here.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["canvas", "np", "pd", "sns"]


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401 - whatever the module has
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import seaborn as sns

    from resdiag.plots import canvas
else:
    np, pd, sns = map(_Lazy, ("numpy", "pandas", "seaborn"))
    canvas = _Lazy("resdiag.plots.canvas")
