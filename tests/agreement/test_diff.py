"""Two runs that should agree: the first place where they part is the one where it was planted."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import write_run
from synthetic_runs import make_run
from torch import nn

import resdiag
from resdiag.agreement.differences import relative_difference
from resdiag.agreement.places import DIRECTIONS, PLACES
from resdiag.catalog.table import METRICS, RECORDED, RECORDED_PER_STEP
from resdiag.cli.main import app
from resdiag.errors import UsageError

STEPS, BLOCKS = 6, 4


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(F.elu(self.first(x)))


class Net(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def train(*, dtype=torch.float32, before_step=None, batch=None, backward=None, lr=0.05,
          momentum=0.9, every=1):  # fmt: skip
    """A short training; `before_step(step, net)`, `batch(step, x)` and `backward(step, net)` plant
    what makes it differ."""
    net = Net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    with resdiag.attach(net, optimizer=optimizer, every=every, record_first=1) as monitor:
        for step in range(STEPS):
            x = torch.randn(16, 6, generator=generator)
            y = torch.randint(5, (16,), generator=generator)
            if before_step:
                before_step(step, net)
            x = batch(step, x) if batch else x
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x.to(dtype)), y)
            loss.backward()
            if backward:
                backward(step, net)
            optimizer.step()
            monitor.step(loss.detach())
    return monitor


@pytest.fixture(scope="module")
def plain():
    return train()


def test_bit_identical_runs_agree_with_every_number_compared(plain):
    found = resdiag.diff(plain, train())
    assert found.agree
    assert found.first_of_any_size is None
    assert found.answer.startswith("Identical")
    assert {row.largest for row in found.rows} == {0.0}
    assert found.steps == tuple(range(STEPS))
    step, a, b = found.losses
    assert (step, a) == (STEPS - 1, b)


def change_weight(step, block, factor=1.5):
    def change(now, net):
        if now == step:
            with torch.no_grad():
                net.blocks[block].second.weight.mul_(factor)

    return change


@pytest.mark.parametrize(("step", "block"), [(0, 2), (3, 0), (5, 3), (4, 1)])
def test_a_weight_that_was_changed_is_found_at_its_step_and_block(plain, step, block):
    found = resdiag.diff(plain, train(before_step=change_weight(step, block)))
    first = found.first
    assert (first.step, first.block, first.direction) == (step, block, "forward")
    assert first.site == "at the branch's output"
    assert first.name == f"blocks.{block}"
    assert first.before == (step - 1 if step else None)
    assert not first.is_gradual
    assert f"block {block}" in found.answer


def test_with_an_exact_repeat_the_rounding_of_one_weight_is_found(plain):
    def nudge(now, net):
        if now == 3:
            with torch.no_grad():
                net.blocks[1].second.weight.mul_(1 + 2.0**-20)

    other, repeat = train(before_step=nudge), train()
    by_rounding = resdiag.diff(plain, other)
    found = resdiag.diff(plain, other, repeat=repeat)
    assert by_rounding.agree
    assert (found.first.step, found.first.block, found.first.direction) == (3, 1, "forward")
    assert found.first.noise == 0.0
    assert "rounding" in found.reading
    assert "No difference is larger than rounding explains." in str(found)


def test_another_batch_is_told_before_its_consequences(plain):
    other = train(batch=lambda step, x: x.flip(1) * 1.01 if step == 2 else x)
    first = resdiag.diff(plain, other).first
    assert (first.step, first.block, first.direction) == (2, None, "data")


def test_gradients_that_differ_in_one_block_are_a_difference_of_the_backward_pass(plain):
    def plant(step, net):
        if step == 1:
            net.blocks[1].first.weight.register_hook(lambda gradient: 1.1 * gradient)

    first = resdiag.diff(plain, train(before_step=plant)).first
    assert (first.step, first.block, first.direction) == (1, 1, "backward")
    assert first.metric == "grad_param"


def test_another_momentum_is_told_as_a_setting_and_another_rate_too(plain):
    first = resdiag.diff(plain, train(momentum=0.8)).first
    assert (first.step, first.direction, first.metric) == (0, "optimizer", "momentum")
    first = resdiag.diff(plain, train(lr=0.06)).first
    assert (first.step, first.direction, first.metric) == (0, "optimizer", "lr")


def test_a_gradient_that_is_scaled_behind_the_pass_is_found_in_its_block(plain):
    def clip(step, net):
        if step == 2:
            for p in net.blocks[3].parameters():
                p.grad.mul_(0.5)

    first = resdiag.diff(plain, train(backward=clip)).first
    assert (first.step, first.block, first.metric) == (2, 3, "grad_param")


def test_a_float64_copy_agrees_within_rounding_and_a_wrong_one_does_not(plain):
    copy = resdiag.diff(plain, train(dtype=torch.float64))
    assert copy.agree
    assert copy.first_of_any_size is not None
    wrong = train(dtype=torch.float64, before_step=change_weight(2, 1, 1.01))
    first = resdiag.diff(plain, wrong).first
    assert (first.step, first.block, first.direction) == (2, 1, "forward")


def test_a_bfloat16_copy_is_judged_by_its_own_epsilon(plain):
    copy = resdiag.diff(plain, train(dtype=torch.bfloat16))
    assert "bfloat16" in copy.tolerance
    assert copy.first is None or copy.first.step > 0
    assert not resdiag.diff(plain, train(dtype=torch.bfloat16), tolerance=1e-5).agree


def test_the_comparison_is_symmetric(plain):
    other = train(before_step=change_weight(3, 2))
    one, two = resdiag.diff(plain, other), resdiag.diff(other, plain)
    swapped = dataclasses.replace(two.first, a=two.first.b, b=two.first.a)
    assert one.first == swapped
    for left, right in zip(one.rows, two.rows, strict=True):
        assert (left.metric, left.largest, left.step, left.block) == (
            right.metric, right.largest, right.step, right.block,
        )  # fmt: skip


def test_steps_that_one_run_did_not_record_are_compared_by_their_loss_only(plain):
    other = train(every=4, before_step=change_weight(2, 1))
    found = resdiag.diff(plain, other)
    assert found.steps == (0, 4)
    assert (found.first.step, found.first.block, found.first.metric) == (2, None, "loss")
    assert "were not recorded at step 2" in found.reading


def test_a_run_that_broke_parts_from_one_that_did_not():
    healthy, broken = make_run("elu", 20), make_run("elu", 20, explode=40)
    first = resdiag.diff(healthy, broken, tolerance=1e9).first  # only what is not finite
    assert (first.step, first.direction, first.a, first.b) == (40, "forward", 0.0, 1.0)
    assert first.metric.endswith("_nonfinite")
    assert first.block == 4  # where it was made to break
    assert resdiag.diff(broken, make_run("elu", 20, explode=40)).agree


# -- against a slow twin ---------------------------------------------------------------------------


def slow_first(a, b, tolerance):
    """Every step, every place in the order of computation, one number after the other."""
    frames = [run.metrics().set_index(["step", "block"]).to_dict("index") for run in (a, b)]
    curves = [run.curve().set_index("step").to_dict("index") for run in (a, b)]
    names = [name for name in PLACES if PLACES[name].decides]
    of_block = [name for name in names if PLACES[name].per_block]

    def number(table, step, block, name):
        row = table.get(step if block is None else (step, block), {})
        return float(row.get(name, math.nan))

    def unit(name, step, block, x, y):
        place = PLACES[name]
        larger = max(abs(x), abs(y))
        if place.unit == "one":
            return max(1.0, larger)
        if place.unit == "rms":
            parts = [f"{place.site}_channel_mean_rms", f"{place.site}_channel_std"]
            return max(math.hypot(*(number(f, step, block, p) for p in parts)) for f in frames)
        if place.unit == "largest":
            return max(abs(c[s][name]) for c in curves for s in c if s <= step)
        return larger

    blocks = sorted({block for _, block in frames[0]})
    for step in sorted(curves[0]):
        for direction in DIRECTIONS:
            inside = sorted(blocks, reverse=direction == "backward")
            places = [(n, block) for block in inside for n in of_block
                      if PLACES[n].direction == direction]  # fmt: skip
            places += [(n, None) for n in names
                       if PLACES[n].direction == direction and not PLACES[n].per_block]  # fmt: skip
            for name, block in places:
                tables = curves if block is None else frames
                x, y = (number(table, step, block, name) for table in tables)
                if x == y or (math.isnan(x) or math.isnan(y)):
                    continue
                limit = 0 if PLACES[name].exact else tolerance
                if abs(x - y) / unit(name, step, block, x, y) > limit:
                    return step, block, name
    return None


changes = st.lists(
    st.tuples(
        st.sampled_from([name for name, place in PLACES.items() if place.per_block]),
        st.integers(0, 4), st.integers(0, 8), st.sampled_from([1e-6, 3e-3, 0.1, -2.0]),
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(changes, st.sampled_from([0.0, 1e-4, 1e-2]))
def test_the_first_place_equals_that_of_a_slow_twin(planted, tolerance):
    run = make_run("elu", 20, steps=range(5))
    frame = run.metrics_frame.copy()
    for name, step, block, size in planted:
        row = frame.index[(frame.step == step) & (frame.block == block)]
        frame.loc[row, name] = frame.loc[row, name] * np.float32(1 + size) + np.float32(size / 10)
    other = dataclasses.replace(run, metrics_frame=frame)
    found = resdiag.diff(run, other, tolerance=tolerance).first
    place = None if found is None else (found.step, found.block, found.metric)
    assert place == slow_first(run, other, tolerance)


@given(st.lists(st.floats(width=32), min_size=1), st.data())
def test_a_relative_difference_is_symmetric_and_zero_for_equals_only(a, data):
    b = data.draw(st.lists(st.floats(width=32), min_size=len(a), max_size=len(a)))
    x, y, unit = np.array(a), np.array(b), np.ones(len(a))
    one, two = relative_difference(x, y, unit), relative_difference(y, x, unit)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one == 0, x == y)
    assert (np.isnan(one) == (np.isnan(x) & np.isnan(y))).all()


# -- repeats, settings, refusals -------------------------------------------------------------------


def scaled(run, factor, step):
    """A run whose gradients at the outputs are larger by a factor from a step on."""
    frame = run.metrics_frame.copy()
    frame.loc[frame.step >= step, "grad_output"] *= np.float32(factor)
    return dataclasses.replace(run, metrics_frame=frame)


def test_what_a_repeat_shows_is_allowed_ten_times_and_only_from_then_on():
    run = make_run("elu", 20, steps=range(8))
    repeat = scaled(run, 1.001, step=3)
    assert resdiag.diff(run, scaled(run, 1.005, step=3), repeat=repeat).agree
    assert not resdiag.diff(run, scaled(run, 1.02, step=3), repeat=repeat).agree
    early = resdiag.diff(run, scaled(run, 1.005, step=2), repeat=repeat).first
    assert (early.step, early.metric, early.noise) == (2, "grad_output", 0.0)
    several = resdiag.diff(
        run, scaled(run, 1.02, step=3), repeat=[repeat, scaled(run, 1.003, step=3)]
    )
    assert several.agree
    assert "2 repeats" in several.tolerance


def test_shares_of_elements_are_in_the_table_and_do_not_decide():
    run = make_run("elu", 20, steps=range(3))
    frame = run.metrics_frame.assign(saturated_fraction=lambda f: f.saturated_fraction + 0.01)
    found = resdiag.diff(run, dataclasses.replace(run, metrics_frame=frame))
    assert found.agree
    row = next(row for row in found.rows if row.metric == "saturated_fraction")
    assert row.largest == pytest.approx(0.01, rel=1e-5)
    assert not row.decides


def test_settings_that_differ_are_said_first():
    a, b = make_run("elu", 20, lr=0.1), make_run("elu", 20, lr=0.2)
    found = resdiag.diff(a, b)
    assert found.differs == {"lr": (0.1, 0.2)}
    assert str(found).startswith("Differ in lr: 0.1 and 0.2")


def test_differences_are_a_table_of_steps_and_blocks():
    run = make_run("elu", 20, steps=range(4))
    found = resdiag.diff(run, scaled(run, 1.5, step=2))
    table = found.differences("grad_output")
    assert table.shape == (4, 9)
    assert (table.loc[:1] == 0).all(axis=None)
    np.testing.assert_allclose(table.loc[2:], 1 / 3, rtol=1e-6)
    with pytest.raises(UsageError, match="unknown compared metric 'grad_outputs'; did you mean"):
        found.differences("grad_outputs")


def test_every_recorded_column_has_a_place_or_follows_from_others():
    follow = {"elasticity", "branch_ratio", "head_mean", "head_kick", "head_factor", "grad_kept"}
    assert {*RECORDED, *RECORDED_PER_STEP, "loss"} - set(PLACES) == follow
    evaluations = {"error", "train_loss", "test_loss", "train_error", "test_error"}
    assert set(PLACES) <= {*METRICS, *RECORDED_PER_STEP, *evaluations}


def test_other_blocks_are_refused_in_one_line():
    with pytest.raises(UsageError, match="A has 9 blocks and B has 3"):
        resdiag.diff(make_run("elu", 20), make_run("elu", 8))
    run = make_run("elu", 20)
    narrow = [{**block, "shape": [8, *block["shape"][1:]]} for block in run.blocks]
    with pytest.raises(UsageError, match=r"block 0 has the shape \[16, 32, 32\] in A and \[8,"):
        resdiag.diff(run, dataclasses.replace(run, blocks=narrow))


def test_runs_without_a_common_step_are_refused():
    a, b = make_run("elu", 20, steps=(0, 1)), make_run("elu", 20, steps=(5, 7))
    b = dataclasses.replace(b, curve_frame=b.curve_frame[b.curve_frame.step > 4])
    with pytest.raises(UsageError, match="recorded steps of A: 0 to 1, of B: 5 to 7"):
        resdiag.diff(a, b)


# -- the command and the page ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("diff")
    plain = resdiag.save(train(), root / "plain")
    other = resdiag.save(train(before_step=change_weight(3, 2)), root / "other")
    return plain, other


def test_the_command_says_where_and_exits_by_request(folders, capsys):
    a, b = map(str, folders)
    assert app.run(["diff", a, b]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The same until step 2; they part first at step 3 in block 2 (blocks.2), forward" in said
    assert app.run(["diff", a, b, "--exit-code"]) == 1
    assert app.run(["diff", a, a, "--exit-code"]) == 0
    capsys.readouterr()
    assert app.run(["diff", a, b, "--repeat", a, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["agree"] is False
    assert (document["first"]["step"], document["first"]["block"]) == (3, 2)
    assert document["first"]["noise"] == 0


def test_the_page_stands_alone_and_says_the_same(folders, tmp_path, capsys):
    a, b = map(str, folders)
    page = tmp_path / "new" / "page.html"
    assert app.run(["diff", a, b, "--out", str(page)]) == 0
    capsys.readouterr()
    html = page.read_text("utf-8")
    assert "they part first at step 3 in block 2" in html
    assert "<svg" in html
    assert "first beyond the tolerance" in html
    assert "Files beside this page" not in html
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert app.run(["diff", a, a, "--out", str(page)]) == 0
    assert "Identical" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--out", "page.pdf"], "must end in .html"),
        (["--tolerance", "-1"], "tolerance -1.0 must be a number that is at least 0"),
        (["--repeat", "nowhere"], "no run at nowhere"),
    ],
)
def test_wrong_options_are_one_line(folders, extra, words, capsys):
    assert app.run(["diff", *map(str, folders), *extra]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_runs_of_resdiag_run_are_compared_too(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert resdiag.diff(a, b).answer.startswith("Identical")
