"""Short trainings of three well-known models under watch, one by each framework.

python studies/any-model/train.py gpt2|vit|resnet50 [FOLDER]

Writes the run folder FOLDER/<model>; `resdiag plot gradnorms FOLDER/<model>` draws it. No download:
GPT-2 learns the characters of this project's documentation, the others the embedded digits.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from resdiag.data.dataset import open_data

ROOT = Path(__file__).resolve().parent.parent.parent
SEED = 0


def digits(size: int, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    """The embedded digits, scaled to `size` pixels and normalised, in a seeded order."""
    data = open_data("digits")
    images = torch.as_tensor(data.train_images).float() / 255
    if size != images.shape[-1]:
        images = F.interpolate(images, size=size, mode="bilinear")
    images = (images - images.mean()) / images.std()
    labels = torch.as_tensor(data.train_labels).long()
    order = torch.Generator().manual_seed(SEED)
    return DataLoader(
        TensorDataset(images, labels), batch, shuffle=True, drop_last=True, generator=order
    )


def train_gpt2(folder: Path, steps: int = 150) -> None:
    """GPT-2 of 6 layers and 0.9 M parameters on characters, by the Hugging Face Trainer."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from resdiag.integrations.transformers import ResdiagCallback

    text = "".join(page.read_text("utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(letter) for letter in text])
    rows = codes[: len(codes) // 64 * 64].view(-1, 64)
    samples = [{"input_ids": row, "labels": row} for row in rows]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(letters),
            n_positions=64,
            n_embd=96,
            n_layer=6,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            warmup_steps=20,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=SEED,
        )
        watch = ResdiagCallback(every=5, record_first=5, save=folder, name="gpt2")
        Trainer(model=model, args=args, train_dataset=samples, callbacks=[watch]).train()


def train_vit(folder: Path, steps: int = 150) -> None:
    """A ViT of 6 layers on 32x32 digits in patches of 4, by Accelerate."""
    from accelerate import Accelerator
    from torchvision.models import VisionTransformer

    from resdiag.integrations.accelerate import ResdiagWatch

    accelerator = Accelerator(cpu=True)
    model: nn.Module = VisionTransformer(32, 4, 6, 4, 64, 128, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, digits(32, 32))
    done = 0
    with ResdiagWatch(
        accelerator, model, optimizer, every=5, record_first=5, save=folder, name="vit"
    ) as watch:
        while done < steps:
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                watch.step(loss)
                optimizer.zero_grad()
                done += 1
                if done == steps:
                    break


def train_resnet50(folder: Path, steps: int = 40) -> None:
    """Torchvision's ResNet-50, untouched, on digits of 64x64, by Lightning."""
    import lightning.pytorch as pl
    from torchvision.models import resnet50

    from resdiag.integrations.lightning import ResdiagCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet50(num_classes=10)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)

    watch = ResdiagCallback(every=4, record_first=4, save=folder, name="resnet50")
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    ).fit(Module(), digits(64, 16))


MODELS = {"gpt2": train_gpt2, "vit": train_vit, "resnet50": train_resnet50}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MODELS:
        sys.exit(f"unknown model '{name}'; known: {', '.join(MODELS)}")
    torch.manual_seed(SEED)
    MODELS[name](Path(sys.argv[2] if len(sys.argv) > 2 else "runs") / name)
