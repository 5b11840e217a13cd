"""`resdiag inspect`: the same blocks as on real tensors, as a tree and as JSON."""

import json

import pytest

from resdiag.models.example import example_batch
from resdiag.models.inspection import inspect as inspect_model
from resdiag.models.source import build_source
from resdiag.plots.anatomy import Row, draw_tree, fold_rows
from resdiag.watch.find.blocks import Block, find_blocks


def lines_of(inspection, **options):
    from rich.console import Console

    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(draw_tree(inspection, **options), markup=False)
    return capture.get().splitlines()


def make_row(name, *, parameters=10, transition=False, shortcut="identity"):
    block = Block(
        index=0, name=name, owner=name.partition("#")[0], stage=0, transition=transition,
        shortcut=shortcut, after_add="none", shape=(4,),
    )  # fmt: skip
    return Row(block, parameters)


@pytest.mark.parametrize(
    "name",
    ["torchvision:resnet18", "torchvision:mobilenet_v2", "transformers:gpt2", "resdiag:c-20"],
)
def test_the_meta_device_finds_the_blocks_of_real_tensors(name):
    arguments = {"n_layer": 2, "n_embd": 32, "n_head": 2} if name.endswith("gpt2") else {}
    pytest.importorskip(name.partition(":")[0])
    built = build_source(name, arguments)
    batch = example_batch(built, batch_size=1, shape=(3, 64, 64) if "vision" in name else None)
    real = find_blocks(built.model, *batch.args, **batch.kwargs)
    found = inspect_model(name, arguments, shape=(3, 64, 64) if "vision" in name else None)
    assert found.blocks == real
    assert {p.device.type for p in found.built.model.parameters()} == {"meta"}
    if not name.endswith("gpt2"):  # a layer of GPT-2 has two blocks
        members = [built.model.get_submodule(block.owner) for block in real]
        assert found.parameters == [sum(p.numel() for p in m.parameters()) for m in members]


def test_a_model_of_seven_billion_parameters_takes_no_memory():
    pytest.importorskip("transformers")
    found = inspect_model("transformers:llama")
    assert len(found.blocks) == 2 * 32
    assert {block.shortcut for block in found.blocks} == {"identity"}
    assert sum(found.parameters) > 6e9


def test_what_cannot_run_on_the_meta_device_runs_for_real():
    found = inspect_model(
        "torchvision:fasterrcnn_resnet50_fpn", {"min_size": 64, "max_size": 64}, shape=(3, 64, 64)
    )
    assert len(found.blocks) == 16
    assert {p.device.type for p in found.built.model.parameters()} == {"cpu"}


def test_json_is_the_model_and_its_blocks(call):
    code, out, err = call("inspect", "torchvision:resnet18", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {"model", "blocks", "units"}
    assert document["units"] == []
    assert document["model"] == "torchvision:resnet18"
    assert [block["owner"] for block in document["blocks"]] == [
        f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)
    ]
    projections = [b["index"] for b in document["blocks"] if b["shortcut"] == "projection"]
    assert projections == [2, 4, 6] == [b["index"] for b in document["blocks"] if b["transition"]]
    assert {block["after_add"] for block in document["blocks"]} == {"relu"}
    assert [block["stage"] for block in document["blocks"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert document["blocks"][0]["parameters"] == 2 * 9 * 64 * 64 + 2 * 2 * 64


def test_the_tree_folds_what_repeats_and_shows_all_on_request(call):
    code, folded, _ = call("inspect", "resdiag:elu-56")
    assert code == 0
    assert "27 blocks in 3 stages" in folded
    assert "stages.1.1 .. stages.1.8" in folded
    assert folded.count("transition") == 2
    _, whole, _ = call("inspect", "resdiag:elu-56", "--all")
    assert all(f"stages.{s}.{b} " in whole for s in range(3) for b in range(9))
    assert len(whole.splitlines()) == 2 + 3 + 27


def test_folding_keeps_every_block_once_and_an_owners_blocks_together():
    rows = [
        make_row("h.0", transition=True), make_row("h.0#1"),
        *[make_row(f"h.{i}{part}") for i in (1, 2, 3) for part in ("", "#1")],
        make_row("last", parameters=3),
    ]  # fmt: skip
    groups = fold_rows(rows)
    assert [(g.times, [row.block.name for row in g.first]) for g in groups] == [
        (1, ["h.0", "h.0#1"]), (3, ["h.1", "h.1#1"]), (1, ["last"]),
    ]  # fmt: skip
    assert [row.block.name for row in groups[1].last] == ["h.3", "h.3#1"]
    assert sum(g.times * len(g.first) for g in groups) == len(rows)


def test_columns_line_up_whether_a_line_is_nested_or_not():
    pytest.importorskip("transformers")
    arguments = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lines = lines_of(inspect_model("transformers:whisper", arguments))
    stage = lines[lines.index(next(line for line in lines if "stage 1" in line)) :]
    places = {line.index("identity") for line in stage if "identity" in line}
    assert len(places) == 1


def test_a_model_without_additions_says_so(call):
    code, out, _ = call("inspect", "torchvision:vgg11")
    assert code == 0
    assert out.splitlines()[1].startswith("no residual addition: 10 modules are recorded")
    assert "stage 5: 2 units, 4096" in out
    document = json.loads(call("inspect", "torchvision:vgg11", "--json")[1])
    assert document["blocks"] == []
    last = document["units"][-1]
    assert (last["index"], last["owner"], last["after_add"]) == (9, "classifier.3", "relu")
    assert (last["shortcut"], last["order"], last["stage"]) == ("none", "post", 5)
    assert last["parameters"] == 4096 * 4096 + 4096


def test_blocks_can_be_named(call):
    code, out, _ = call("inspect", "torchvision:resnet18", "--blocks", "layer1.*", "--json")
    assert code == 0
    assert [block["owner"] for block in json.loads(out)["blocks"]] == ["layer1.0", "layer1.1"]
    code, out, err = call("inspect", "torchvision:resnet18", "--blocks", "layr1.*")
    assert (code, out) == (2, "")
    assert "blocks: 'layr1.*' matches no module of ResNet" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["torchvision:resnet1"], "did you mean"),
        (["torchvision:vit_b_16", "--input-shape", "3,64,64"], "does not run on float32 1x3x64x64"),
        (["torchvision:resnet18", "--input-shape", "3,a"], "is not a list of positive numbers"),
        (["torchvision:resnet18", "--arg", "x"], "is not key=value"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(call, words, said):
    code, out, err = call("inspect", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    code, out, _ = call("inspect", *words, "--json")
    assert code == 2
    assert set(json.loads(out)) == {"error", "hint"}
