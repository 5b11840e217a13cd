"""The networks of the variants table: rows, sizes, initialisation, shortcuts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from resdiag.errors import UsageError
from resdiag.models.resnet import STAGE_CHANNELS, OptionA, build_model
from resdiag.models.variants import (
    VARIANTS,
    count_blocks,
    find_variant,
    register_variant,
    unregister_variant,
)

IDS = ["original", "elu_nobn", "elu_pre", "elu_after", "elu", "no_relu", "relu_pre", "relu_nobn"]


def test_the_table_has_the_rows_of_the_design_in_its_order():
    assert list(VARIANTS) == [*IDS, "plain"]
    assert {row.alias: row.id for row in VARIANTS.values() if row.alias} == {
        "a": "elu_nobn",
        "b": "elu_pre",
        "c": "elu_after",
        "d": "elu",
    }
    assert all(row.source for row in VARIANTS.values())
    with pytest.raises(TypeError):
        VARIANTS["mine"] = VARIANTS["elu"]


@pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
def test_what_a_row_says_of_itself_is_in_its_branch(row):
    assert row.norm == ("bn" in row.branch)
    assert row.activation in row.branch


def test_the_paper_s_units_are_spelled_as_in_its_figures():
    spelled = {row.id: (row.branch, row.after_add, row.head) for row in VARIANTS.values()}
    assert spelled["original"] == ("conv-bn-relu-conv-bn", "relu", "")
    assert spelled["elu_nobn"] == ("conv-elu-conv-elu", "none", "")
    assert spelled["elu_pre"] == ("elu-conv-elu-conv", "none", "elu")
    assert spelled["elu_after"] == ("conv-elu-conv-bn", "elu", "")
    assert spelled["elu"] == ("conv-elu-conv-bn", "none", "elu")


@pytest.mark.parametrize(("depth", "n"), [(8, 1), (20, 3), (32, 5), (44, 7), (56, 9), (110, 18)])
def test_depth_is_six_n_plus_two(depth, n):
    assert count_blocks(depth) == n
    assert [count_blocks(6 * k + 2) for k in range(1, 30)] == list(range(1, 30))


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 21, 111])
def test_other_depths_are_refused_with_their_neighbours(depth):
    with pytest.raises(UsageError, match=rf"depth {depth} is not 6n\+2; nearest: \d+") as caught:
        build_model("elu", depth)
    near = [int(word.strip(",;")) for word in str(caught.value).split("nearest: ")[1].split()[:2]]
    assert all(count_blocks(number) for number in near)


def test_wrong_names_and_widths_are_refused():
    with pytest.raises(UsageError, match="did you mean 'elu_pre'"):
        find_variant("elu_prr")
    for width in (0, -1, math.nan):
        with pytest.raises(UsageError, match="must be positive"):
            build_model("elu", 8, width=width)


def expected_parameters(row, n, channels, *, stem_bn=False, classes=10, inputs=3):
    """Counted from the row: 3x3 convolutions without bias, two numbers per BatchNorm channel."""
    norms = row.branch.split("-").count("bn")
    total = 9 * inputs * channels[0]
    total += 2 * channels[0] * (stem_bn or "bn" in row.stem)
    before = channels[0]
    for width in channels:
        for _ in range(n):
            total += 9 * before * width + 9 * width * width
            first = row.branch.startswith("bn")  # a BatchNorm ahead of the first convolution
            total += 2 * (before if first else width) + 2 * width * (norms - 1) if norms else 0
            before = width
    total += 2 * before * ("bn" in row.head)
    return total + before * classes + classes


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("row", VARIANTS.values(), ids=list(VARIANTS))
def test_parameters_are_counted_by_the_formula(row, depth):
    n = count_blocks(depth)
    count = sum(p.numel() for p in build_model(row.id, depth).parameters())
    assert count == expected_parameters(row, n, STAGE_CHANNELS)
    with_bn = sum(p.numel() for p in build_model(row.id, depth, stem_bn=True).parameters())
    assert with_bn == expected_parameters(row, n, STAGE_CHANNELS, stem_bn=True)


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.25, (4, 8, 16)), (0.5, (8, 16, 32)), (2.0, (32, 64, 128)), (0.01, (1, 1, 1))],
)
def test_width_multiplies_the_channels(width, channels):
    model = build_model("original", 8, width=width, num_classes=7, in_channels=1)
    assert tuple(stage[0].branch[0].out_channels for stage in model.stages) == channels
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(
        VARIANTS["original"], 1, channels, classes=7, inputs=1
    )
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_modules_follow_the_row(variant):
    row, model = VARIANTS[variant], build_model(variant, 14)
    names = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu", nn.ELU: "elu"}

    def spelled(module):
        return "-".join(names[type(m)] for m in module.modules() if type(m) in names)

    assert spelled(model.stem) == row.stem
    assert spelled(model.head) == row.head
    for name in model.unit_names:
        block = model.get_submodule(name)
        assert spelled(block.branch) == row.branch
        assert spelled(block.after_add) == ("" if row.after_add == "none" else row.after_add)
    shortcuts = [type(model.get_submodule(name).shortcut) for name in model.unit_names]
    residual = [nn.Identity, nn.Identity, OptionA, nn.Identity, OptionA, nn.Identity]
    assert shortcuts == (residual if row.shortcut else [type(None)] * 6)
    elus = [m for m in model.modules() if isinstance(m, nn.ELU)]
    assert all(m.alpha == 1 and not m.inplace for m in elus)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_stages_halve_the_resolution_and_double_the_channels(variant):
    model = build_model(variant, 14)
    x = model.stem(torch.zeros(1, 3, 32, 32))
    shapes = [tuple((x := block(x)).shape[1:]) for stage in model.stages for block in stage]
    assert shapes == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


def test_option_a_subsamples_and_appends_zeros_after_the_real_channels():
    x = torch.randn(2, 3, 6, 6)
    y = OptionA(5, 2)(x)
    assert y.shape == (2, 5, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert (y[:, 3:] == 0).all()
    assert not list(OptionA(5, 2).parameters())


def test_the_sum_is_branch_plus_shortcut_and_plain_has_none():
    x = torch.randn(4, 16, 8, 8)
    residual, plain = (build_model(v, 8, seed=0).stages[0][0] for v in ("elu_pre", "plain"))
    assert torch.equal(residual(x), residual.branch(x) + x)
    assert torch.equal(plain.eval()(x), torch.relu(plain.branch(x)))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_initialisation_is_he_s_with_fan_out_and_without_biases(variant):
    model = build_model(variant, 20, width=2.0, seed=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            assert module.padding == (1, 1)
            std = math.sqrt(2 / (9 * module.out_channels))
            spread = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=spread)
            bound = 5 * std / math.sqrt(module.weight.numel())
            assert abs(module.weight.mean().item()) < bound
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    assert (model.classifier.bias == 0).all()
    bound = 1 / math.sqrt(model.classifier.in_features)
    assert model.classifier.weight.abs().max() <= bound
    assert model.classifier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two, other = (build_model("elu", 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.stem[0].weight, other.stem[0].weight)
    build_model("elu", 8)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("variant", "stem"), [("elu", "conv-bn-elu"), ("elu_pre", "conv-bn")])
def test_stem_bn_stands_right_after_the_convolution(variant, stem):
    model = build_model(variant, 8, stem_bn=True)
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ELU: "elu"}
    assert "-".join(kinds[type(module)] for module in model.stem) == stem
    same = build_model("original", 8, stem_bn=True)
    assert [type(m) for m in same.stem] == [type(m) for m in build_model("original", 8).stem]


def test_a_registered_variant_is_built_and_found_by_its_letter_until_it_is_forgotten():
    mine = replace(VARIANTS["elu"], id="mine", alias="m", branch="conv-relu-conv-bn")
    register_variant(mine)
    assert find_variant("m") is VARIANTS["mine"] is mine
    assert len([m for m in build_model("m", 8).modules() if isinstance(m, nn.ReLU)]) == 3
    unregister_variant("m")
    with pytest.raises(UsageError, match="unknown variant 'mine'"):
        find_variant("mine")


def test_a_variant_cannot_take_a_name_or_use_an_operation_that_there_is_not():
    for changed in ({"id": "elu", "alias": ""}, {"id": "mine", "alias": "a"}, {"id": "a"}):
        with pytest.raises(UsageError, match="already"):
            register_variant(replace(VARIANTS["original"], **changed))
    with pytest.raises(UsageError, match="unknown operation 'gelu'"):
        register_variant(replace(VARIANTS["original"], id="mine", head="gelu"))
    with pytest.raises(UsageError, match="stays"):
        unregister_variant("elu")
