"""What figures say: titles that are findings, axes that can be read, symbols that are explained."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from plot_conformance import FEW, NONFINITE, figure_axes, legend_labels, panel, words
from synthetic_runs import make_run

import resdiag
from resdiag.errors import UsageError
from resdiag.plots.drawing import draw
from resdiag.plots.figurefile import render
from resdiag.plots.findings import extremes, geometric_mean
from resdiag.plots.kinds import KINDS
from resdiag.plots.scale import finish_scale, number_label
from resdiag.plots.style import BEYOND, look

SINGLE = [name for name in KINDS if name != "depth"]


def broken_late(step=9, value=1e30):
    """Finite in every block up to `step`; there half of the blocks are huge, and half NaN."""

    def change(frame):
        late = frame["step"] >= step
        columns = [c for c in frame if c not in ("step", "block") and not c.endswith("nonfinite")]
        new = frame.copy()
        new.loc[late & (frame["block"] < 4), columns] = np.float32(value)
        new.loc[late & (frame["block"] >= 4), columns] = np.nan
        new.loc[late & (frame["block"] >= 4), ["output_nonfinite", "grad_nonfinite"]] = 1
        return new

    return make_run("original", 20, steps=FEW, metrics=change)


@pytest.mark.parametrize(
    ("kind", "title", "metric"),
    [
        ("signal", "output: mean square", "output_second_moment"),
        ("gradnorms", "of the parameters", "grad_param"),
        ("growth", "forward growth", "forward_growth"),
        ("biasshift", "output: bias shift", "output_bias"),
    ],
)
def test_the_axis_follows_the_steps_that_are_finite_everywhere(kind, title, metric):
    run = broken_late()
    figure = draw(kind, [run])
    axes = panel(figure, title)
    frame = run.metrics()
    finite = frame[frame["step"] < 9][metric].to_numpy(dtype=np.float64)
    low, high = axes.get_ylim()
    known = finite[np.isfinite(finite) & (finite > 0)]
    assert high < 100 * known.max()
    assert high > known[frame[frame["step"] < 9]["step"].to_numpy()[: len(known)] == 0].max()
    assert low < known.max()
    assert NONFINITE in legend_labels(figure)


def test_what_lies_beyond_the_axis_is_marked_on_its_edge_and_named():
    figure = draw("signal", [broken_late()])
    axes = panel(figure, "output: mean square")
    mark = next(line for line in axes.lines if line.get_label() == BEYOND)
    np.testing.assert_array_equal(mark.get_xdata(), [0, 1, 2, 3])
    assert BEYOND in legend_labels(figure)
    assert BEYOND not in legend_labels(draw("signal", [make_run("original", 20, steps=FEW)]))


def test_the_colours_of_a_map_follow_the_finite_steps_too():
    axes = panel(draw("gradnorms", [broken_late()]), "gradient at the block's output")
    assert axes.collections[-1].norm.vmax < 1e6


def test_a_run_that_is_nowhere_finite_still_has_an_axis():
    figure = draw("signal", [make_run("elu_nobn", 20, explode=0)])
    assert np.isfinite([axes.get_ylim() for axes in figure_axes(figure)]).all()


def test_the_title_of_the_gradient_is_its_ratio():
    run = make_run("elu_pre", 56, steps=(0,))
    norms = run.metrics()["grad_output"].to_numpy(np.float64)
    title = draw("gradnorms", [run]).get_label()
    number = float(re.search(r"grow ([\d,.]+) times", title)[1].replace(",", ""))
    assert number == pytest.approx(norms[0] / norms[-1], rel=0.01)
    assert "on the way back to block 0" in title


@pytest.mark.parametrize(
    ("kind", "words"), [("signal", r"\(×([\d.]+)\)"), ("growth", r"×([\d.]+)")]
)
def test_titles_say_the_growth_of_the_signal_that_the_verdict_says(kind, words):
    run = make_run("elu_pre", 56, steps=(0,))
    title = draw(kind, [run]).get_label()
    factor = np.exp(np.log(run.metrics()["forward_growth"]).mean())
    assert float(re.search(words, title)[1]) == pytest.approx(factor, rel=0.01)
    assert f"grows {factor:.2f} times per block" in resdiag.judge(run).summary


def test_without_the_inputs_of_blocks_the_title_is_of_the_factors_within_the_stages():
    run = make_run(
        "elu_pre", 56, steps=(0,), metrics=lambda frame: frame.drop(columns="input_channel_std")
    )
    values = run.metrics()["output_second_moment"].to_numpy(np.float64).reshape(3, 9)
    factor = np.exp(np.log(values[:, 1:] / values[:, :-1]).mean())
    title = draw("signal", [run]).get_label()
    assert float(re.search(r"\(×([\d.]+)\)", title)[1]) == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("kind", SINGLE)
def test_no_title_of_a_run_is_the_name_of_its_kind(kind):
    figure = draw(kind, [make_run("original", 20, steps=FEW)])
    assert not figure.get_label().startswith(KINDS[kind].title)
    assert KINDS[kind].title in words(figure)
    assert figure.get_label().endswith("original, depth 20")


@pytest.mark.parametrize("kind", SINGLE)
def test_every_symbol_on_a_panel_is_explained_below_it(kind):
    figure = draw(kind, [make_run("original", 20, steps=FEW)])
    told = words(figure).partition("Symbols: ")[2]
    shown = " ".join(axes.get_ylabel() for axes in figure_axes(figure))
    for letter, pattern in (
        ("H", r"(?<![a-zA-Z])H(?![a-z])"), ("h", r"\|h|f\(h"), ("F", r"F\\"), ("u", r"u_k|u\\"),
        ("θ", "theta"), ("L", r"partial L"), ("c", "_c"),
    ):  # fmt: skip
        if re.search(pattern, shown):
            assert f"{letter}: " in told, (letter, shown)
    for name in ("P1", "P2", "P3", "P4", "B1", "B2"):
        titles = " ".join(axes.get_title(loc="left") for axes in figure_axes(figure))
        if name in titles:
            assert f"{name}: " in words(figure)


@pytest.mark.parametrize("kind", SINGLE)
def test_no_root_has_a_bar_and_no_tick_an_exponent_or_an_offset(kind):
    figure = draw(kind, [make_run("elu_pre", 56, explode=2)])
    assert "sqrt" not in words(figure)
    for axes in figure_axes(figure):
        assert not axes.yaxis.get_major_formatter().get_offset()
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert not [text for text in labels if re.search(r"\de[+-]?\d", text)]
        assert not [t for t in axes.get_yticklabels(minor=True) if t.get_text()]


def test_equal_values_are_not_magnified():
    with look():
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        axes.plot([0, 1], [5230500.0, 5230501.0])
        finish_scale(axes, log=False)
        low, high = axes.get_ylim()
    assert high - low > 0.05 * 5230500
    assert number_label(5230500.0) == r"$5.23\times10^{6}$"


def test_updates_have_numbers_on_their_axis():
    figure = draw("updates", [make_run("elu", 20, steps=FEW)])
    figure.draw_without_rendering()
    axes = panel(figure, "by block")
    low, high = axes.get_ylim()
    shown = [
        label.get_text()
        for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len([text for text in shown if text]) >= 2
    assert low <= 1e-3 / 3
    assert high >= 3e-3


def test_gradients_read_after_clipping_are_marked_on_the_panel():
    run = replace(make_run("elu", 20, steps=FEW), point="post_clip")
    assert panel(draw("curves", [run]), "gradient norm of all parameters, after clipping")
    assert panel(draw("gradnorms", [run]), "of the parameters, after clipping")
    assert "after clipping" not in words(draw("curves", [make_run("elu", 20, steps=FEW)]))


def test_bands_over_seeds_are_drawn_and_named_and_are_not_those_of_channels():
    runs = [make_run("original", 20, seed=seed, steps=FEW) for seed in range(3)]
    for kind in ("gradnorms", "skip", "signal", "updates", "biasshift"):
        figure = draw(kind, runs)
        banded = [a for a in figure_axes(figure) if a.collections]
        assert len(banded) == len(figure_axes(figure)), kind
        assert "Lines: median over the seeds" in words(figure)
    assert "quantiles" not in words(draw("biasshift", runs))


def test_a_run_its_folder_and_its_monitor_draw_the_same_figure(tmp_path):
    net = resdiag.build_model("elu", 8, seed=0)
    with resdiag.attach(net) as monitor:
        net(torch.ones(4, 3, 32, 32)).square().mean().backward()
        monitor.step()
    folder = resdiag.save(monitor, tmp_path / "mine")
    pictures = [
        render(resdiag.draw("signal", source), "svg")
        for source in (monitor, folder, str(folder), [resdiag.load_run(folder)])
    ]
    assert len(set(pictures)) == 1
    with pytest.raises(UsageError, match="nowhere"):
        resdiag.draw("signal", tmp_path / "nowhere")


def test_a_figure_shows_itself_in_a_notebook():
    figure = draw("updates", [make_run("elu", 20, steps=FEW)])
    assert figure._repr_png_() == render(figure, "png")


def test_words_of_no_finite_number():
    assert np.isnan(geometric_mean(np.array([np.nan, -1.0, 0.0])))
    assert extremes([("a", float("nan"))]) == []
    assert extremes([("a", 2.0), ("b", 1.0), ("c", 3.0)]) == [("c", 3.0), ("b", 1.0)]


def single_blocks(**columns):
    """A run whose stages have one block each, as a U-Net's: no ratio is within a stage."""

    def change(frame):
        return frame.assign(**{name: np.float32(value) for name, value in columns.items()})

    return make_run("elu", 8, steps=(0, 1), metrics=change)


