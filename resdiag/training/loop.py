"""The training loop: predict, loss, backward, step, record, commit."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
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
from resdiag.training.checkpoint import Committer, Table
from resdiag.training.cpu import FastElu, disable_malloc_trim
from resdiag.training.curve import Curve, EpochCounters, MostChangedBlock
from resdiag.training.display import Display, Progress
from resdiag.training.fair_lock import UNSHARED, LockHandle
from resdiag.training.graphs import Capture, CudaCapture, Graphs
from resdiag.training.interrupt import Interrupt
from resdiag.training.recipe import learning_rate
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

_EVALUATION_BATCH = 256
_REPORT_EVERY_S = 0.5


class Training:
    """One run from its last commit to its end.

    Args:
        config: What to train.
        data: The images; those that `config.data` names.
        writer: The run's folder.
        on_commit: Called with the rows of both tables after each commit.
        capture: What captures passes for the backend `graph`, if not CUDA.
        thread_lock: Held by the caller, and passed on once a step to trainings in other threads.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        writer: RunWriter,
        on_commit: Callable[[Table, Table], object] | None = None,
        capture: Capture | None = None,
        thread_lock: LockHandle = UNSHARED,
    ) -> None:
        self.config, self._writer, self._thread_lock = config, writer, thread_lock
        self._committer = Committer(writer, on_commit, thread_lock)
        self._device = torch.device(config.device)
        # convolutions on the CPU are a fifth faster in this layout
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        self.model = build_model(
            config.variant,
            config.depth,
            width=config.width,
            num_classes=len(data.classes),
            stem_bn=config.stem_bn,
            branch_scale=config.branch_scale,
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
        self._curve, self._counters = Curve(), EpochCounters()
        self._metrics: list[dict[str, NDArray[Any]]] = []
        self._most_changed = MostChangedBlock()
        self._progress: Progress | None = None
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
        if self._counters.exploded == step and not self.monitor.is_recording:
            self._record_again(images, labels)
        self._optimizer.step()
        self.monitor.step()
        self._evaluate(step + 1)

    def _passes(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward pass; an epoch's smaller last batch gets no graph of its own."""
        whole = len(labels) == self.config.batch_size
        if self._graphs is not None and whole:
            return self._graphs.train(images, labels)
        self._zero_grad()
        # no truth value: a compiled module's is the length of the module, which has none
        model = self.model if self._compiled is None or not whole else self._compiled
        return self._forward_backward(images, labels, model)

    def _zero_grad(self) -> None:
        self._optimizer.zero_grad(
            set_to_none=self._graphs is None
        )  # graphs write into the same memory

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
        """Add a step's loss and wrong predictions to the curve and to the epoch's counters."""
        # waits for the device once a step: an explosion is noticed while it can be recorded
        loss, wrong = results.tolist()
        per_epoch = self._batches.steps_per_epoch
        if step % per_epoch == 0:
            self._counters = EpochCounters(exploded=self._counters.exploded)
        self._counters.loss_sum += loss * size
        self._counters.wrong += wrong
        self._counters.seen += size
        if self._counters.exploded < 0 and not math.isfinite(loss):
            self._counters.exploded = step
        now = time.perf_counter()
        speed, error = size / max(now - self._clock, 1e-9), wrong / size
        self._clock = now
        epoch = (step + 1) / per_epoch
        self._curve.add(step, epoch=epoch, loss=loss, error=error, lr=lr, images_per_s=speed)
        self._progress = Progress(
            done=step + 1,
            loss=loss,
            error=error,
            images_per_s=speed,
            worst=self._most_changed.words,
        )

    # -- between steps -------------------------------------------------------------------------

    def _status(self, done: int, interrupt: Interrupt) -> str:
        exploded = self._counters.exploded
        if exploded >= 0 and done > exploded + self.config.stop_after_explosion:
            return "diverged"
        if done >= self.config.steps:
            return "diverged" if exploded >= 0 else "done"
        return "stopped" if interrupt.signal else "running"

    def _evaluate(self, done: int) -> None:
        """Test error, and the epoch's running training error, where they are due."""
        every = self.config.eval_every
        last = done == self.config.steps
        if self._counters.exploded >= 0 or not (last or (every and done % every == 0)):
            return
        counters = self._counters
        seen = max(1, counters.seen)
        test_loss, test_error = self._test()
        self._curve.add(
            done - 1,
            train_loss=counters.loss_sum / seen,
            train_error=counters.wrong / seen,
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
        """Show the progress twice a second; the most changed block is read from the record."""
        now = time.perf_counter()
        if now - self._reported < _REPORT_EVERY_S and done < self.config.steps:
            return
        self._reported = now
        self._drain()
        if self._progress is not None:
            display.show(self._progress)

    def _drain(self) -> None:
        metrics, curve = self.monitor.drain()
        if len(metrics["step"]):
            self._metrics.append(metrics)
            self._most_changed.update(metrics)
        self._curve.merge(curve)

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
            done,
            _join(self._metrics),
            self._curve.take(),
            tensors=pack(checkpoint.pack(self.model, self._optimizer)),
            state=asdict(self._counters),
            status=status,
        )
        self._metrics = []
        self._clock = time.perf_counter()

    def _resume(self) -> int:
        """Continue from the last commit; returns the number of steps done."""
        saved = self._writer.restore()
        if saved is None:
            return 0
        checkpoint.unpack(self.model, self._optimizer, saved.tensors)
        self._counters = EpochCounters(**saved.state)
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
