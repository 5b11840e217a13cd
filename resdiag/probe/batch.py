"""The batch of a probe and its loss: generated, images with their labels, or a text as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resdiag.errors import UsageError
from resdiag.models.example import Example, example_batch
from resdiag.models.source import Built, error_words

LOSSES = ("auto", "cross-entropy", "mean-square")
"""What `--loss` accepts."""


TEXT = "text:"
"""What begins a `--data` that names a text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """The scalar that is differentiated.

    Attributes:
        name: In words.
        value: The scalar, with its graph.
        classes: Classes of a cross-entropy, 0 of another loss.
    """

    name: str
    value: Tensor
    classes: int


class Batch(NamedTuple):
    """Inputs, labels if there are any, and the name of where they come from."""

    example: Example
    labels: Tensor | None
    source: str

    def loss(self, model: nn.Module, kind: str, seed: int) -> Loss:
        """The loss of a model on the batch.

        Args:
            model: The model.
            kind: One of `LOSSES`.
            seed: Of random labels.

        Raises:
            UsageError: The model does not run on the batch, or its output has no such loss.
        """
        example = self.example
        try:
            output = model(*example.args, **example.kwargs)
        except Exception as error:
            text = error_words(error, 300)
            raise UsageError(f"the model does not run on {example.describe()}: {text}") from error
        found = choose_loss(output, example, self.labels, kind, seed)
        if not found.value.requires_grad:
            raise UsageError("the loss has no gradient: every parameter is frozen")
        return found


def open_batch(
    built: Built, data: str, root: Path | None, size: int, shape: Sequence[int] | None, seed: int
) -> Batch:
    """Open the batch of a probe.

    Args:
        built: The model.
        data: "" for a generated batch, "text:FILE", or images as `resdiag run --data`.
        root: Folder of downloaded data sets.
        size: Samples.
        shape: Shape of one sample instead of the model's own.
        seed: Which samples are taken.

    Raises:
        UsageError: The data cannot be read or are not what the model takes.
    """
    if not data:
        example = example_batch(built, batch_size=size, shape=shape, seed=seed)
        return Batch(example, None, "generated")
    if data.startswith(TEXT):
        check_text(data)
    form = example_batch(built, batch_size=size, shape=shape)
    if data.startswith(TEXT):
        example = _tokens(built, form, Path(data.removeprefix(TEXT)), size, seed)
        return Batch(example, None, data)
    return _images(built, form, data, root, size, seed)


def check_text(data: str) -> None:
    """Refuse a "text:FILE" whose file is missing or empty.

    Raises:
        UsageError: It is.
    """
    path = Path(data.removeprefix(TEXT))
    if not path.is_file():
        raise UsageError(f"no such file: {path}", "--data text:FILE takes any file, as bytes")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty")


def _images(
    built: Built, form: Example, data: str, root: Path | None, size: int, seed: int
) -> Batch:
    from resdiag.data.augment import Augmenter
    from resdiag.data.dataset import open_data

    wanted = next(iter(form.tensors.values()))
    if wanted.dim() != 4 or wanted.shape[1] != 3 or len(form.tensors) != 1:
        takes_tokens = not any(x.is_floating_point() for x in form.tensors.values())
        hint = "--data text:FILE gives tokens" if takes_tokens else "leave --data out"
        raise UsageError(f"--data gives images; {built.name} takes {form.describe()}", hint)
    found = open_data(data, root)
    images, labels = Augmenter(found, size, seed, augment=False).batch(0)
    if images.shape[2:] != wanted.shape[2:]:
        images = F.interpolate(images, tuple(wanted.shape[2:]), mode="bilinear", antialias=True)
    key = next(iter(form.kwargs), "")
    example = Example(kwargs={key: images}) if key else Example(args=(images,), kwargs={})
    return Batch(example, labels, found.name)


