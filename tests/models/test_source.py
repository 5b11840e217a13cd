"""MODEL strings: every form builds, every mistake is one line, nothing is drawn or downloaded."""

import pytest
import torch
from torch import nn

from resdiag.errors import UsageError
from resdiag.models.example import example_batch
from resdiag.models.inspection import check_memory, words_of
from resdiag.models.source import build_source, parse_arguments

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.head = nn.Linear(width, classes)
    def forward(self, x):
        x = self.stem(x)
        return self.head((x + x.relu()).mean((2, 3)))

ready = nn.Linear(5, 2)
number = 3

def ids():
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))

def flat():
    return nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2))

def fails(**kwargs):
    raise RuntimeError("no such\\nthing")

def wrong():
    return "a text"

class Picky(nn.Linear):
    def __init__(self): super().__init__(4, 4)
    def forward(self, x):
        raise ValueError("never")
"""


@pytest.fixture
def _here(tmp_path, monkeypatch):
    """A folder with a module of the user's, as the current one."""
    import sys

    (tmp_path / "mynets.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "needs.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mynets", "broken", "needs"):
        sys.modules.pop(name, None)


def refused(name, *arguments):
    with pytest.raises(UsageError) as caught:
        build_source(name, parse_arguments(arguments))
    text = f"{caught.value.message} ({caught.value.hint})"
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "kind", "shapes"),
    [
        ("torchvision:resnet18", "ResNet", [(2, 3, 224, 224)]),
        ("torchvision:inception_v3", "Inception3", [(2, 3, 299, 299)]),
        ("torchvision:vit_b_16", "VisionTransformer", [(2, 3, 224, 224)]),
        ("torchvision:r3d_18", "VideoResNet", [(2, 3, 16, 112, 112)]),
        ("torchvision:fasterrcnn_resnet50_fpn", "FasterRCNN", [(3, 224, 224)] * 2),
        ("timm:vit_tiny_patch16_224", "VisionTransformer", [(2, 3, 224, 224)]),
        ("timm:dm_nfnet_f0", "NormFreeNet", [(2, 3, 192, 192)]),
        ("transformers:gpt2", "GPT2LMHeadModel", [(2, 32)]),
        ("transformers:GPT2Model", "GPT2Model", [(2, 32)]),
        ("transformers:bert", "BertForMaskedLM", [(2, 32)]),
        ("transformers:t5", "T5ForConditionalGeneration", [(2, 32), (2, 32)]),
        ("transformers:vit", "ViTForImageClassification", [(2, 3, 224, 224)]),
        ("transformers:deit", "DeiTForImageClassification", [(2, 3, 224, 224)]),
        ("transformers:whisper", "WhisperForConditionalGeneration", [(2, 80, 3000), (2, 32)]),
        (
            "transformers:speech_to_text",
            "Speech2TextForConditionalGeneration",
            [(2, 128, 80), (2, 32)],
        ),
        ("transformers:wav2vec2-bert", "Wav2Vec2BertModel", [(2, 128, 160)]),
        ("transformers:encodec", "EncodecModel", [(2, 1, 16000)]),
        ("transformers:audio-spectrogram-transformer", "ASTModel", [(2, 1024, 128)]),
        ("transformers:CLIPModel", "CLIPModel", [(2, 32), (2, 3, 224, 224)]),
        ("resdiag:b-20", "ResNet", [(2, 3, 32, 32)]),
    ],
)
def test_every_library_gives_a_model_in_training_mode_and_a_batch_of_its_form(name, kind, shapes):
    pytest.importorskip(name.partition(":")[0])
    built = build_source(name, meta=True)
    assert type(built.model).__name__ == kind
    assert built.model.training
    batch = example_batch(built, batch_size=2)
    assert [tuple(x.shape) for x in batch.tensors.values()] == shapes


def test_names_of_ours_are_known_to_theory_unless_their_shape_is_changed():
    built = build_source("resdiag:b-20")
    assert (built.variant, built.depth) == ("elu_pre", 20)
    assert build_source("resdiag:b-20", {"num_classes": 7}).variant == "elu_pre"
    assert build_source("resdiag:b-20", {"width": 0.5}).variant == ""


