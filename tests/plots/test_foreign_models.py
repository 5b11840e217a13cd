"""Plots of models that are not the paper's: modules on the ticks, attention and MLPs apart."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from plot_conformance import FEW, figure_axes, legend_labels, panel, words
from synthetic_runs import make_run

from resdiag.errors import UsageError
from resdiag.plots.drawing import draw
from resdiag.plots.kinds import KINDS
from resdiag.plots.names import LONGEST, block_names, block_parts
from resdiag.runs.watched_config import WatchedConfig

ATTENDS = ["layer_norm", "linear", "scaled_dot_product_attention", "linear"]
MLP = ["layer_norm", "linear", "gelu", "linear"]


def foreign(blocks, **about):
    """A run of another model with these blocks; the numbers are those of a paper's network."""
    run = make_run("elu", 20, steps=FEW, **about)
    frame = run.metrics()
    kept = frame[frame["block"] < len(blocks)].reset_index(drop=True)
    described = [
        {**run.blocks[0], "index": i, "stage": 0, "transition": False, **block}
        for i, block in enumerate(blocks)
    ]
    config = WatchedConfig(model="GPT", data="", optimizer="AdamW", lr=None, seed=0)
    return replace(run, config=config, blocks=described, metrics_frame=kept)


def transformer(layers=4):
    return [
        {"name": f"h.{i}{'#1' * place}", "owner": f"h.{i}", "branch": branch,
         "branch_module": f"h.{i}.{part}"}
        for i in range(layers)
        for place, (part, branch) in enumerate((("attn", ATTENDS), ("mlp", MLP)))
    ]  # fmt: skip


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_the_ticks_are_the_modules_without_what_they_share():
    figure = draw("signal", [foreign(transformer())])
    axes = panel(figure, "output: channel variance")
    expected = [f"{i}.{part}" for i in range(4) for part in ("attn", "mlp")]
    assert ticks(axes) == expected
    assert axes.get_xlabel() == "block of h"
    upper = panel(figure, "output: mean square")
    assert upper.get_xlabel() == ""  # it shares the axis of the panel below
    assert upper.get_xlim() == panel(figure, "output: squared").get_xlim()


def test_attention_and_mlps_are_two_lines_that_together_have_every_value():
    run = foreign(transformer())
    figure = draw("updates", [run])
    axes = panel(figure, "by block")
    first = [line for line in axes.lines if line.get_label() in ("step 0", "_step 0")]
    assert [list(line.get_xdata()) for line in first] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    wanted = run.metrics().query("step == 0")["update_ratio"].to_numpy()
    for line, start in zip(first, (0, 1), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), wanted[start::2])
    assert first[0].get_markerfacecolor() != first[1].get_markerfacecolor()
    assert {"attention", "MLP"} <= set(legend_labels(figure))


def test_one_line_where_the_blocks_are_of_one_sort():
    same = [{"name": f"h.{i}", "owner": f"h.{i}", "branch": MLP} for i in range(6)]
    axes = panel(draw("updates", [foreign(same)]), "by block")
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert block_parts(same) == []
    assert block_parts([*same[:1], {"branch": ["conv2d", "softmax"]}, {"branch": ["conv2d"]}]) == [
        "other blocks", "attention", "other blocks",
    ]  # fmt: skip


def test_long_names_are_cut_at_the_front_and_equal_ones_stay_apart():
    blocks = [
        {"name": f"encoder.block.{i}.a_very_long_name.{i}", "owner": "", "branch_module": ""}
        for i in range(2)
    ]
    shared, names = block_names(blocks)
    assert shared == "encoder.block"
    assert [len(name) for name in names] == [LONGEST, LONGEST]
    assert len(set(names)) == 2
    layer = [
        {"name": name, "owner": "l", "branch_module": f"l.dropout{i}", "branch": branch}
        for i, (name, branch) in enumerate((("l", ATTENDS), ("l#1", MLP)))
    ]  # nn.TransformerEncoderLayer
    assert block_names(layer) == ("l", ["attn", "mlp"])
    twice = [{"name": name, "owner": "m", "branch_module": "m.f"} for name in ("m", "m#1")]
    assert block_names(twice) == ("", ["m", "m#1"])
    assert block_names([]) == ("", [])