def test_a_signal_of_stages_of_one_block_is_finite_and_told_from_end_to_end():
    run = single_blocks()
    values = run.metrics()["output_second_moment"].to_numpy(np.float64)
    assert "in each block" in draw("signal", [run]).get_label()
    frozen = run.metrics_frame.drop(columns="input_channel_std")  # without the inputs of blocks
    title = draw("signal", [replace(run, metrics_frame=frozen)]).get_label()
    assert "from the first block to the last" in title
    factor = float(re.search(r"\(×([\d.]+)\)", title)[1])
    assert factor == pytest.approx(values[2] / values[0], rel=0.01)
    growth = draw("growth", [run])
    assert growth.get_label().startswith("Each block scales the signal ×")
    assert len(figure_axes(growth)) == 2  # no means of one block each
    assert len(figure_axes(draw("growth", [make_run("elu", 20, steps=FEW)]))) == 4


@pytest.mark.parametrize(
    ("value", "words"), [(0, "is zero in every block"), (np.nan, "is not finite")]
)
def test_what_is_zero_and_what_is_not_finite_is_told_apart(value, words):
    title = draw("gradnorms", [single_blocks(grad_output=value)]).get_label()
    assert title.startswith(f"The gradient at the outputs {words}")


def test_titles_of_several_runs_are_sentences_about_the_most_and_the_least():
    runs = [make_run("elu_pre", 20, steps=FEW), make_run("elu", 20, steps=FEW)]
    assert re.match(
        r"On the way back to block 0, gradients grow \S+ times for elu_pre \(b\) and "
        r"(grow|shrink) .* for elu \(d\), at step 0",
        draw("gradnorms", runs).get_label(),
    )
    assert re.match(
        r"In each block, the mean square of the signal .* for elu_pre \(b\) and .* for elu \(d\)",
        draw("signal", runs).get_label(),
    )


