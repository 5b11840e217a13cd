"""What the kinds of plots are drawn with, in one place.

Import it where a figure is drawn: it costs numpy, pandas and matplotlib.
"""

from matplotlib.lines import Line2D as Line2D
from matplotlib.patches import Rectangle as Rectangle

from resdiag.diagnose.nonfinite import find_first_nonfinite as find_first_nonfinite
from resdiag.models.variants import variant_words as variant_words
from resdiag.plots.blockaxis import finish_blocks as finish_blocks
from resdiag.plots.blockaxis import share_blocks as share_blocks
from resdiag.plots.heat import draw_heat as draw_heat
from resdiag.plots.lines import clipped_words as clipped_words
from resdiag.plots.lines import draw_line as draw_line
from resdiag.plots.lines import guide as guide
from resdiag.plots.lines import head_panel as head_panel
from resdiag.plots.lines import note_panel as note_panel
from resdiag.plots.lines import trace_blocks as trace_blocks
from resdiag.plots.lines import trace_theory as trace_theory
from resdiag.plots.overtime import curve_points as curve_points
from resdiag.plots.overtime import finish_steps as finish_steps
from resdiag.plots.overtime import first_breakdown as first_breakdown
from resdiag.plots.overtime import mark_breakdown as mark_breakdown
from resdiag.plots.overtime import trace_block_steps as trace_block_steps
from resdiag.plots.overtime import trace_steps as trace_steps
from resdiag.plots.scale import finish_scale as finish_scale
from resdiag.plots.scale import huge as huge
from resdiag.plots.scale import plotted as plotted
from resdiag.plots.scale import reach as reach
from resdiag.plots.scale import share_scale as share_scale
from resdiag.plots.scale import whole_ticks as whole_ticks
from resdiag.plots.sheet import legend as legend
from resdiag.plots.sheet import open_sheet as open_sheet
from resdiag.plots.sheet import subject as subject
from resdiag.plots.style import ALARM as ALARM
from resdiag.plots.style import GREY as GREY
from resdiag.plots.style import NONFINITE as NONFINITE
from resdiag.plots.style import ONE_RUN as ONE_RUN
from resdiag.plots.style import Look as Look
from resdiag.plots.style import ink as ink
from resdiag.plots.style import variant_looks as variant_looks
from resdiag.plots.telling import Panel as Panel
from resdiag.plots.telling import choose_panels as choose_panels
from resdiag.plots.telling import refuse as refuse
from resdiag.plots.view import Record as Record
from resdiag.plots.view import moment_words as moment_words
from resdiag.plots.wording import change_words as change_words
from resdiag.plots.wording import size_words as size_words
from resdiag.plots.wording import times_words as times_words
