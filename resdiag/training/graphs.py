"""Passes that a CUDA graph replays: one launch in place of the hundreds that Python makes.

Training passes are captured twice, with the recorder's kernels and without, each when it is first
needed; test batches once. What changes from step to step comes in through tensors that stay where
they are. The update stays outside: the recorder reads gradients and weights around it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from resdiag.watch.loop.monitor import Monitor

Work = Callable[[Tensor, Tensor], Tensor]
"""Takes images and labels; returns numbers on the device and looks at none."""

_WARM_UPS = 3  # cuDNN chooses its algorithms, and libraries make their workspaces


class Capture(Protocol):
    """Turns work into something that does it again on the same memory, without Python."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work a few times, not captured."""

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """What repeats the work; the work itself need not have been done yet."""


class CudaCapture:
    """Capture by `torch.cuda.CUDAGraph`; all graphs share one pool of memory.

    Work that already runs on a stream of its own is captured there: cuBLAS keeps a scratch memory
    per stream, and graphs that another stream replays at the same time must not share it.

    Args:
        device: A CUDA device.

    References:
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """On a stream of its own: what the default stream has begun must not be captured."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            side = self._own_stream() or torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    work()
            here.wait_stream(side)

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """The graph's replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # what the thread that writes commits does meanwhile is its own affair
            taking = torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._own_stream(),
                capture_error_mode="thread_local",
            )
            with taking:
                work()
        return graph.replay

    def _own_stream(self) -> torch.cuda.Stream | None:
        """The current stream, unless it is the default one, which cannot be captured."""
        here = torch.cuda.current_stream(self._device)
        return None if here == torch.cuda.default_stream(self._device) else here


class _Replay:
    """Captured work and the tensors through which it is told what to do, and tells what came out.

    Args:
        work: What to capture.
        images: A batch like those to come.
        labels: Its labels.
        capture: How.
        monitor: Watches the captured pass if `watched`, never the warm-up.
    """

    def __init__(
        self,
        work: Work,
        images: Tensor,
        labels: Tensor,
        capture: Capture,
        monitor: Monitor,
        *,
        watched: bool,
    ) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        self._result = torch.zeros(0)

        def run() -> None:
            self._result = work(self._images, self._labels)

        with monitor.paused():
            capture.warm_up(run)
        with nullcontext() if watched else monitor.paused():
            self._again = capture.capture(run)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The numbers of a batch; overwritten by the next call."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._again()
        return self._result


class Graphs:
    """The passes of one training.

    Gradients stay where they are and are set to zero inside the graphs: `zero_grad()` between
    steps must be told `set_to_none=False`.

    Args:
        model: The model.
        monitor: What watches it; attached with `example_inputs`.
        train: Forward and backward pass over a batch.
        test: Forward pass over a batch in evaluation mode, without gradients.
        capture: How.
    """

    def __init__(
        self, model: nn.Module, monitor: Monitor, train: Work, test: Work, capture: Capture
    ) -> None:
        self._model, self._monitor, self._capture = model, monitor, capture
        self._work, self._test_work = train, test
        self._training: dict[bool, _Replay] = {}
        self._testing: _Replay | None = None

    def train(self, images: Tensor, labels: Tensor) -> Tensor:
        """Leave gradients in the parameters; what `train` of the arguments returns."""
        due = self._monitor.is_due
        if due not in self._training:
            self._training[due] = self._capture_training(images, labels, watched=due)
        results = self._training[due](images, labels)
        self._monitor.replayed()
        return results

    def test(self, images: Tensor, labels: Tensor) -> Tensor:
        """What `test` of the arguments returns."""
        if self._testing is None:
            self._testing = self._replay(self._test_work, images, labels, watched=False)
        return self._testing(images, labels)

    def _capture_training(self, images: Tensor, labels: Tensor, *, watched: bool) -> _Replay:
        """Capture the training passes; the warm-up leaves no trace in running statistics."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in parameters if p.grad is not None]

        def work(images: Tensor, labels: Tensor) -> Tensor:
            torch._foreach_zero_(gradients)
            return self._work(images, labels)

        before = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        replay = self._replay(work, images, labels, watched=watched)
        for buffer, value in before:
            buffer.copy_(value)
        return replay

    def _replay(self, work: Work, images: Tensor, labels: Tensor, *, watched: bool) -> _Replay:
        return _Replay(work, images, labels, self._capture, self._monitor, watched=watched)
