"""What a kind of plot is: the Protocol that each module of a plot obeys."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import View


class Draw(Protocol):
    """The function of a kind of plot.

    It draws one run or several, of one depth or several, with one block or many; a value that is
    not finite is drawn as such, and missing ones are left out. `resdiag.plots.canvas` has what the
    built-in kinds are drawn with; `canvas.open_sheet` puts title, caption and reasons around them.
    """

    def __call__(self, view: "View", /) -> "Figure":
        """Draw the runs of `view`; matplotlib may be imported here, not before."""
        ...


@dataclass(frozen=True, kw_only=True)
class PlotKind:
    """One kind of plot: its words, what it needs, and the function that draws it.

    Attributes:
        name: Word of the command line.
        title: What is shown, as a heading.
        question: The question that it answers.
        reading: How to read it; printed under every figure.
        needs: Ids of the metrics drawn (catalogue) or columns of the curve.
        draw: Draws the figure.
        axis: What the x axis shows: blocks; steps (the data are columns of the curve); or runs,
            one row each.
        theory_from: Which measured values its prediction starts from; "" without a prediction.
        first_step_only: Whether it shows the first step only: runs that differ later share a line.
        compares: Whether it needs several runs; the report of a single run omits it.
    """

    name: str
    title: str
    question: str
    reading: str
    needs: tuple[str, ...]
    draw: Draw
    axis: Literal["block", "step", "runs"] = "block"
    theory_from: str = ""
    first_step_only: bool = False
    compares: bool = False