def _tokens(built: Built, form: Example, path: Path, size: int, seed: int) -> Example:
    """Windows of a file's bytes, modulo the vocabulary, where the model takes token ids."""
    count = _vocabulary(built.model)
    inputs = form.tensors
    if count is None or any(x.is_floating_point() or x.dim() != 2 for x in inputs.values()):
        hint = "images, e.g. --data digits, or no --data"
        raise UsageError(f"--data text: gives tokens; {built.name} takes {form.describe()}", hint)
    length = max(x.shape[1] for x in inputs.values())
    data = path.read_bytes()
    if len(data) < length:
        raise UsageError(
            f"{path} has {len(data)} bytes, a sample needs {length}",
            f"a longer file, or --input-shape {len(data)}",
        )
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() % count
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (size,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(length)]

    def put(value: object) -> object:
        return windows[:, : value.shape[1]] if isinstance(value, Tensor) else value

    return replace(
        form,
        args=tuple(map(put, form.args)),
        kwargs={key: put(value) for key, value in form.kwargs.items()},
        tokens=f"the bytes of {path.name}",
    )


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model knows: as its configuration says, or its first embedding."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    known = getattr(config, "vocab_size", None)
    if isinstance(known, int):
        return known
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return None if first is None else first.num_embeddings


def choose_loss(
    output: object, example: Example, labels: Tensor | None, loss: str = "auto", seed: int = 0
) -> Loss:
    """The loss of a model's output.

    Cross-entropy where the output is (N, K) logits, with `labels` or uniformly random ones; of
    tokens (N, T, K) where the model was given token ids: the next token of a decoder, a random one
    of anything else. The mean square of the output otherwise.

    Args:
        output: What the model returned.
        example: What it was given.
        labels: Of the samples; None draws them.
        loss: One of `LOSSES`.
        seed: Of random labels.

    Raises:
        UsageError: There is no floating output, or no logits where cross-entropy was asked for.
    """
    logits = main_output(output)
    if logits is None:
        raise UsageError("the model returned no floating-point tensor to compute a loss from")
    named = hasattr(output, "logits")
    ids = example.kwargs.get("decoder_input_ids", example.kwargs.get("input_ids"))
    classes = logits.shape[-1]
    flat = logits.dim() == 2 and classes > 1
    tokens = logits.dim() == 3 and named and isinstance(ids, Tensor)
    if loss == "mean-square" or (loss == "auto" and not flat and not tokens):
        square = logits.float().square().mean()
        return Loss(name="mean square of the output", value=square, classes=0)
    if classes < 2 or logits.dim() < 2:
        raise UsageError(f"cross-entropy needs logits; the output is {tuple(logits.shape)}")
    if tokens and isinstance(ids, Tensor) and ids.shape[1] == logits.shape[1] and ids.shape[1] > 1:
        name = f"next-token cross-entropy of {example.tokens}"
        pairs = logits[:, :-1].reshape(-1, classes), ids[:, 1:].reshape(-1)
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = logits.shape[:-1]
        drawn = torch.randint(classes, shape, generator=generator) if labels is None else labels
        if int(drawn.max()) >= classes:
            raise UsageError(f"the data have more classes than the model's {classes} outputs")
        source = "random labels" if labels is None else "the labels of the data"
        name = f"cross-entropy with {source}"
        pairs = logits.reshape(-1, classes), drawn.reshape(-1)
    return Loss(name=name, value=F.cross_entropy(pairs[0].float(), pairs[1]), classes=classes)


def main_output(output: object) -> Tensor | None:
    """The tensor named `logits` in the output, else its first floating one with a dimension."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    named = getattr(output, "logits", None)
    if isinstance(output, Mapping):
        named = output.get("logits")
    if isinstance(named, Tensor):
        return named
    values = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(values, list | tuple):
        return None
    found = [x for x in map(main_output, values) if x is not None]
    return next((x for x in found if x.dim()), found[0] if found else None)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict without executing anything that the file holds.

    Raises:
        UsageError: It cannot be read, or belongs to another model; names what differs.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # weights_only refuses everything but tensors and plain containers: no code can run
            state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        hint = "a state_dict of torch.save(model.state_dict(), ...) or safetensors"
        raise UsageError(
            f"{path} holds no weights: {type(error).__name__}: {text}", hint
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        raise UsageError(f"{path} holds no state_dict of tensors")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} does not fit the model: {text[:300]}", "--arg?") from error
