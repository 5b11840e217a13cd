"""The training loop: predict, loss, backward, step, record, commit."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import SGD

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.runs.checkpoint import pack
from resdiag.runs.config import RunConfig
from resdiag.runs.store import RunWriter
from resdiag.training import checkpoint
from resdiag.training.committer import Committer, PendingCommit, Table
from resdiag.training.curve import Curve
from resdiag.training.display import Display, Progress
from resdiag.training.fair_lock import UNSHARED, LockHandle
from resdiag.training.fastelu import FastElu
from resdiag.training.graphs import Capture, CudaCapture, Graphs
from resdiag.training.interrupt import Interrupt
from resdiag.training.malloc import disable_malloc_trim
from resdiag.training.recipe import learning_rate
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

_EVALUATION_BATCH = 256
_REPORT_EVERY_S = 0.5


@dataclass
class EpochCounters:
    """What a training counts and must not forget when it is resumed.

    Attributes:
        exploded: First step with a non-finite loss, -1 before.
        loss_sum: Sum over samples of the loss in the running epoch.
        wrong: Wrong predictions in the running epoch.
        seen: Samples in the running epoch.
    """

    exploded: int = -1
    loss_sum: float = 0.0
    wrong: float = 0.0
    seen: int = 0


class Training:
    """One run from its last commit to its end.

    Args:
        config: What to train.
        data: The images; those that `config.data` names.
        writer: The run's folder.
        tell: Is handed the rows of both tables after each commit.
        capture: What takes passes down for the backend `graph`, if not CUDA.
        thread_lock: Held by the caller, and passed on once a step to trainings in other threads.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        writer: RunWriter,
        tell: Callable[[Table, Table], object] | None = None,
        capture: Capture | None = None,
        thread_lock: LockHandle = UNSHARED,
    ) -> None:
        self.config, self._writer, self._thread_lock = config, writer, thread_lock
        self._committer = Committer(writer, tell, thread_lock)
        self._device = torch.device(config.device)
        # convolutions on the CPU are a fifth faster in this layout
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        self.model = build_model(
            config.variant,
            config.depth,
            width=config.width,
            num_classes=len(data.classes),
            stem_bn=config.stem_bn,
            seed=config.seed,
        ).to(self._device, **layout)
        self._optimizer = SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self._batches = Augmenter(
            data,
            config.batch_size,
            config.seed,
            config.augment,
            self._device,
            channels_last=True,
        )
        self.monitor = self._attach()
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if config.backend == "compile":  # after attach: hooks set later would not be in the graph
            self._compiled = torch.compile(self.model, dynamic=False)
        self._graphs: Graphs | None = None
        if config.backend == "graph":
            how = capture or CudaCapture(self._device)
            self._graphs = Graphs(self.model, self.monitor, self._train_on, self._test_on, how)
        self._curve, self._tally = Curve(), EpochCounters()
        self._metrics: list[dict[str, NDArray[Any]]] = []
        self._base: tuple[int, NDArray[Any]] | None = None
        self._worst = ""
        self._standing: Progress | None = None
        self._clock = self._reported = time.perf_counter()

    def run(self, display: Display, interrupt: Interrupt) -> str:
        """Train to the end, to an explosion, or to a signal.

        Returns:
            "done", "diverged" or "stopped": the status that was committed.

        Raises:
            StorageError: A commit could not be written; the one before it stays.
        """
        status = self._writer.status
        done = self._resume()
        with self.backend(), self.monitor, self._committer:
            while status not in ("done", "diverged") and done < self.config.steps:
                self.train_step(done)
                done += 1
                self._report(display, done)
                status = self._status(done, interrupt)
                if status != "running" or done % self.config.commit_every == 0:
                    self._commit(done, status)
                if status == "stopped":
                    break
        return status

    # -- one step ------------------------------------------------------------------------------

    def train_step(self, step: int) -> None:
        """Do update `step`, and the evaluation after it if one is due."""
        lr = learning_rate(self.config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        images, labels = self._batches.batch(step)
        results = self._passes(images, labels)
        self._thread_lock.pass_on()  # the device is busy: others launch their step before we wait
        self._count(step, len(labels), lr, results)
        if self._tally.exploded == step and not self.monitor.is_recording:
            self._record_again(images, labels)
        self._optimizer.step()
        self.monitor.step()
        self._evaluate(step + 1)

    def _passes(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward pass: an epoch's smaller last batch is not worth another graph."""
        whole = len(labels) == self.config.batch_size
        if self._graphs is not None and whole:
            return self._graphs.train(images, labels)
        self._zero_grad()
        # no truth value: a compiled module's is the length of the module, which has none
        model = self.model if self._compiled is None or not whole else self._compiled
        return self._forward_backward(images, labels, model)

    def _zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=self._graphs is None)  # graphs know where they are

    def _train_on(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._forward_backward(images, labels, self.model)

    def _forward_backward(
        self, images: Tensor, labels: Tensor, model: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Leave gradients in the parameters; loss and number of wrong predictions, float64 (2,)."""
        logits = self._predict(images, model)
        loss = F.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        wrong = (logits.detach().argmax(1) != labels).sum()
        return torch.stack([loss.detach().double(), wrong.double()])

    def _predict(self, images: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        half = self.config.dtype == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            logits = model(images)
        return logits.float()

    def _record_again(self, images: Tensor, labels: Tensor) -> None:
        """The step that explodes must be in the record: do its passes once more, watched."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.monitor.force_record()
        self._zero_grad()
        self._forward_backward(images, labels, self.model)
        for buffer, before in buffers:  # running statistics count the batch once
            buffer.copy_(before)

    def _count(self, step: int, size: int, lr: float, results: Tensor) -> None:
        """Add a step's loss and wrong predictions to the curve and to the epoch's tally."""
        # waits for the device once a step: an explosion is noticed while it can be recorded
        loss, wrong = results.tolist()
        per_epoch = self._batches.steps_per_epoch
        if step % per_epoch == 0:
            self._tally = EpochCounters(exploded=self._tally.exploded)
        self._tally.loss_sum += loss * size
        self._tally.wrong += wrong
        self._tally.seen += size
        if self._tally.exploded < 0 and not math.isfinite(loss):
            self._tally.exploded = step
        now = time.perf_counter()
        speed, error = size / max(now - self._clock, 1e-9), wrong / size
        self._clock = now
        epoch = (step + 1) / per_epoch
        self._curve.add(step, epoch=epoch, loss=loss, error=error, lr=lr, images_per_s=speed)
        self._standing = Progress(
            done=step + 1, loss=loss, error=error, images_per_s=speed, worst=self._worst
        )

    # -- between steps -------------------------------------------------------------------------

    def _status(self, done: int, interrupt: Interrupt) -> str:
        exploded = self._tally.exploded
        if exploded >= 0 and done > exploded + self.config.stop_after_explosion:
            return "diverged"
        if done >= self.config.steps:
            return "diverged" if exploded >= 0 else "done"
        return "stopped" if interrupt.signal else "running"

    def _evaluate(self, done: int) -> None:
        """Test error, and the epoch's running training error, where they are due."""
        every = self.config.eval_every
        last = done == self.config.steps
        if self._tally.exploded >= 0 or not (last or (every and done % every == 0)):
            return
        tally = self._tally
        seen = max(1, tally.seen)
        test_loss, test_error = self._test()
        self._curve.add(
            done - 1,
            train_loss=tally.loss_sum / seen,
            train_error=tally.wrong / seen,
            test_loss=test_loss,
            test_error=test_error,
        )
        self._clock = time.perf_counter()

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Mean loss and error of the test images in evaluation mode."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        count = 0
        for images, labels in self._batches.test_batches(_EVALUATION_BATCH):
            whole = len(labels) == _EVALUATION_BATCH
            test = self._graphs.test if self._graphs is not None and whole else self._test_on
            totals += test(images, labels)
            count += len(labels)
        self.model.train()
        self._thread_lock.pass_on()
        loss_sum, wrong_sum = (totals / max(1, count)).tolist()
        return loss_sum, wrong_sum

    def _test_on(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sum over test images of the loss, and number of wrong predictions, float64 (2,)."""
        logits = self._predict(images, self.model)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        wrong = (logits.argmax(1) != labels).sum()
        return torch.stack([loss.double(), wrong.double()])

    def _report(self, display: Display, done: int) -> None:
        """Show the standing twice a second; the worst block is read from what was recorded."""
        now = time.perf_counter()
        if now - self._reported < _REPORT_EVERY_S and done < self.config.steps:
            return
        self._reported = now
        self._drain()
        if self._standing is not None:
            display.show(self._standing)

    def _drain(self) -> None:
        metrics, curve = self.monitor.drain()
        if len(metrics["step"]):
            self._metrics.append(metrics)
            self._worst = self._name_worst(metrics)
        self._curve.merge(curve)

    def _name_worst(self, metrics: dict[str, NDArray[Any]]) -> str:
        """The first non-finite block of the last recorded step, else the most changed one."""
        last = metrics["step"] == metrics["step"][-1]
        norms = metrics["grad_output"][last].astype(np.float64)
        broken = np.flatnonzero(metrics["output_nonfinite"][last] > 0)
        if broken.size:
            return f"block {broken[0]} is not finite"
        if self._base is None:
            first = metrics["step"] == metrics["step"][0]
            self._base = int(metrics["step"][0]), metrics["grad_output"][first].astype(np.float64)
        since, base = self._base
        with np.errstate(all="ignore"):
            change = np.abs(np.log10(norms / base))
        if not np.isfinite(change).any():
            return ""
        worst = int(np.nanargmax(np.where(np.isfinite(change), change, np.nan)))
        return f"block {worst}: gradient x{norms[worst] / base[worst]:.2g} since step {since}"

    # -- commits -------------------------------------------------------------------------------

    def _commit(self, done: int, status: str) -> None:
        self._drain()
        self._committer.wait()
        if self.monitor.blocks:
            self._writer.describe(
                [block.to_dict() for block in self.monitor.blocks],
                self.monitor.unavailable,
                self.monitor.point,
                custom=self.monitor.custom_metrics,
            )
        self._committer.commit(
            PendingCommit(
                step=done,
                metrics=_join(self._metrics),
                curve=self._curve.take(),
                tensors=pack(checkpoint.pack(self.model, self._optimizer)),
                state=asdict(self._tally),
                status=status,
            )
        )
        self._metrics = []
        self._clock = time.perf_counter()

    def _resume(self) -> int:
        """Continue from the last commit; returns the number of steps done."""
        saved = self._writer.restore()
        if saved is None:
            return 0
        checkpoint.unpack(self.model, self._optimizer, saved.tensors)
        self._tally = EpochCounters(**saved.state)
        self.monitor.start_at(saved.step)
        return saved.step

    def _attach(self) -> Monitor:
        plain = not VARIANTS[self.config.variant].shortcut
        hidden = self.config.backend in ("compile", "graph")
        return attach(
            self.model,
            optimizer=self._optimizer,
            blocks=self.model.unit_names if plain else None,
            every=self.config.every or sys.maxsize,
            record_first=self.config.record_first,
            example_inputs=(self._batches.batch(0)[0],) if hidden else None,
        )

    def backend(self) -> AbstractContextManager[object]:
        """What the steps run under."""
        if self._device.type == "cpu":
            disable_malloc_trim()
        return FastElu() if self.config.backend == "fast" else nullcontext()


def _join(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    if not parts:
        return {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
