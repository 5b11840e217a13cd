"""The function that draws each kind of plot."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from matplotlib.figure import Figure

from resdiag.plots.biasshift import draw_biasshift
from resdiag.plots.curves import draw_curves
from resdiag.plots.gradnorms import draw_gradnorms
from resdiag.plots.growth import draw_growth
from resdiag.plots.offender import draw_offender
from resdiag.plots.signal import draw_signal
from resdiag.plots.skip import draw_skip
from resdiag.plots.updates import draw_updates
from resdiag.plots.view import View

FAMILIES: Mapping[str, Callable[[View], Figure]] = MappingProxyType(
    {
        "gradnorms": draw_gradnorms,
        "biasshift": draw_biasshift,
        "skip": draw_skip,
        "signal": draw_signal,
        "growth": draw_growth,
        "curves": draw_curves,
        "updates": draw_updates,
        "offender": draw_offender,
    }
)
"""One function per row of `resdiag.plots.kinds.KINDS`."""
