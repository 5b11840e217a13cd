"""Each framework records exactly what the plain loop records on the same seeds."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import resdiag
from resdiag.models.resnet import build_model

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3
CASES = [(1, None), (2, None), (1, 0.05), (2, 0.05)]


def plain(model, optimizer, batches, loss_of, accumulate, clip):
    """The loop written by hand: the frames it records."""
    with resdiag.attach(model, optimizer=optimizer, grad_read_point="pre_clip") as monitor:
        model.train()
        for begin in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            losses = []
            for batch in batches[begin : begin + accumulate]:
                losses.append(loss_of(model, batch) / accumulate)
                losses[-1].backward()
            monitor.read_gradients("pre_clip")
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            monitor.step(torch.stack(losses).sum())
    return monitor


def assert_same_record(found, wanted, model, twin, clip):
    """Numbers, points and weights are equal, to the bit; every hook is gone."""
    for per in ("block", "step"):
        a, b = found.to_frame(per), wanted.to_frame(per)
        shared = [name for name in b.columns if name in a.columns]
        assert {"grad_param", "grad_output"} <= set(shared) or per == "step"
        assert len(a) == len(b) > 0
        assert per == "block" or a.loss.notna().all()
        for name in shared:
            if name == "loss":  # as many operations on it as the framework does
                assert np.allclose(a[name], b[name], rtol=1e-6)
            elif name != "point":
                assert np.array_equal(a[name], b[name], equal_nan=True), name
        assert set(a.point) == {"pre_clip"}
    assert len(found.blocks) == len(wanted.blocks) > 0
    if clip:  # what is recorded is what was there before
        assert (found.to_frame("step").grad_norm > clip).all()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def assert_saved(folder, wanted, capsys):
    """The folder holds what the plain loop recorded, and its verdict was said."""
    run, frame = resdiag.load_run(folder), wanted.to_frame()
    assert np.array_equal(run.metrics().grad_output, frame.grad_output)
    assert run.point == "pre_clip"
    assert f"resdiag: {folder}: {run.verdict.name}. " in capsys.readouterr().err


class Images(Dataset):
    def __init__(self, count, size=16):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 3, size, size, generator=generator)
        self.y = torch.randint(10, (count,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def image_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


# -- Lightning --------------------------------------------------------------------------------


def lightning_fit(net, accumulate, clip, callback, **more):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return image_loss(self.net, batch)

        def validation_step(self, batch, index):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    settings = {"max_epochs": 1, "val_check_interval": accumulate, "num_sanity_val_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        accumulate_grad_batches=accumulate, gradient_clip_val=clip, **{**settings, **more},
    )  # fmt: skip
    data = Images(4 * STEPS * accumulate)
    trainer.fit(Module(), DataLoader(data, 4), DataLoader(Images(4), 4))
    return trainer


@pytest.mark.parametrize(("accumulate", "clip"), CASES)
def test_lightning_records_what_the_plain_loop_records(tmp_path, capsys, accumulate, clip):
    pytest.importorskip("lightning")
    from resdiag.integrations.lightning import ResdiagCallback

    model = build_model("original", 8, width=0.25, seed=0)
    twin = copy.deepcopy(model)
    callback = ResdiagCallback(save=tmp_path / "run", name="tiny")
    lightning_fit(model, accumulate, clip, callback)
    batches = list(DataLoader(Images(4 * STEPS * accumulate), 4))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    wanted = plain(twin, optimizer, batches, image_loss, accumulate, clip)
    assert_same_record(callback.monitor, wanted, model, twin, clip)
    assert_saved(tmp_path / "run", wanted, capsys)
    assert resdiag.load_run(tmp_path / "run").curve().loss.notna().all()


def in_bfloat16(loss_of):
    """The loss under autocast, as frameworks compute it."""

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    return loss


def test_lightning_in_mixed_precision_records_what_the_plain_loop_records():
    pytest.importorskip("lightning")
    from resdiag.integrations.lightning import ResdiagCallback

    model = build_model("original", 8, width=0.25, seed=0)
    twin, callback = copy.deepcopy(model), ResdiagCallback()
    lightning_fit(model, 1, 0.05, callback, precision="bf16-mixed")
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = list(DataLoader(Images(4 * STEPS), 4))
    wanted = plain(twin, optimizer, batches, in_bfloat16(image_loss), 1, 0.05)
    assert_same_record(callback.monitor, wanted, model, twin, 0.05)


def test_lightning_leaves_nothing_after_an_exception_and_names_a_module():
    pytest.importorskip("lightning")
    from resdiag.integrations.lightning import ResdiagCallback

    model = build_model("original", 8, width=0.25, seed=0)
    callback = ResdiagCallback("net")
    with pytest.raises(RuntimeError, match="has not begun"):
        _ = callback.monitor
    callback.on_train_batch_end = lambda *a: (_ for _ in ()).throw(OSError("lost"))
    with pytest.raises(OSError, match="lost"):
        lightning_fit(model, 1, None, callback)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "closed" in repr(callback.monitor)


@pytest.mark.parametrize("kind", ["lightning", "transformers", "accelerate"])
def test_stop_ends_the_training_as_the_framework_does_and_says_why(tmp_path, capsys, kind):
    pytest.importorskip(kind)
    model = gpt2() if kind == "transformers" else build_model("elu_pre", 8, width=0.25, seed=0)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 1e4)
    told = []

    def stop(finding):
        told.append(finding)
        raise resdiag.StopTraining(finding)

    if kind == "lightning":
        from resdiag.integrations.lightning import ResdiagCallback as Lightning

        trainer = lightning_fit(model, 1, None, Lightning(on_finding=stop))
        assert trainer.global_step < STEPS
    elif kind == "transformers":
        from resdiag.integrations.transformers import ResdiagCallback as Callback

        trainer = trainer_of(model, tmp_path, 1, None, Callback(on_finding=stop))
        trainer.train()
        assert trainer.state.global_step < STEPS
    else:
        with pytest.raises(resdiag.StopTraining):
            accelerate_fit(model, 1, None, on_finding=stop)
    assert told
    assert kind == "accelerate" or f"training stops: {told[0].name}" in capsys.readouterr().err
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- Hugging Face Trainer ---------------------------------------------------------------------


class Texts(Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(32, (count, 12), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def trainer_of(model, folder, accumulate, clip, callback, **more):
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *given):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = {
        "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate,
        "max_grad_norm": clip or 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return InOrder(
        model=model, args=TrainingArguments(output_dir=str(folder), **{**settings, **more}),
        train_dataset=Texts(4 * 6 * accumulate), eval_dataset=Texts(4),
        optimizers=(optimizer, None), callbacks=[callback],
    )  # fmt: skip


def text_loss(accumulate):
    """The Trainer divides the sum over tokens by the tokens of all micro-batches."""

    def loss(model, batch):
        count = batch["labels"].numel() * accumulate
        given = {"num_items_in_batch": torch.tensor(count)}
        return model(**batch, **given).loss * accumulate

    return loss


@pytest.mark.parametrize(("accumulate", "clip"), CASES)
def test_the_trainer_records_what_the_plain_loop_records(tmp_path, capsys, accumulate, clip):
    pytest.importorskip("transformers")
    from accelerate import Accelerator

    from resdiag.integrations.transformers import ResdiagCallback

    method = Accelerator.unscale_gradients
    model = gpt2()
    twin = copy.deepcopy(model)
    callback = ResdiagCallback(save=tmp_path / "run", name="gpt2")
    trainer_of(model, tmp_path, accumulate, clip, callback).train()
    batches = list(DataLoader(Texts(4 * STEPS * accumulate), 4))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    wanted = plain(twin, optimizer, batches, text_loss(accumulate), accumulate, clip)
    assert_same_record(callback.monitor, wanted, model, twin, clip)
    assert Accelerator.unscale_gradients is method
    assert_saved(tmp_path / "run", wanted, capsys)


def test_the_trainer_in_mixed_precision_records_what_the_plain_loop_records(tmp_path):
    pytest.importorskip("transformers")
    from resdiag.integrations.transformers import ResdiagCallback

    model, callback = gpt2(), ResdiagCallback()
    twin = copy.deepcopy(model)
    trainer_of(model, tmp_path, 1, 0.05, callback, bf16=True).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = list(DataLoader(Texts(4 * STEPS), 4))
    wanted = plain(twin, optimizer, batches, in_bfloat16(text_loss(1)), 1, 0.05)
    assert_same_record(callback.monitor, wanted, model, twin, 0.05)


def test_the_trainer_counts_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    from resdiag.integrations.transformers import ResdiagCallback

    whole = ResdiagCallback()
    first, rest = (ResdiagCallback(save=tmp_path / "run") for _ in range(2))
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer_of(gpt2(), tmp_path / "a", 1, 0.05, whole, **more).train()
    trainer_of(gpt2(), tmp_path / "b", 1, 0.05, first, **{**more, "max_steps": 2}).train()
    trainer_of(gpt2(), tmp_path / "b", 1, 0.05, rest, **more).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
    )
    wanted = whole.monitor.to_frame()
    found = rest.monitor.to_frame()
    assert first.monitor.to_frame().step.unique().tolist() == [0, 1]
    assert found.step.unique().tolist() == [2, 3]
    late = wanted[wanted.step >= 2].reset_index(drop=True)
    assert np.array_equal(found.grad_output, late.grad_output)
    assert np.array_equal(found.update_ratio, late.update_ratio)
    for folder, steps in (("run", [0, 1]), ("run-from-2", [2, 3])):
        assert resdiag.load_frame(tmp_path / folder).step.unique().tolist() == steps


# -- Accelerate -------------------------------------------------------------------------------


def vit():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=10)


def accelerate_fit(model, accumulate, clip, **options):
    accelerate = pytest.importorskip("accelerate")
    from resdiag.integrations.accelerate import ResdiagWatch

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(Images(4 * STEPS * accumulate), 4)
    net, optimizer, loader = accelerator.prepare(model, inner, loader)
    with ResdiagWatch(accelerator, net, optimizer, **options) as watch:
        for batch in loader:
            with accelerator.accumulate(net):
                loss = image_loss(net, batch)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                watch.step(loss)
                optimizer.zero_grad()
    return watch


@pytest.mark.parametrize(("accumulate", "clip"), CASES)
def test_accelerate_records_what_the_plain_loop_records(tmp_path, capsys, accumulate, clip):
    model = vit()
    twin = copy.deepcopy(model)
    watch = accelerate_fit(model, accumulate, clip, save=tmp_path / "run")
    plainly = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    batches = list(DataLoader(Images(4 * STEPS * accumulate), 4))
    wanted = plain(twin, plainly, batches, image_loss, accumulate, clip)
    assert_same_record(watch.monitor, wanted, model, twin, clip)
    assert_saved(tmp_path / "run", wanted, capsys)


def test_a_callback_tells_its_trackers_everything_it_recorded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from events import read_events

    from resdiag.integrations.accelerate import ResdiagWatch

    accelerator = accelerate.Accelerator(cpu=True)
    model = vit()
    net, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trackers = [f"tensorboard:{tmp_path}"]
    with ResdiagWatch(accelerator, net, optimizer, trackers=trackers, name="vit") as watch:
        for batch in DataLoader(Images(8), 4):
            accelerator.backward(image_loss(net, batch))
            optimizer.step()
            watch.step()
            optimizer.zero_grad()
    events, frame = read_events(tmp_path / "vit"), watch.monitor.to_frame()
    for row in frame.itertuples():
        tag = f"grad_output/block_{row.block:03d}"
        assert events[tag, row.step] == pytest.approx(row.grad_output, rel=1e-6)
    assert len(frame) == 8
    assert watch.monitor.warnings == []