def test_the_seed_decides_the_weights_and_the_global_random_state_is_put_back():
    before = torch.get_rng_state()
    one, again, other = (build_source("resdiag:d-8", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    built = build_source("resdiag:d-8")
    first, second = (example_batch(built, batch_size=2, seed=0).args[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mynets:Net", (2, 2, 32, 32)),
        ("mynets:ids", (2, 32)),
        ("mynets:flat", (2, 7)),
        ("mynets:ready", (2, 5)),
    ],
)
def test_a_factory_in_the_current_folder_gets_a_batch_that_its_first_layer_suggests(name, shape):
    built = build_source(name)
    (x,) = example_batch(built, batch_size=2).tensors.values()
    assert tuple(x.shape) == shape
    assert built.model(x).shape[0] == 2


@pytest.mark.usefixtures("_here")
def test_arguments_and_shapes_reach_the_factory():
    built = build_source("mynets:Net", parse_arguments(["width=4", "classes=6"]))
    assert built.model.head.weight.shape == (6, 4)
    (x,) = example_batch(built, batch_size=1, shape=(2, 9, 8)).tensors.values()
    assert x.shape == (1, 2, 9, 8)
    gpt2 = build_source("transformers:gpt2", {"n_layer": 3, "n_embd": 24, "n_head": 2}, meta=True)
    assert len(gpt2.model.transformer.h) == 3
    assert example_batch(gpt2, batch_size=1, shape=(5,)).tensors["input_ids"].shape == (1, 5)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", "is not one of torchvision:NAME, timm:NAME"),
        ("torchvision:resnet5", "unknown torchvision model 'resnet5'; did you mean 'resnet50'"),
        ("torchvison:resnet50", "unknown library or module 'torchvison'; did you mean 'torchvis"),
        ("torchvision:quantized_resnet18", "is quantised"),
        ("timm:resnet51", "unknown timm model 'resnet51'; did you mean"),
        ("transformers:gpt3", "unknown transformers model 'gpt3'; did you mean"),
        ("transformers:GPT2LMHedModel", "did you mean 'GPT2LMHeadModel'"),
        ("resdiag:elu_prr-110", "unknown variant 'elu_prr'; did you mean 'elu_pre'?"),
        ("resdiag:elu_pre-21", "depth 21 is not 6n+2"),
        ("resdiag:elu_pre", "is not resdiag:VARIANT-DEPTH"),
        ("mynets:Nett", "unknown callable in mynets 'Nett'; did you mean 'Net'?"),
        ("mynets:fails", "mynets:fails cannot be built: RuntimeError: no such thing"),
        ("mynets:wrong", "mynets:wrong returned a str, not a torch.nn.Module"),
        ("mynets:number", "mynets:number is a int, not a callable or a module"),
        ("broken:f", "broken cannot be imported: ZeroDivisionError"),
        ("needs:f", "needs cannot be imported: ModuleNotFoundError: No module named 'not_there"),
    ],
)
def test_mistakes_are_one_line_that_names_the_way_out(name, words):
    assert words in refused(name)


def test_a_wrong_argument_is_reported_with_what_the_factory_said():
    assert "unexpected keyword argument 'wdth'" in refused("resdiag:d-8", "wdth=2")
    with pytest.raises(UsageError, match="--arg 'depth' is not key=value"):
        parse_arguments(["depth"])


def test_a_missing_library_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'resdiag[timm]'" in refused("timm:resnet18")


@pytest.mark.usefixtures("_here")
def test_an_input_that_cannot_be_guessed_says_what_was_tried():
    with pytest.raises(UsageError, match=r"its input cannot be guessed: tried 4, 16x4; ValueError"):
        example_batch(build_source("mynets:Picky"), batch_size=1)
    with pytest.raises(UsageError, match="--input-shape does not fit: tried 3x3"):
        example_batch(build_source("mynets:flat"), batch_size=1, shape=(3, 3))


def test_a_model_beyond_the_memory_is_refused_with_the_estimate():
    built = build_source("resdiag:d-8")
    check_memory(built, copies=1)
    with pytest.raises(UsageError, match=r"has 75\.0 k parameters: it needs about .* GB are free"):
        check_memory(built, copies=1e12)
    assert words_of(6_738_415_616) == "6.74 G"


def test_the_modes_of_the_users_modules_are_put_back_after_guessing():
    class Mine(nn.Sequential):
        pass

    model = Mine(nn.Linear(3, 2), nn.Dropout())
    model[1].eval()
    from resdiag.models.source import Built

    example_batch(Built(name="x:y", library="", model=model), batch_size=1)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
