"""Faults of the data and of the loss."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from resdiag.pathologies.kinds import MIDWAY, Kind, both
from resdiag.pathologies.tasks import IGNORED, Batch
from resdiag.pathologies.trial import Trial, head_of, on_output

_FEW = 4321
"""Seed of the few samples of a training that is to overfit."""


def _inputs(change: Callable[[Tensor], Tensor]) -> Callable[[Trial], None]:
    return lambda trial: trial.on_inputs(change)


def scale_inputs(trial: Trial) -> None:
    """Inputs times the strength."""
    trial.on_inputs(lambda x: x * trial.strength)


def shift_inputs(trial: Trial) -> None:
    """Inputs plus the strength, in their standard deviations."""
    trial.on_inputs(lambda x: x + trial.strength)


def raw_pixels(trial: Trial) -> None:
    """Pixels in 0..255, about."""
    trial.on_inputs(lambda x: (x + 1) * trial.strength)


def nan_in_inputs(trial: Trial) -> None:
    """One number of the first sample is NaN."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(len(x), -1)[0, 0] = math.nan
        return x

    trial.on_inputs(change)


def input_spikes(trial: Trial) -> None:
    """One batch in ten is a multiple of itself."""
    trial.changes.append(
        lambda batch, step: (batch[0] * trial.strength, batch[1]) if step % 10 == 5 else batch
    )
    trial.onset = 5


def same_sample(trial: Trial) -> None:
    """Every sample of a batch is its first one, with that one's target."""

    def change(batch: Batch, step: int) -> Batch:
        if step < trial.onset:
            return batch
        x, y = (part[:1].expand(len(part), *part.shape[1:]).contiguous() for part in batch)
        return x, y

    trial.changes.append(change)


def constant_labels(trial: Trial) -> None:
    """Every label is 3."""
    trial.on_targets(lambda y, step: torch.full_like(y, 3))


def random_labels(trial: Trial) -> None:
    """Labels are drawn anew at every step."""
    high = trial.architecture.learns.classes

    def change(y: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step + 77)
        return torch.randint(0, high, y.shape, generator=generator)

    trial.on_targets(change)


def permute_labels(trial: Trial) -> None:
    """The labels of a batch are in another order than its inputs."""

    def change(y: Tensor, step: int) -> Tensor:
        return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(step + 99))]

    trial.on_targets(change)


def ignore_labels(trial: Trial) -> None:
    """Every label is the one that the loss ignores."""
    trial.on_targets(lambda y, step: torch.full_like(y, IGNORED))


def targets_are_inputs(trial: Trial) -> None:
    """A language model whose targets are not shifted."""
    trial.changes.append(lambda batch, step: (batch[0], batch[0]))


def few_samples(trial: Trial) -> None:
    """The same sixteen samples at every step, looked at beside others."""
    few = trial.architecture.learns.batch(_FEW, 0, 16)
    trial.changes.append(lambda batch, step: few)
    trial.steps, trial.evaluate = 120, 12


def batch_too_small(trial: Trial) -> None:
    """Two samples per step: BatchNorm of vectors sees two values per channel."""
    trial.samples = 2


def on_logits(change: Callable[[Tensor], Tensor]) -> Callable[[Trial], None]:
    """Something behind the head, inside the model."""

    def plant(trial: Trial) -> None:
        on_output(head_of(trial.model), lambda x: change(x) if trial.has_begun else x)

    return plant


def _before_loss(change: Callable[[Tensor], Tensor]) -> Callable[[Trial], None]:
    """Something on the model's output, in the loss."""

    def plant(trial: Trial) -> None:
        inner = trial.loss
        trial.loss = lambda out, y, step: inner(
            change(out) if step >= trial.onset else out, y, step
        )

    return plant


def _after_loss(change: Callable[[Tensor], Tensor]) -> Callable[[Trial], None]:
    """Something done to the loss."""

    def plant(trial: Trial) -> None:
        inner = trial.loss

        def loss(out: Tensor, y: Tensor, step: int) -> Tensor:
            value = inner(out, y, step)
            return change(value) if step >= trial.onset else value

        trial.loss = loss

    return plant


