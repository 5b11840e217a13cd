"""Attention is found however it is written, and its numbers are those of a slow twin."""

import copy
import math
from types import SimpleNamespace

import attending
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attending import SPELLINGS, Attend, Unit, batch, network, slow_columns
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from resdiag.catalog.set_metrics import ATTENTION
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure.attention import QUERIES, Unreadable, queries_of, read_logits

COLUMNS = [metric.id for metric in ATTENTION]
HEADS = ["attention_logit_head", "attention_entropy_head"]


def record(model, steps=1, x=None, optimizer=None, **options):
    """Train, watched, with attention in every step unless told otherwise."""
    given, y = batch()
    x = given if x is None else x
    with attach(model, optimizer=optimizer, **{"metrics": {"attention": 1}, **options}) as monitor:
        for step in range(steps):
            torch.manual_seed(step)
            out = model(x)
            loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
            if optimizer is not None:
                optimizer.zero_grad()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
            monitor.step()
    return monitor


def row(monitor, block=0, step=0):
    frame = monitor.to_frame()
    return frame[(frame.block == block) & (frame.step == step)].iloc[0]


def reasons(monitor, column="attention_entropy"):
    return {one["reason"]: one["blocks"] for one in monitor.unavailable if one["metric"] == column}


@pytest.mark.parametrize("spelling", [one for one in SPELLINGS if one != "merged"])
def test_every_spelling_has_the_numbers_of_its_slow_twin(spelling):
    model = network("product", spelling)
    monitor = record(model)
    first, twin = (slow_columns(one.logits) for one in attending.attentions(model))
    for column in COLUMNS:
        assert row(monitor)[column] == pytest.approx(first[column], rel=2e-5, abs=1e-6)
        assert row(monitor, 2)[column] == pytest.approx(twin[column], rel=2e-5, abs=1e-6)
    assert monitor.to_frame().query("block in (1, 3)")[COLUMNS].isna().all(axis=None)


def test_where_samples_and_heads_are_one_dimension_no_head_is_named():
    model = network("merged")
    monitor = record(model, samples=None)
    logits = attending.attentions(model)[0].logits.flatten(0, 1).unsqueeze(1)
    twin = slow_columns(logits, samples=len(logits))
    for column in set(COLUMNS) - set(HEADS):
        assert row(monitor)[column] == pytest.approx(twin[column], rel=2e-5, abs=1e-6)
    assert not set(HEADS) & set(monitor.to_frame().columns)
    assert reasons(monitor, HEADS[0])["samples and heads are one dimension of this attention"] == [
        0
    ]


@pytest.mark.parametrize("samples", [2, None])
def test_the_number_of_samples_is_that_of_attach(samples):
    model = network("causal")
    monitor = record(model, samples=samples)
    twin = slow_columns(attending.attentions(model)[0].logits, samples or attending.BATCH)
    assert row(monitor)["attention_entropy"] == pytest.approx(twin["attention_entropy"], rel=2e-5)


def test_float64_keeps_its_digits():
    model = network("causal").double()
    monitor = record(model, x=batch()[0].double())
    twin = slow_columns(attending.attentions(model)[0].logits)
    # stored as float32
    assert row(monitor)["attention_entropy"] == np.float32(twin["attention_entropy"])


def test_queries_are_spread_evenly_and_the_first_and_the_last_are_among_them():
    for count in (1, 2, QUERIES, QUERIES + 1, 1000):
        found = queries_of(count)
        assert found[0] == 0
        assert found[-1] == count - 1
        assert len(found) == len(set(found)) == min(count, QUERIES)
        gaps = np.diff(found)
        assert not len(gaps) or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gpt2_has_the_entropy_of_the_weights_that_it_returns(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0,
        eos_token_id=0, attn_implementation=implementation, loss_type="ForCausalLM",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    nn.init.normal_(model.transformer.h[1].attn.c_attn.weight, std=1.0)
    tokens = torch.randint(20, (3, 12))
    twin = copy.deepcopy(model).eval()
    twin.set_attn_implementation("eager")
    weights = twin(tokens, output_attentions=True).attentions
    model.eval()
    for module in model.modules():
        module.p = 0.0
    model.train()
    with attach(model, metrics={"attention": 1}) as monitor:
        model(tokens, labels=tokens).loss.backward()
        monitor.step()
    frame = monitor.to_frame().set_index("block")
    for layer, p in enumerate(weights):
        entropy = -(p[:, :, 1:].double() * p[:, :, 1:].double().clamp_min(1e-300).log()).sum(-1)
        assert frame["attention_entropy"][2 * layer] == pytest.approx(
            entropy.mean().item(), rel=1e-5
        )
    assert frame["attention_entropy"].notna().tolist() == [True, False, True, False]


def test_an_encoder_layer_of_pytorch_has_the_weights_that_its_attention_returns():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, attending.CLASSES))
    monitor = record(model, samples=None)
    x = layer.norm1(model[0](batch()[0]))
    p = layer.self_attn(x, x, x, average_attn_weights=False)[1].double()[:, :, queries_of(70)]
    assert row(monitor)["attention_entropy"] == pytest.approx(
        -(p * p.log()).sum(-1).mean().item(), rel=1e-5
    )
    assert row(monitor)["attention_first"] == pytest.approx(p[..., 0].mean().item(), rel=1e-5)


