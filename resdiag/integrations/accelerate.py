"""Accelerate: a monitor that ends a step only where the gradients were synchronised."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Self

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("accelerate is missing: pip install 'resdiag[accelerate]'") from error
import torch
from torch import Tensor, nn

from resdiag.diagnose.finding import Finding
from resdiag.integrations.session import Session, Watching, unwrapped
from resdiag.watch.loop.monitor import Monitor

_TOLD: dict[int, tuple[Any, Callable[[], object]]] = {}
_ORIGINAL = "_resdiag_original"


class ResdiagWatch:
    """Watches a prepared model in a loop of Accelerate; a context manager.

    Gradients are read after reduction and unscaling and before `accelerator.clip_grad_norm_`,
    else right before the optimizer's step. Call `step()` after `optimizer.step()`, also in the
    micro-steps of an accumulation, where it does nothing.

    Args:
        accelerator: The loop's accelerator.
        model: As `accelerator.prepare` returned it.
        optimizer: As `accelerator.prepare` returned it.
        begun: Optimizer steps done before, in a resumed training.
        every: Record every `every`-th step.
        record_first: Record each of the first steps.
        blocks: Names or patterns of modules to take as the blocks.
        trackers: Trackers to tell, e.g. `tensorboard:logs`.
        save: Folder to write the run to at the end, with its verdict; a resumed training writes
            beside it, into `<save>-from-<step>`.
        name: Of the run: in the trackers, and in labels.
        live: As of `resdiag.attach`: True for a panel, "http" for a page; the first process shows.
        on_finding: As of `resdiag.attach`: called with each finding once, or "warn"; "stop" raises
            `resdiag.StopTraining` from `step`.

    Attributes:
        monitor: The monitor: `monitor.to_frame()` has what was recorded, also after the end.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,  # noqa: ANN401
        *,
        begun: int = 0,
        every: int = 1,
        record_first: int = 0,
        blocks: Sequence[str] | None = None,
        trackers: Sequence[str] = (),
        save: str | os.PathLike[str] | None = None,
        name: str = "run",
        live: bool | str = False,
        on_finding: Callable[[Finding], object] | str | None = None,
    ) -> None:
        watching = Watching(
            every=every,
            record_first=record_first,
            blocks=blocks,
            trackers=trackers,
            save=save,
            name=name,
            live=live,
            on_finding=on_finding,
        )
        self._accelerator = accelerator
        self._losses: list[Tensor] = []
        self._session = Session(
            watching,
            accelerator.unwrap_model(model, keep_torch_compile=True),
            unwrapped(optimizer),
            scaler=accelerator.scaler,
            begun=begun,
            is_first=accelerator.is_main_process,
        )
        self._session.at_close(tell_unscaled(optimizer, self._read))

    @property
    def monitor(self) -> Monitor:
        """What records."""
        return self._session.monitor

    def step(self, loss: Any = None) -> None:  # noqa: ANN401
        """End a step, if the gradients were synchronised in it.

        Args:
            loss: The loss of this micro-step, a tensor or a number, for the verdict, which gets
                the mean of those of a step; looked at when the record is.

        Raises:
            StopTraining: `on_finding="stop"` found a fault.
        """
        if loss is not None:
            self._losses.append(torch.as_tensor(loss).detach())
        if self._accelerator.sync_gradients:
            losses, self._losses = self._losses, []
            self.monitor.step(torch.stack(losses).mean() if losses else None)

    def close(self, status: str = "done") -> None:
        """Remove every hook; what was recorded stays readable. Safe to call twice."""
        self._session.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close("done" if error is None else "stopped")

    def _read(self) -> None:
        if self._accelerator.sync_gradients:
            self.monitor.read_gradients("pre_clip")


def tell_unscaled(optimizer: Any, listener: Callable[[], object]) -> Callable[[], None]:  # noqa: ANN401
    """Call `listener` whenever gradients of `optimizer` have been unscaled, right before clipping.

    `Accelerator.clip_grad_norm_` and `clip_grad_value_` first call `unscale_gradients`, whatever
    the precision. The Hugging Face Trainer does not show its accelerator to callbacks, hence the
    method of the class is wrapped, for as long as anybody listens.

    Args:
        optimizer: As `Accelerator.prepare` returned it.
        listener: Called without arguments.

    Returns:
        A function that ends the listening; calling it twice is fine.
    """
    if not _TOLD:
        _wrap()
    key = id(optimizer)
    _TOLD[key] = optimizer, listener

    def stop() -> None:
        if _TOLD.get(key, (None, None))[1] is listener:
            del _TOLD[key]
            if not _TOLD:
                _unwrap()

    return stop


def _wrap() -> None:
    original = Accelerator.unscale_gradients

    @functools.wraps(original)
    def unscale_gradients(self: Accelerator, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = original(self, *args, **kwargs)
        for optimizer, listener in list(_TOLD.values()):
            if any(own is optimizer for own in self._optimizers):
                listener()
        return result

    setattr(unscale_gradients, _ORIGINAL, original)
    Accelerator.unscale_gradients = unscale_gradients


def _unwrap() -> None:
    original = getattr(Accelerator.unscale_gradients, _ORIGINAL, None)
    if original is not None:
        Accelerator.unscale_gradients = original