def sum_loss(trial: Trial) -> None:
    """`reduction="sum"` at a rate for the mean: the loss times the number of labels."""
    inner = trial.loss
    trial.loss = lambda out, y, step: inner(out, y, step) * y.numel()


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


_CLASSES = ("classes", "no masked words")
_LABELS = (*_CLASSES, "no pairs")
_ACTIVATED = "activation on the logits"
_PLAIN = ("sgd", "sgd without momentum")

DATA_FAULTS = (
    Kind(name="constant labels", plant=constant_labels, finding="data_fault",
         cause="constant labels", needs=_LABELS, onsets=both()),
    Kind(name="raw pixels", plant=raw_pixels, finding="data_fault", needs=("image",),
         strengths=(80.0, 40.0)),
    Kind(name="NaN in an input", plant=nan_in_inputs, finding="data_fault", needs=("no tokens",),
         onsets=(6, MIDWAY)),
    Kind(name="blank inputs", plant=_inputs(torch.zeros_like), finding="data_fault",
         needs=("no tokens",), onsets=both()),
    Kind(name="every sample the same", plant=same_sample, finding="data_fault",
         cause="every sample is the same", onsets=both(), needs=("no pairs",)),
    Kind(name="inputs scaled later", plant=scale_inputs, finding="data_fault",
         cause="normalisation changes", needs=("no tokens",), onsets=(MIDWAY,),
         strengths=(30.0, 1 / 255)),
    Kind(name="inputs shifted later", plant=shift_inputs, finding="data_fault",
         cause="normalisation changes", needs=("no tokens",), onsets=(MIDWAY,), strengths=(5.0,)),
    Kind(name="input spikes", plant=input_spikes, finding="data_fault", cause="input spikes",
         needs=("no tokens",), onsets=(5,), strengths=(100.0,)),
    Kind(name="random labels", plant=random_labels, finding="stalled", needs=_LABELS, told=True,
         hurts=True),
    Kind(name="labels permuted", plant=permute_labels, finding="stalled", needs=_LABELS, told=True,
         hurts=True),
    Kind(name="sixteen samples", plant=few_samples, finding="overfit",
         needs=("vectors", "residual"), told=True),
    Kind(name="softmax in the model", plant=on_logits(_softmax), finding="loss_fault",
         cause="softmax twice", needs=_LABELS, onsets=both()),
    Kind(name="softmax in the loss", plant=_before_loss(_softmax), finding="loss_fault",
         cause="softmax twice", needs=_LABELS),
    Kind(name="ReLU on the logits", plant=on_logits(F.relu), finding="loss_fault",
         cause=_ACTIVATED, needs=_LABELS),
    Kind(name="tanh on the logits", plant=on_logits(torch.tanh), finding="loss_fault",
         cause=_ACTIVATED, needs=_LABELS),
    Kind(name="sigmoid on the logits", plant=on_logits(torch.sigmoid), finding="loss_fault",
         cause=_ACTIVATED, needs=_LABELS),
    Kind(name="every label ignored", plant=ignore_labels, finding="loss_fault",
         cause="every label is ignored", needs=("classes", "no pairs"), onsets=both(), told=True),
    Kind(name="targets not shifted", plant=targets_are_inputs, finding="loss_fault",
         cause="targets are the input", needs=("next word",)),
    Kind(name="loss summed", plant=sum_loss, finding="loss_fault", cause="summed over the batch",
         needs=("sgd", "no pairs"), optimizers=_PLAIN, hurts=True, told=True),
    Kind(name="NaN added to the loss", plant=_after_loss(lambda x: x + math.nan),
         finding="loss_fault", cause="the loss is not finite", onsets=(9, MIDWAY), told=True),
    Kind(name="loss times NaN", plant=_after_loss(lambda x: x * math.nan),
         finding="loss_fault", cause="the loss is not finite", onsets=(9, MIDWAY), told=True),
    Kind(name="loss negated", plant=_after_loss(torch.neg), finding="loss_fault",
         cause="wrong sign", onsets=both(), needs=_CLASSES),
    Kind(name="batch of two", plant=batch_too_small, finding="norm_fault",
         cause="batch too small", needs=("batchnorm1d", "vectors")),
)  # fmt: skip
"""Faults of data and loss."""