def test_two_attentions_of_one_block_are_taken_together():
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Attend("product"), Attend("causal")

        def forward(self, x):
            return self.one(x) + self.other(x)

    model = nn.Sequential(nn.Linear(3, 8), Unit(Both()), nn.Linear(8, attending.CLASSES))
    monitor = record(model)
    both = [attending.slow_heads(one.logits, 4) for one in attending.attentions(model)]
    share = [head[2] for heads in both for head in heads]
    assert row(monitor)["attention_entropy_share"] == pytest.approx(np.mean(share), rel=2e-5)
    assert row(monitor)["attention_entropy_head"] == np.argmin(share)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_shows(broken):
    model = network("product")
    x = batch()[0].clone()
    x[1, 3] = broken
    monitor = record(model, x=x)
    assert math.isnan(row(monitor)["attention_entropy"])
    assert math.isnan(row(monitor)["attention_logit"])


def test_a_query_whose_keys_are_all_masked_does_not_count():
    class Blind(Attend):
        def mix(self, q, k, v):
            shown = torch.ones(attending.LENGTH, attending.LENGTH, dtype=torch.bool)
            shown[5] = False
            self.logits = self.twin(q, k).masked_fill(~shown, -math.inf)
            return F.scaled_dot_product_attention(q, k, v, shown).nan_to_num(0.0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), Unit(Blind("product")), nn.Linear(8, attending.CLASSES))
    monitor = record(model)
    twin = slow_columns(model[1].branch.logits)
    assert row(monitor)["attention_entropy"] == pytest.approx(twin["attention_entropy"], rel=2e-5)


def test_a_softmax_over_classes_or_over_pools_is_no_attention():
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.gate(x).softmax(-1) * self.value(x)  # no product of two tensors

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), Unit(Gates()), nn.Linear(8, attending.CLASSES))
    monitor = record(model)
    assert not set(COLUMNS) & set(monitor.to_frame().columns)
    assert len(reasons(monitor)) == 1


def test_training_with_every_set_ends_with_the_same_bits():
    weights = []
    for metrics in (None, {"attention": 1, "experts": 1, "optimizer": 1, "extremes": 1}):
        model = network("causal", "written", "module causal")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if metrics is None:
            x, y = batch()
            for step in range(4):
                torch.manual_seed(step)
                optimizer.zero_grad()
                F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
                optimizer.step()
        else:
            record(model, 4, optimizer=optimizer, metrics=metrics)
        weights.append([*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def steps_with(monitor, column="attention_entropy"):
    return monitor.to_frame().dropna(subset=column).step.unique().tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metrics": {"attention": 5}}, [0, 5, 10, 15]),
        ({"metrics": {"attention": 5}, "every": 3}, [0, 6, 12, 15]),
        ({"metrics": {"core": 1, "attention": 4}, "record_first": 3, "every": 8}, [0, 8, 16]),
        ({"metrics": "full"}, [0]),
    ],
)
def test_a_set_is_recorded_at_the_first_recorded_step_from_each_multiple_on(options, expected):
    monitor = record(network("causal"), 18, **options)
    assert steps_with(monitor) == expected


def test_steps_between_are_read_by_hooks_and_not_traced():
    # traced: the first pass, the ninth as ever, and those at which attention is due
    assert record(network("causal"), 12, metrics={"attention": 5}).passes_read == 12 - 4
    assert record(network("causal"), 12, metrics="core").passes_read == 12 - 2


def test_a_network_without_attention_has_no_such_columns_and_is_not_traced_for_them():
    model = nn.Sequential(nn.Linear(3, 8), Unit(nn.Linear(8, 8)), nn.Linear(8, attending.CLASSES))
    monitor = record(model, 4, metrics="full")
    assert not set(COLUMNS) & set(monitor.to_frame().columns)
    assert not reasons(monitor)
    assert monitor.passes_read == 3


class Elsewhere(torch.autograd.Function):
    """Attention that no torch function shows, as a kernel of one's own."""

    @staticmethod
    def forward(ctx, q, k, v):
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx, g):
        return g, g, g


