"""What every kind of plot must do: inherit `PlotConformance` to test one of your own."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_runs import make_run

from resdiag.catalog.custom import known_metrics
from resdiag.plots.drawing import draw
from resdiag.plots.figurefile import render
from resdiag.plots.kinds import KINDS

NONFINITE = "non-finite"
FEW = (0, 1, 4, 9)


def wild(frame):
    """Every recorded metric over the whole range of float32, with zeros, inf and NaN."""
    values = np.array([1e-38, 0, 1e30, np.inf, 3e38, np.nan, -np.inf, 1e-8], dtype=np.float32)
    columns = [c for c in frame if c not in ("step", "block") and not c.endswith("_nonfinite")]
    return frame.assign(
        **{c: np.roll(np.resize(values, len(frame)), i) for i, c in enumerate(columns)}
    )


def emptied(frame):
    return frame.assign(**{c: np.float32(np.nan) for c in frame if c not in ("step", "block")})


def flat(frame):
    columns = [c for c in frame if c not in ("step", "block") and not c.endswith("_nonfinite")]
    return frame.assign(**dict.fromkeys(columns, np.float32(1)))


def first_block(frame):
    return frame[frame["block"] == 0].reset_index(drop=True)


def one_block(run):
    """A network of one residual block."""
    return replace(run, blocks=run.blocks[:1])


CASES = {
    "exploding": lambda: [make_run("elu_pre", 56, explode=2)],
    "dead at the first step": lambda: [make_run("elu_nobn", 20, explode=0)],
    "one step": lambda: [make_run("elu_after", 20, steps=(0,))],
    "variants and seeds": lambda: [
        make_run(v, 20, seed=s, steps=FEW)
        for v, s in (("original", 0), ("elu_after", 0), ("elu", 0), ("elu", 1))
    ],
    "depths and a dead one": lambda: [
        make_run("elu_pre", 20, steps=FEW),
        make_run("elu_pre", 56, explode=1),
    ],
    "any range": lambda: [make_run("original", 20, steps=FEW, metrics=wild)],
    "nothing but NaN": lambda: [make_run("original", 20, steps=(0, 1), metrics=emptied)],
    "one block": lambda: [one_block(make_run("elu", 8, steps=FEW, metrics=first_block))],
    "constant": lambda: [make_run("original", 20, steps=(0, 1), metrics=flat)],
}


def lines(figure, label=None):
    return [
        line
        for axes in figure_axes(figure)
        for line in axes.lines
        if label is None or line.get_label() == label
    ]


def figure_axes(figure):
    return [axes for part in figure.subfigs for axes in part.axes]


def panel(figure, title):
    return next(a for a in figure_axes(figure) if a.get_title(loc="left").startswith(title))


def words(figure):
    """All text of a figure."""
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def shown_text(figure):
    """Every text but the labels of ticks, of which matplotlib keeps some outside the axis."""
    parts = [t for part in figure.subfigs for t in part.texts]
    parts += [t for part in figure.subfigs for box in part.legends for t in box.texts]
    for axes in figure_axes(figure):
        parts += [axes.xaxis.label, axes.yaxis.label, *axes.texts, axes._left_title]
    return [text for text in parts if text.get_text().strip()]


def legend_labels(figure):
    return [t.get_text() for part in figure.subfigs for box in part.legends for t in box.texts]


class PlotConformance:
    """Tests of one kind of plot.

    A subclass has a fixture `kind` that returns its `PlotKind`; it is registered for the test where
    it is not built in.
    """

    @pytest.fixture
    def kind(self):
        raise NotImplementedError("a fixture that returns a PlotKind")

    @pytest.fixture
    def name(self, kind):
        with KINDS.added(kind):
            yield kind.name

    def test_its_words_are_there(self, kind):
        assert re.fullmatch("[a-z][a-z0-9_]*", kind.name)
        assert kind.title[0].isupper()
        assert kind.question.endswith("?")
        assert kind.reading.endswith(".")
        assert kind.axis in ("block", "step", "runs")

    def test_every_need_is_a_known_metric_or_a_column_of_the_curve(self, kind):
        curve = set(make_run("elu", 8, steps=FEW).curve().columns)
        assert set(kind.needs) <= set(known_metrics()) | curve

    @pytest.mark.parametrize("case", CASES)
    def test_it_draws_every_case_legibly_and_without_a_warning(self, name, case):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = draw(name, CASES[case]())
            figure.draw_without_rendering()
        assert isinstance(figure, Figure)
        assert figure.get_figwidth() == 7
        text = words(figure)
        assert "Read:" in text
        assert "digits" in text
        assert "local" in text
        assert min(t.get_fontsize() for t in shown_text(figure)) >= 7
        page = figure.bbox.padded(1)
        for shown in shown_text(figure):
            box = shown.get_window_extent()
            assert page.containsx(box.x0), shown
            assert page.containsx(box.x1), shown
            assert page.containsy(box.y0), shown
            assert page.containsy(box.y1), shown

    def test_the_same_runs_give_the_same_bytes(self, name):
        first, second = (
            render(draw(name, [make_run("elu_pre", 20, explode=2)]), "svg") for _ in range(2)
        )
        assert first == second
        assert b"<dc:date>" not in first

    def test_a_healthy_run_has_no_mark_of_an_explosion(self, name):
        figure = draw(name, [make_run("elu", 20, steps=FEW)])
        assert not lines(figure, NONFINITE)
        assert NONFINITE not in legend_labels(figure)