@pytest.mark.parametrize("stages", [9, 4])
def test_names_of_stages_do_not_overprint(stages):
    blocks = [
        {"name": f"layer.{i}", "owner": f"layer.{i}", "stage": min(i, stages - 1)} for i in range(9)
    ]
    figure = draw("skip", [foreign(blocks, metrics=lambda f: f.assign(perturbation=0.5))])
    figure.draw_without_rendering()
    for axes in figure_axes(figure):
        shown = [t for t in axes.texts if t.get_text().removeprefix("stage ").isdigit()]
        boxes = sorted((t.get_window_extent() for t in shown), key=lambda box: box.x0)
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


def test_a_plot_with_nothing_left_is_refused_with_the_reason():
    names = [{"name": f"down.{i}", "owner": f"down.{i}"} for i in range(4)]
    lost = [
        {"metric": name, "blocks": "all", "reason": "the network has no residual addition"}
        for name in KINDS["skip"].needs
    ]
    columns = [item["metric"] for item in lost]
    gone = dict.fromkeys(columns, np.nan)
    run = foreign(names, unavailable=lost, metrics=lambda f: f.assign(**gone))
    with pytest.raises(UsageError, match=r"nothing to draw for GPT.*no residual addition"):
        draw("skip", [run])
    with pytest.raises(UsageError, match="dead_fraction is exactly 0 in every block"):
        draw("dead_fraction", [foreign(names)])
    with pytest.raises(UsageError, match="no error was evaluated"):
        draw("depth", [without(foreign(names), "test_error", "train_error")])


def without(run, *columns):
    return replace(run, curve_frame=run.curve().assign(**dict.fromkeys(columns, np.nan)))


def test_curves_have_the_panels_that_are_known_and_say_what_is_not():
    run = without(foreign(transformer()), "error", "train_error", "test_error", "loss", "test_loss")
    figure = draw("curves", [run])
    assert [a.get_title(loc="left") for a in figure_axes(figure)] == [
        "gradient norm of all parameters"
    ]
    assert "Learning rate: 0.1 at every step." in words(figure)
    assert "Loss: not known; monitor.step(loss) tells it." in words(figure)
    with pytest.raises(UsageError, match=r"monitor\.step\(loss\) tells it"):
        draw("curves", [without(run, "grad_norm", "lr")])


def test_the_skip_gain_says_where_it_begins_anew():
    blocks = [
        {"name": f"layer{1 + i // 3}.{i % 3}", "owner": f"layer{1 + i // 3}.{i % 3}",
         "stage": i // 3, "after_add": "relu",
         "shortcut": "projection" if i in (0, 3) else "identity"}
        for i in range(6)
    ]  # fmt: skip
    gains = [0.5, 0.4, 0.3] * 2
    figure = draw("skip", [foreign(blocks, metrics=lambda f: f.assign(
        skip_gain=np.resize(np.array(gains, np.float32), len(f)),
    ))])  # fmt: skip
    assert "begins anew behind the projections of blocks layer1.0, layer2.0" in words(figure)
    assert "from block layer2.0 to the last block" in figure.get_label()


def test_what_long_names_share_in_front_of_a_number_stands_on_the_axis_once():
    blocks = [
        {"name": f"e.layers.encoder_layer_{n}{m}", "owner": f"e.layers.encoder_layer_{n}",
         "branch_module": f"e.layers.encoder_layer_{n}.{child}", "branch": [op]}
        for n in range(2) for m, child, op in (("", "attn", "attention"), ("#1", "mlp", "addmm"))
    ]  # fmt: skip
    shared, names = block_names(blocks)
    assert (shared, names) == ("e.layers.encoder_layer", ["0.attn", "0.mlp", "1.attn", "1.mlp"])
    assert block_parts(blocks) == ["attention", "MLP"] * 2
    short = [{"name": name, "owner": name} for name in ("unit_0", "unit_1")]
    assert block_names(short) == ("", ["unit_0", "unit_1"])