class Hidden(Attend):
    def mix(self, q, k, v):
        return Elsewhere.apply(q, k, v)


def test_an_attention_that_no_torch_function_shows_is_said_and_not_guessed():
    torch.manual_seed(0)
    # by the name of its module it should be one
    hidden = type("HiddenAttention", (Hidden,), {})("product")
    model = nn.Sequential(nn.Linear(3, 8), Unit(hidden), nn.Linear(8, attending.CLASSES))
    monitor = record(model, metrics="full")
    assert [*reasons(monitor)] == [
        "no scaled_dot_product_attention and no softmax of products was seen in its branch"
    ]


def test_a_run_that_was_saved_has_the_numbers(tmp_path):
    import resdiag

    monitor = record(network("causal"), 3, metrics={"attention": 2})
    resdiag.save(monitor, tmp_path / "run")
    before = monitor.to_frame()[["step", "block", *COLUMNS]]
    after = resdiag.load_run(tmp_path / "run").metrics()[["step", "block", *COLUMNS]]
    assert np.allclose(before, after, equal_nan=True)
    assert after["attention_entropy"].notna().sum() == 2


class Odd(Attend):
    """Attention that cannot be computed again, or not be followed."""

    def __init__(self, change):
        super().__init__("product")
        self.change = change

    def mix(self, q, k, v):
        return self.change(q, k, v)


def lower_right(q, k, v):
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_an_attention_whose_logits_cannot_be_had_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), Unit(Odd(lower_right)), nn.Linear(8, attending.CLASSES))
    monitor = record(model)
    assert reasons(monitor) == {"attention with a mask of type CausalBias": [0]}
    assert "attention_entropy" not in monitor.to_frame()


def test_attention_over_nested_tensors_is_not_read():
    parts = [torch.randn(length, 2, 4) for length in (3, 2)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    says = "attention over nested tensors, whose masks are in no tensor"
    with pytest.raises(Unreadable, match=says):
        read_logits("scaled_dot_product_attention", (q, q, q), {})


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}])
def test_keys_that_a_module_adds_are_not_followed(options):
    torch.manual_seed(0)
    branch = Attend("module")
    branch.inner = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    model = nn.Sequential(nn.Linear(3, 8), Unit(branch), nn.Linear(8, attending.CLASSES))
    said = "attention with keys that its module adds: bias_k, add_zero_attn"
    assert reasons(record(model)) == {said: [0]}


def test_an_error_of_ours_ends_the_set_and_not_the_recording(monkeypatch):
    def fail(*args):
        raise RuntimeError("not today")

    monkeypatch.setattr("resdiag.watch.record.attention.describe", fail)
    monitor = record(network("causal"), 3, metrics={"attention": 1})
    assert reasons(monitor) == {"an error inside resdiag: RuntimeError: not today": "all"}
    assert monitor.to_frame()["output_mean"].notna().all()


def test_several_ranks_record_no_attention_and_say_so(monkeypatch):
    ranks = SimpleNamespace(
        size=2, rank=0, sharded=False, is_open=True,
        meet=lambda *args: None, check=list, close=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr("resdiag.watch.loop.attach.find_ranks", lambda model: ranks)
    with attach(network("module"), metrics="full") as monitor:
        pass
    said = "several ranks record together, and this is not added up over them"
    assert reasons(monitor) == {said: "all"}
    assert not reasons(monitor, "expert_load")


def test_a_compiled_pass_has_no_attention_and_says_so():
    x, y = batch()
    torch._dynamo.reset()
    model = network("causal")
    with attach(model, example_inputs=(x,), metrics={"attention": 1, "optimizer": 1}) as monitor:
        out = torch.compile(model, backend="eager")(x)
        F.cross_entropy(out.flatten(0, 1), y.flatten()).backward()
        monitor.step()
    said = "torch.compile runs the pass, and its operations are not seen"
    assert reasons(monitor) == {said: "all"}


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ("ful", "unknown set of metrics 'ful'"),
        ("attention", "unknown set of metrics 'attention'"),
        ({"atention": 1}, "unknown set of metrics 'atention'"),
        ({"attention": 0}, "metrics={'attention': 0} must be a whole number from 1 on"),
        ({"attention": 2.5}, "metrics={'attention': 2.5} must be a whole number from 1 on"),
        ({"core": 5}, "metrics={'core': 5} must be 1: attach(..., every=5) records"),
        ({"core": 1, "full": 1}, "metrics has both 'full' and 'core', and 'full' contains 'core'"),
    ],
)
def test_a_wrong_set_is_named(metrics, says):
    with pytest.raises(ValueError, match="metrics") as caught:
        attach(network("causal"), metrics=metrics)
    assert says in str(caught.value)
