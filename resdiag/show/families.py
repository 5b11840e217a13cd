"""The function that draws each kind of plot."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from matplotlib.figure import Figure

from resdiag.show.biasshift import draw_biasshift
from resdiag.show.curves import draw_curves
from resdiag.show.gradnorms import draw_gradnorms
from resdiag.show.growth import draw_growth
from resdiag.show.offender import draw_offender
from resdiag.show.signal import draw_signal
from resdiag.show.skip import draw_skip
from resdiag.show.updates import draw_updates
from resdiag.show.view import View

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
"""One function per row of `resdiag.show.kinds.KINDS`."""
