"""The plots: what is drawn is what was recorded, and nothing breaks them or goes unseen."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from plot_conformance import (
    FEW,
    NONFINITE,
    PlotConformance,
    figure_axes,
    legend_labels,
    lines,
    panel,
    words,
)  # fmt: skip
from synthetic_runs import make_run

from resdiag.diagnose.rundata import RunData
from resdiag.errors import StorageError, UsageError
from resdiag.models.variants import find_variant, register_variant, unregister_variant
from resdiag.plots.drawing import draw
from resdiag.plots.figurefile import render, save
from resdiag.plots.kinds import KINDS, register_plot, unregister_plot
from resdiag.plots.view import Record
from resdiag.theory.prediction import predict

THEORY = "theory (no fitted constant)"


def spoil(column, values):
    """A change of the frame: `column` gets `values` (rows, cycled)."""

    def change(frame):
        return frame.assign(**{column: np.resize(np.array(values, dtype=np.float32), len(frame))})

    return change


class TestBuiltInKinds(PlotConformance):
    @pytest.fixture(params=KINDS)
    def kind(self, request):
        return KINDS[request.param]


@pytest.mark.parametrize("file_format", ["png", "pdf"])
def test_other_formats_are_deterministic_too(file_format):
    runs = [make_run("elu", 20, steps=FEW)]
    first, second = (render(draw("gradnorms", runs), file_format) for _ in range(2))
    assert first == second
    assert b"CreationDate" not in first


def test_rendering_twice_one_figure_gives_the_same_bytes():
    figure = draw("skip", [make_run("original", 20, steps=FEW)])
    assert render(figure, "svg") == render(figure, "svg")


@pytest.mark.parametrize(
    ("kind", "title", "metric"),
    [
        ("gradnorms", "of the parameters", "grad_param"),
        ("skip", "P1", "perturbation"),
        ("skip", "P3 skip gain, whole network", "skip_gain"),
        ("signal", "output: mean square", "output_second_moment"),
        ("growth", "backward", "grad_growth"),
        ("updates", "by block", "update_ratio"),
        ("biasshift", "output: bias", "output_bias"),
    ],
)
def test_a_line_over_blocks_has_the_values_of_the_frame(kind, title, metric):
    run = make_run("original", 20, steps=FEW)
    frame = run.metrics()
    axes = panel(draw(kind, [run]), title)
    for step in (0, 9):
        line = next(line for line in axes.lines if line.get_label() == f"step {step}")
        recorded = frame[frame["step"] == step].sort_values("block")[metric]
        np.testing.assert_array_equal(line.get_ydata(), recorded.to_numpy(dtype=np.float64))
        np.testing.assert_array_equal(line.get_xdata(), np.arange(9))


def test_the_gradient_at_the_outputs_starts_with_that_at_the_stem():
    run = make_run("elu", 20, steps=FEW)
    frame = run.metrics()
    line = panel(draw("gradnorms", [run]), "at the outputs").lines[0]
    first = frame[frame["step"] == 0]
    assert line.get_xdata()[0] == -1
    assert line.get_ydata()[0] == first["grad_input"].iloc[0]
    np.testing.assert_array_equal(line.get_ydata()[1:], first["grad_output"])


def test_curves_have_the_values_of_the_curve():
    run = make_run("elu", 20, steps=FEW)
    line = panel(draw("curves", [run]), "loss").lines[0]
    np.testing.assert_array_equal(line.get_ydata(), run.curve()["loss"])


def test_a_guessing_loss_is_marked_at_ln_k():
    axes = panel(draw("curves", [make_run("elu", 20, steps=FEW)]), "loss")
    assert any(np.allclose(line.get_ydata(), np.log(10)) for line in axes.lines)


def test_a_map_has_the_values_of_the_frame_and_holes_where_they_are_not_finite():
    run = make_run("elu_pre", 20, explode=2)
    axes = panel(draw("gradnorms", [run]), "gradient at the block's output")
    drawn = np.ma.masked_invalid(axes.collections[-1].get_array()).reshape(9, -1)
    wanted = run.metrics().pivot(index="block", columns="step", values="grad_output").to_numpy()
    np.testing.assert_array_equal(drawn.mask, ~np.isfinite(wanted))
    np.testing.assert_allclose(drawn.compressed(), wanted[np.isfinite(wanted)])
    assert axes.patch.get_hatch()


@pytest.mark.parametrize("kind", ["gradnorms", "signal", "growth", "skip", "biasshift", "curves"])
def test_an_explosion_is_visible(kind):
    figure = draw(kind, [make_run("elu_pre", 20, explode=2)])
    assert lines(figure, NONFINITE)
    assert NONFINITE in legend_labels(figure)


def test_marks_stand_where_the_values_are_not_finite():
    run = make_run("original", 20, steps=(0,), metrics=spoil("grad_param", [1, 1, np.inf]))
    axes = panel(draw("gradnorms", [run]), "of the parameters")
    mark = next(line for line in axes.lines if line.get_label() == NONFINITE)
    np.testing.assert_array_equal(mark.get_xdata(), [2, 5, 8])


def test_zeros_on_a_log_axis_are_marked():
    run = make_run("original", 20, steps=(0,), metrics=spoil("grad_param", [1, 0, 2]))
    axes = panel(draw("gradnorms", [run]), "of the parameters")
    mark = next(line for line in axes.lines if line.get_label() == "zero")
    np.testing.assert_array_equal(mark.get_xdata(), [1, 4, 7])


def test_a_number_that_cannot_be_had_is_a_gap_with_its_reason():
    reason = [{"metric": "update_ratio", "blocks": [0, 3], "reason": "frozen parameters"}]
    change = spoil("update_ratio", [np.nan, 1e-3, 1e-3])
    figure = draw("updates", [make_run("elu", 20, explode=2, unavailable=reason, metrics=change)])
    assert "frozen parameters" in words(figure)
    record = Record(
        make_run("elu", 20, explode=2, unavailable=reason, metrics=change),
        make_run("elu", 20, explode=2, metrics=change).metrics(),
        make_run("elu", 20, explode=2).curve(),
    )
    broken = record.broken("update_ratio")[:, 2]
    assert not broken[[0, 3]].any()
    assert broken[6]


def test_a_derived_metric_is_missing_for_the_reason_of_its_inputs():
    reason = [{"metric": "grad_input", "blocks": "all", "reason": "input needs no gradient"}]
    change = spoil("grad_input", [np.nan])
    figure = draw("growth", [make_run("elu", 20, unavailable=reason, metrics=change)])
    assert "input needs no gradient" in words(figure)
    assert "backward: no value." in words(figure)
    assert not lines(figure, NONFINITE)
    assert not [a for a in figure_axes(figure) if a.get_title(loc="left").startswith("backward")]


def test_equal_depths_are_placed_by_block_and_different_ones_by_share_of_the_depth():
    equal = draw("growth", [make_run(v, 20, steps=FEW) for v in ("elu", "original")])
    for line in panel(equal, "forward").lines[:2]:
        np.testing.assert_array_equal(line.get_xdata(), np.arange(9))
    different = draw("growth", [make_run("elu", d, steps=FEW) for d in (20, 32, 56)])
    for line, n in zip(panel(different, "forward").lines[:3], (9, 15, 27), strict=True):
        np.testing.assert_allclose(line.get_xdata(), (np.arange(n) + 0.5) / n)


def test_the_legend_names_what_differs():
    by_variant = draw("signal", [make_run(v, 20, steps=FEW) for v in ("elu", "original")])
    assert legend_labels(by_variant)[:2] == ["original", "elu (d)"]
    by_depth = draw("signal", [make_run("elu", d, steps=FEW) for d in (56, 20)])
    assert legend_labels(by_depth)[:2] == ["depth 20", "depth 56"]
    by_lr = draw("signal", [make_run("elu", 20, lr=lr, steps=FEW) for lr in (0.1, 0.01)])
    assert sorted(legend_labels(by_lr)[:2]) == ["lr 0.01", "lr 0.1"]


def test_a_dead_run_is_compared_by_its_last_finite_step_and_marked_at_its_last():
    runs = [make_run("elu_pre", 20, explode=2), make_run("elu", 20, steps=FEW)]
    axes = panel(draw("gradnorms", runs), "of the parameters, last finite step (1 to 9)")
    finite = runs[0].metrics().query("step == 1")["grad_param"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), finite)
    mark = next(line for line in axes.lines if line.get_label() == NONFINITE)
    np.testing.assert_array_equal(mark.get_xdata(), np.arange(9))


def test_other_differences_are_small_print_and_not_in_the_legend():
    runs = [make_run("elu", 20, steps=FEW), make_run("original", 20, lr=0.01, steps=FEW)]
    figure = draw("signal", runs)
    assert legend_labels(figure)[:2] == ["original", "elu (d)"]
    assert "These runs also differ in: lr." in words(figure)


def test_seeds_are_one_line_with_a_band_from_least_to_most():
    runs = [make_run("elu", 20, seed=s, steps=FEW) for s in range(3)]
    axes = panel(draw("gradnorms", runs), "of the parameters, step 0")
    values = np.stack([r.metrics().query("step == 0")["grad_param"].to_numpy() for r in runs])
    assert [line.get_label() for line in axes.lines].count("elu (d) (3 seeds)") == 1
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.median(values, axis=0))
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(values.min())
    assert edge.max() == pytest.approx(values.max())


def test_the_same_run_twice_is_not_two_seeds():
    figure = draw("signal", [make_run("elu", 20, steps=FEW)] * 2)
    assert "seeds" not in words(figure)


def test_variants_differ_in_marker_and_line_style_and_not_only_in_colour():
    from resdiag.models.variants import VARIANTS
    from resdiag.plots.style import VARIANT_LOOKS

    assert set(VARIANT_LOOKS) == set(VARIANTS)
    looks = [VARIANT_LOOKS[v] for v in VARIANTS]
    assert len({look.marker for look in looks}) == len(looks)
    assert len({look.colour for look in looks}) == len(looks)


def test_theory_is_drawn_at_step_0_only_and_can_be_left_out():
    run = make_run("elu_pre", 20, steps=FEW)
    line = lines(draw("signal", [run]), THEORY)[0]
    start = run.metrics().iloc[0]
    wanted = predict("elu_pre", 20, s0=start["input_second_moment"], m0=start["input_mean"])
    np.testing.assert_allclose(line.get_ydata(), wanted.second_moment)
    assert not lines(draw("signal", [run], theory=False), THEORY)
    assert not lines(draw("signal", [run], step=9), THEORY)


def test_a_chosen_step_is_the_one_drawn():
    run = make_run("original", 20, steps=FEW)
    axes = panel(draw("updates", [run], step=4), "by block")
    wanted = run.metrics().query("step == 4")["update_ratio"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), wanted)


def test_the_first_non_finite_value_is_marked_and_named():
    figure = draw("nonfinite", [make_run("elu_pre", 20, explode=2)])
    assert "step 2, block 4, forward" in words(figure)
    assert "first non-finite value" in legend_labels(figure)
    assert "step 2 in block 4" in figure.get_label()


def test_if_all_is_finite_the_largest_change_of_the_gradient_is_shown():
    def change(frame):
        odd = (frame["step"] == 4) & (frame["block"] == 3)
        return frame.assign(grad_output=frame["grad_output"].mask(odd, 1e6))

    figure = draw("nonfinite", [make_run("elu", 20, steps=FEW, metrics=change)])
    assert "Everything is finite" in figure.get_label()
    assert "block 3 at step 4" in figure.get_label()


def test_nothing_after_the_addition_is_said_and_not_an_empty_panel():
    figure = draw("skip", [make_run("elu", 20, steps=FEW)])
    bare = words(figure)
    assert "P1 perturbation of the sum, P2 identity defect and P4 identity drift: exactly 0" in bare
    assert "exactly 1 in every block (nothing follows the addition)" in bare
    (left,) = figure_axes(figure)
    assert left.get_title(loc="left") == "branch to shortcut"
    other = words(draw("skip", [make_run("original", 20, steps=FEW)]))
    assert "P2 identity defect and P4 identity drift: exactly 0 in every block." in other


def test_a_mistake_is_one_line_that_names_the_way_out():
    run = make_run("elu", 20, steps=FEW)
    for call, message in [
        (lambda: draw("gradnorm", [run]), "did you mean 'gradnorms'"),
        (lambda: draw("gradnorms", []), "needs a run"),
        (lambda: draw("gradnorms", [run], step=5), "nearest: 4, 9"),
        (lambda: draw("gradnorms", [run], step=99), "nearest: 9"),
        (lambda: draw("growth", [make_run("elu", 20, steps=())]), "no recorded step"),
        (
            lambda: draw("updates", [make_run(metrics=lambda f: f.drop(columns="update_ratio"))]),
            "no column update_ratio",
        ),
        (lambda: render(Figure(), "gif"), "unknown format 'gif'"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in caught.value.message


def test_files_appear_whole_with_the_dots_of_their_stem(tmp_path):
    figure = draw("updates", [make_run("elu", 20, steps=FEW)])
    paths = save(figure, tmp_path / "new" / "lr0.1", ["svg", "png", "pdf"])
    assert [p.name for p in paths] == ["lr0.1.svg", "lr0.1.png", "lr0.1.pdf"]
    assert [p.read_bytes()[:4] for p in paths] == [b"<?xm", b"\x89PNG", b"%PDF"]
    assert len(list(paths[0].parent.iterdir())) == 3
    assert f"<title>{figure.get_label()}</title>" in paths[0].read_text("utf-8")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    figure = draw("updates", [make_run("elu", 20, steps=(0,))])
    with pytest.raises(StorageError, match="cannot write"):
        save(figure, tmp_path / "file" / "plot", ["svg"])


def test_kinds_cost_no_matplotlib():
    code = (
        "import sys, resdiag.plots.drawing as p; p.KINDS; "
        "slow = {'matplotlib', 'seaborn', 'pandas', 'torch', 'numpy'} & set(sys.modules); "
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heat_maps_and_intervals_are_seaborns_in_its_theme():
    import seaborn as sns

    from resdiag.plots.style import DENSER, look

    theme = sns.axes_style("whitegrid")
    with look():
        import matplotlib as mpl

        ours = {name: mpl.rcParams[name] for name in theme}
    with mpl.rc_context({**theme, **DENSER}):
        theirs = {name: mpl.rcParams[name] for name in theme}
    unused = ("image.cmap", "font.sans-serif")  # heat maps name theirs, and the font is named too
    assert {n: v for n, v in ours.items() if n not in unused} == {
        n: v for n, v in theirs.items() if n not in unused
    }


def test_the_mean_of_a_stage_is_geometric_and_its_bar_reaches_over_blocks_and_seeds():
    runs = [make_run("elu", 20, seed=s, steps=FEW) for s in range(3)]
    figure = draw("growth", runs)
    axes = panel(figure, "geometric mean, range")
    frames = [r.metrics().query("step == 0") for r in runs]
    stage = np.stack([f["forward_growth"].to_numpy(np.float64)[1 * 3 + 1 : 2 * 3] for f in frames])
    ends = [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [2, 2]]
    (bar,) = (end for end in ends if end[0] != end[1])
    np.testing.assert_allclose(sorted(bar), [stage.min(), stage.max()])
    shown = {round(float(y), 6) for line in axes.lines for y in np.atleast_1d(line.get_ydata())}
    assert round(float(np.exp(np.log(stage).mean())), 6) in shown


def test_the_error_of_a_depth_is_the_median_over_seeds_with_a_bar_from_least_to_most():
    def ending(run, error):
        return replace(run, curve_frame=run.curve().assign(test_error=error))

    runs = [
        ending(make_run("elu", depth, seed=seed, steps=FEW), error)
        for depth, errors in ((20, (0.1, 0.2, 0.4)), (32, (0.3, 0.3, 0.3)))
        for seed, error in enumerate(errors)
    ]
    axes = panel(draw("depth", [*runs, make_run("elu_pre", 32, explode=2)]), "test error")
    line = next(line for line in axes.lines if list(line.get_xdata()) == [20, 32])
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.3])
    bars = [path.vertices[:, 1] for c in axes.collections for path in c.get_paths()]
    assert any(np.allclose(sorted(bar), [0.1, 0.4]) for bar in bars)
    mark = next(line for line in axes.lines if line.get_label() == NONFINITE)
    np.testing.assert_array_equal(mark.get_xdata(), [32])


def test_theory_of_plots_and_of_the_verdict_is_the_same_on_images_of_64_pixels():
    run = make_run("elu_pre", 20, steps=FEW)
    wide = [
        {**block, "shape": [block["shape"][0], *(2 * side for side in block["shape"][1:])]}
        for block in run.blocks
    ]
    run = replace(run, blocks=wide)
    drawn = lines(draw("signal", [run]), THEORY)[0].get_ydata()
    judged = RunData(run).prediction
    start = run.metrics().iloc[0]
    known = {"s0": start["input_second_moment"], "m0": start["input_mean"]}
    np.testing.assert_array_equal(drawn, judged.second_moment)
    np.testing.assert_array_equal(drawn, predict("elu_pre", 20, width_px=64, **known).second_moment)
    assert not np.allclose(drawn, predict("elu_pre", 20, **known).second_moment, rtol=1e-3)


def test_no_theory_is_drawn_or_named_for_a_variant_without_a_law():
    register_variant(replace(find_variant("elu_nobn"), id="lawless", alias="", law=""))
    run = make_run("elu_nobn", 20, steps=FEW)
    lawless = replace(run, config=replace(run.config, variant="lawless"))
    for kind in ("signal", "gradnorms", "growth", "skip"):
        assert lines(draw(kind, [run]), THEORY)
        figure = draw(kind, [lawless])
        assert not lines(figure, THEORY)
        assert "heory" not in words(figure)
    unregister_variant("lawless")


def test_a_kind_of_plot_cannot_take_the_name_of_another_or_of_a_metric():
    for name in ("growth", "grad_param"):
        with pytest.raises(UsageError, match="already"):
            register_plot(replace(KINDS["signal"], name=name))
    with pytest.raises(UsageError, match="stays"):
        unregister_plot("growth")
    with pytest.raises(UsageError, match="did you mean"):
        unregister_plot("grwth")