def test_an_update_larger_than_the_weights_is_told_in_times_not_in_percent():
    large = make_run("elu", 20, steps=(0,), metrics=lambda f: f.assign(update_ratio=12.0))
    title = draw("updates", [large]).get_label()
    assert title.startswith("A step moves the blocks by 12 times their weights, at step 0")
    assert "% of their weights" in draw("updates", [make_run("elu", 20, steps=FEW)]).get_label()


def test_the_ticks_of_a_loss_that_explodes_do_not_overprint():
    run = make_run("elu_pre", 56, steps=(0, 1, 2))
    run.curve_frame.loc[:, "loss"] = np.float32([6e6, np.nan, np.nan][: len(run.curve_frame)])
    axes = panel(draw("curves", [run]), "loss")
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) <= 9


def test_a_name_of_a_guide_gives_way_to_a_point_at_the_right_end():
    losses = {"free": [2.3, 2.0, 1.0], "taken": [2.3, 2.3, 2.36]}
    ends = {}
    for name, loss in losses.items():
        run = make_run("elu", 20, steps=(0, 1, 2))
        run.curve_frame["loss"], run.curve_frame["test_loss"] = np.float32(loss), np.nan
        axes = panel(draw("curves", [run]), "loss")
        (words,) = [text for text in axes.texts if "guessing" in text.get_text()]
        ends[name] = words.get_ha()
    assert ends == {"free": "right", "taken": "center"}


def test_marks_of_panels_that_share_a_scale_stand_above_their_lines():
    figure = draw("signal", [make_run("elu_pre", 20, explode=4)])
    for title in ("output: squared channel mean", "output: channel variance"):
        axes = panel(figure, title)
        marks = [line.get_ydata().min() for line in axes.lines if line.get_gid() == NONFINITE]
        values = np.concatenate(
            [line.get_ydata() for line in axes.lines if line.get_transform() == axes.transData]
        )
        top = axes.transAxes.inverted().transform(axes.transData.transform((0, np.nanmax(values))))[
            1
        ]
        assert marks
        assert top < min(marks) - 0.03
