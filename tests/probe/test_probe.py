"""`resdiag probe`: curvature against closed forms, numbers against theory, mistakes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import resdiag
from resdiag.diagnose.finding import Finding
from resdiag.errors import UsageError
from resdiag.models.example import Example
from resdiag.models.source import build_source
from resdiag.probe.batch import choose_loss, load_weights, open_batch
from resdiag.probe.critical_rate import largest_curvature
from resdiag.probe.probe import probe_model
from resdiag.theory.prediction import predict

TINY_GPT2 = [
    word
    for pair in ("n_layer=2", "n_embd=32", "n_head=2", "vocab_size=50", "bos_token_id=0",
                 "eos_token_id=0")
    for word in ("--arg", pair)
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESDIAG_RUNS", raising=False)


def test_curvature_is_the_largest_eigenvalue_of_the_whole_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    names, values = zip(*net.named_parameters(), strict=True)

    def loss_of(flat):
        parts = flat.split([v.numel() for v in values])
        given = {n: p.view_as(v) for n, p, v in zip(names, parts, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, given, (x,)), y)

    flat = torch.cat([v.detach().reshape(-1) for v in values])
    exact = float(torch.linalg.eigvalsh(torch.func.hessian(loss_of)(flat))[-1])
    found = largest_curvature(F.cross_entropy(net(x), y), list(net.parameters()), steps=30,
                              tolerance=1e-4)  # fmt: skip
    assert found.converged
    assert found.value == pytest.approx(exact, rel=1e-2)
    assert found.critical_lr == pytest.approx(2 / exact, rel=1e-2)
    rough = largest_curvature(F.cross_entropy(net(x), y), list(net.parameters()), steps=2)
    assert rough.value <= exact * (1 + 1e-4)  # an estimate from below


def test_gradient_descent_converges_below_the_critical_rate_and_diverges_above():
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    scales = torch.tensor([1.0, 7.0])
    rate = largest_curvature((scales * x**2).sum() / 2, [x]).critical_lr
    assert rate == pytest.approx(2 / 7, rel=1e-4)
    for factor, ends in ((0.95, True), (1.05, False)):
        with torch.no_grad():
            y = torch.ones(2)
            for _ in range(400):
                y = y - factor * rate * scales * y
        assert (y.norm() < 1) == ends


def test_what_has_no_second_derivative_says_so():
    w = torch.ones(3, requires_grad=True)
    assert largest_curvature((w * 2).sum(), [w]).reason == "the loss is linear"

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    found = largest_curvature(Once.apply(w).square().sum(), [w])
    assert math.isnan(found.critical_lr)
    assert found.reason.startswith("no positive curvature")


def test_the_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    probe_model("resdiag:d-8", {"width": 0.25}, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_of_ours_is_what_theory_says():
    found = probe_model("resdiag:b-20", batch_size=16, curvature=False)
    theory = predict("b", 20, s0=float(found.run.metrics()["input_second_moment"].iloc[0]))
    assert found.verdict.name == "grows_at_init"
    growth = found.summary()["signal"]["growth_per_block"]
    assert growth == pytest.approx(theory.growth_per_block, rel=0.1)
    assert found.curvature.reason == "not asked for"
    assert found.run.config.variant == "elu_pre"


def test_the_command_writes_a_run_its_plots_and_one_document(call, tmp_path):
    pytest.importorskip("transformers")
    words = ["probe", "transformers:gpt2", *TINY_GPT2, "--batch-size", "2", "--out", "mine"]
    code, out, _ = call(*words, "--json")
    assert code == 0
    document = json.loads(out, parse_constant=pytest.fail)
    assert document["loss"]["name"] == "next-token cross-entropy of random tokens"
    assert document["loss"]["value"] == pytest.approx(math.log(50), rel=0.1)
    assert [block["name"] for block in document["blocks"]] == [
        f"transformer.h.{i}{part}" for i in (0, 1) for part in ("", "#1")
    ]
    assert document["verdict"]["name"] == "undetermined"  # one batch shows no learning
    assert document["skip_gain"]["last"] == 1
    assert document["critical_lr"]["value"] > 0
    assert [Path(file).stem for file in document["files"]] == ["signal", "gradnorms"]
    assert all((tmp_path / file).stat().st_size > 1000 for file in document["files"])
    run = resdiag.load_run("mine")
    assert run.verdict is not None
    assert run.verdict.name == "undetermined"
    code, text, _ = call(*words)  # again, into the same folder: the same numbers
    assert code == 0
    assert f"{document['critical_lr']['value']:.3g} = 2 /" in text
    assert "other plots: resdiag plot growth|biasshift|skip mine\n" in text
    assert call("explain", "mine")[0] == 0
    assert call("plot", "growth", "mine", "--format", "svg")[0] == 0


def test_a_probe_draws_what_its_findings_name():
    options = {"arguments": {"width": 0.25}, "batch_size": 2, "curvature": False}
    found = probe_model("resdiag:d-8", **options)
    named = Finding(name="skip_collapsed", summary="", why="", evidence=())
    collapsed = replace(found, verdict=replace(found.verdict, findings=(named,)))
    assert [file.stem for file in found.draw()] == ["signal", "gradnorms"]
    assert [file.stem for file in collapsed.draw()] == ["signal", "gradnorms", "biasshift", "skip"]


def test_weights_are_loaded_from_both_formats_and_change_the_numbers(tmp_path):
    model = build_source("resdiag:d-8", {"width": 0.25}, seed=5).model
    torch.save({"state_dict": model.state_dict()}, "weights.pt")
    save_file(model.state_dict(), "weights.safetensors")
    options = {"arguments": {"width": 0.25}, "batch_size": 2, "curvature": False}
    fresh, *loaded = (
        probe_model("resdiag:d-8", weights=path, **options).run.metrics()["grad_param"].tolist()
        for path in (None, tmp_path / "weights.pt", tmp_path / "weights.safetensors")
    )
    assert loaded[0] == loaded[1] != fresh


def test_weights_that_would_execute_code_or_do_not_fit_are_refused(tmp_path):
    import pickle  # noqa: TID251

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    model = build_source("resdiag:d-8").model
    with pytest.raises(UsageError, match="holds no weights"):
        load_weights(model, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="no such file"):
        load_weights(model, tmp_path / "none.pt")
    torch.save({"stem": torch.ones(1)}, "other.pt")
    with pytest.raises(UsageError, match=r"does not fit the model: .*Missing key"):
        load_weights(model, tmp_path / "other.pt")


def test_the_loss_follows_the_output():
    batch = Example(kwargs={})
    cases = (
        (torch.randn(4, 7), "cross-entropy with random labels", 7),
        (torch.randn(4, 3, 8, 8), "mean square of the output", 0),
        ({"out": torch.randn(4, 5)}, "cross-entropy with random labels", 5),
        ((torch.zeros(2, dtype=torch.long), torch.randn(4, 1)), "mean square of the output", 0),
    )
    for output, name, classes in cases:
        found = choose_loss(output, batch, None)
        assert (found.name, found.classes) == (name, classes)
    x = torch.randn(4, 7)
    labels = torch.tensor([0, 1, 2, 6])
    assert choose_loss(x, batch, labels).value == F.cross_entropy(x, labels)
    assert choose_loss(x, batch, None, "mean-square").value == x.square().mean()
    with pytest.raises(UsageError, match="more classes than the model's 7 outputs"):
        choose_loss(x, batch, labels + 1)
    with pytest.raises(UsageError, match="no floating-point tensor"):
        choose_loss(torch.zeros(3, dtype=torch.long), batch, None)


def test_real_images_are_taken_with_their_labels_and_resized(call):
    words = ["probe", "torchvision:resnet18", "--data", "digits", "--batch-size", "4",
             "--input-shape", "3,48,48", "--no-curvature", "--json"]  # fmt: skip
    code, out, _ = call(*words)
    assert code == 0
    document = json.loads(out)
    assert document["batch"] == "float32 4x3x48x48"
    assert "labels" in document["loss"]["name"]
    assert "random" not in document["loss"]["name"]
    assert document["critical_lr"]["reason"] == "not asked for"


def test_a_text_is_taken_as_bytes_modulo_the_vocabulary(call, tmp_path):
    pytest.importorskip("transformers")
    data = bytes(range(256)) * 2
    (tmp_path / "text.txt").write_bytes(data)
    words = ["probe", "transformers:gpt2", *TINY_GPT2, "--data", "text:text.txt", "--batch-size",
             "3", "--no-curvature", "--json"]  # fmt: skip
    code, out, _ = call(*words)
    assert code == 0
    document = json.loads(out)
    assert document["batch"] == "input_ids int64 3x32"
    assert document["loss"]["name"] == "next-token cross-entropy of the bytes of text.txt"
    arguments = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50}
    built = build_source("transformers:gpt2", arguments)
    example, labels, name = open_batch(built, "text:text.txt", None, 3, None, 0)
    assert (labels, name) == (None, "text:text.txt")
    with pytest.raises(UsageError, match="no such file: none"):
        open_batch(built, "text:none", None, 3, None, 0)
    folded = [byte % 50 for byte in data]
    windows = {tuple(folded[start : start + 32]) for start in range(len(folded) - 31)}
    assert {tuple(row) for row in example.kwargs["input_ids"].tolist()} <= windows


def test_a_model_without_additions_is_probed_by_its_units(call):
    code, out, err = call("probe", "torchvision:squeezenet1_1", "--input-shape", "3,64,64",
                          "--batch-size", "2", "--no-curvature", "--json")  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document["grad_norm"] > 0
    assert [block["name"] for block in document["blocks"]][:3] == [
        f"features.{i}" for i in (0, 3, 4)
    ]
    assert document["gradient"]["ratio_first_to_last"] > 0
    assert [Path(file).stem for file in document["files"]] == ["signal", "gradnorms"]
    assert document["notes"][0].startswith("no residual addition: 10 modules are recorded")
    assert err == ""
    code, out, _ = call("probe", "torchvision:squeezenet1_1", "--input-shape", "3,64,64",
                        "--batch-size", "2", "--no-curvature", "--blocks", "features.1?",
                        "--json")  # fmt: skip
    assert [block["name"] for block in json.loads(out)["blocks"]] == [
        "features.10", "features.11", "features.12",
    ]  # fmt: skip
    assert err.count("Traceback") == 0


def test_a_model_beyond_the_memory_is_narrowed_at_its_depth_or_refused(monkeypatch):
    pytest.importorskip("transformers")
    from resdiag.models import inspection
    from resdiag.probe import probe

    for module in (inspection, probe):
        monkeypatch.setattr(module, "free_memory", lambda: 2e9)
    built, notes = probe._build("transformers:llama", {}, seed=0)
    assert len(built.model.model.layers) == 32
    assert "narrowed to hidden_size=256" in notes[0]
    assert "the depth is kept" in notes[0]
    with pytest.raises(UsageError, match=r"it needs about 2\.8 GB"):
        probe._build("torchvision:vit_b_16", {}, seed=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["torchvision:resnet1"], "did you mean"),
        (["resdiag:d-8", "--blocks", "stage"], "blocks: 'stage' matches no module of ResNet"),
        (["resdiag:d-8", "--loss", "mse"], "unknown loss 'mse'"),
        (["resdiag:d-8", "--data", "digit"], "unknown data 'digit'"),
        (["resdiag:d-8", "--weights", "none.pt"], "no such file"),
        (["torchvision:fasterrcnn_resnet50_fpn"], "does not run on"),
        (["resdiag:d-8", "--data", "text:none.txt"], "no such file: none.txt"),
        (["resdiag:d-8", "--data", "text:empty.txt"], "empty.txt is empty"),
        (
            ["resdiag:d-8", "--data", "text:short.txt"],
            "--data text: gives tokens; resdiag:d-8 takes float32 8x3x32x32 (images, e.g.",
        ),
        (
            ["transformers:gpt2", *TINY_GPT2, "--data", "digits"],
            "--data gives images; transformers:gpt2 takes input_ids int64 8x32 (--data text:FILE",
        ),
        (
            ["transformers:gpt2", *TINY_GPT2, "--data", "text:short.txt"],
            "short.txt has 5 bytes, a sample needs 32 (a longer file, or --input-shape 5)",
        ),
        (["resdiag:d-8", "--seed", "-1"], "seed"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(call, words, said, tmp_path):
    if "transformers:gpt2" in words:
        pytest.importorskip("transformers")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"bytes")
    code, out, err = call("probe", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_with_another_run_is_not_written_over(call):
    net = resdiag.build_model("elu", 8, width=0.25)
    with resdiag.attach(net) as monitor:
        net(torch.ones(2, 3, 32, 32)).sum().backward()
        monitor.step()
    resdiag.save(monitor, "kept")
    code, _, err = call("probe", "resdiag:d-8", "--out", "kept")
    assert code == 2
    assert "holds a run that is not a probe" in err


def test_the_page_about_any_model_runs(capsys):
    import re
    from pathlib import Path

    page = Path(__file__).resolve().parents[2] / "docs" / "howto" / "any-model.md"
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile("".join(b for kind, b in found if kind == "python"), page.name, "exec"), {})
    assert capsys.readouterr().out == "".join(b for kind, b in found if kind == "text")
    assert resdiag.load_run("runs/mine").label == "resnet18"
