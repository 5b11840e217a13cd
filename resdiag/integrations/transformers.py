"""Hugging Face Trainer: a callback that records a training."""

import os
from collections.abc import Callable, Sequence
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("transformers is missing: pip install 'resdiag[transformers]'") from error
import torch
from torch import Tensor

from resdiag.diagnose.finding import Finding
from resdiag.errors import StopTraining
from resdiag.integrations.accelerate import tell_unscaled
from resdiag.integrations.session import Session, SessionOwner, Watching, say_stop, unwrapped


class ResdiagCallback(SessionOwner, TrainerCallback):
    """Records a training by the Trainer: `Trainer(..., callbacks=[ResdiagCallback()])`.

    Gradients are read after reduction and unscaling, before clipping. Evaluations are ignored, a
    resumed training counts on, and the end of the training removes every hook. After a training
    that raised, call `close("stopped")`.

    Args:
        every: Record every `every`-th step.
        record_first: Record each of the first steps.
        blocks: Names or patterns of modules to take as the blocks.
        trackers: Trackers to tell, e.g. `tensorboard:logs`.
        save: Folder to write the run to at the end, with its verdict; a resumed training writes
            beside it, into `<save>-from-<step>`.
        name: Of the run: in the trackers, and in labels.
        live: As of `resdiag.attach`: True for a panel, "http" for a page; the first process shows.
        on_finding: As of `resdiag.attach`: called with each finding once, or "warn"; "stop" ends
            the training as `control.should_training_stop` does.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        record_first: int = 0,
        blocks: Sequence[str] | None = None,
        trackers: Sequence[str] = (),
        save: str | os.PathLike[str] | None = None,
        name: str = "run",
        live: bool | str = False,
        on_finding: Callable[[Finding], object] | str | None = None,
    ) -> None:
        self._losses: list[Tensor] = []
        self._is_sum = self._smoothed = False
        self._watching = Watching(
            every=every,
            record_first=record_first,
            blocks=blocks,
            trackers=trackers,
            save=save,
            name=name,
            live=live,
            on_finding=on_finding,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:  # noqa: ANN401
        """Attach to the model inside any wrapper."""
        self.close("stopped")
        optimizer = known["optimizer"]
        self._session = Session(
            self._watching,
            known["model"],
            unwrapped(optimizer),
            scaler=getattr(optimizer, "scaler", None),
            begun=state.global_step,
            is_first=state.is_world_process_zero,
            config=args.to_sanitized_dict(),
        )
        self._session.at_close(tell_unscaled(optimizer, self._read))
        # the Trainer then takes the loss from the logits, and not from the model
        self._smoothed = args.label_smoothing_factor != 0
        hook = known["model"].register_forward_hook(self._keep_loss, with_kwargs=True)
        self._session.at_close(hook.remove)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:  # noqa: ANN401
        """End the step: the parameters have moved, their gradients are still there."""
        losses, self._losses = self._losses, []
        try:
            self.monitor.step(self._loss_of(losses))
        except StopTraining as stop:
            say_stop(stop)
            control.should_training_stop = True

    def _keep_loss(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        """Note the loss that the model returns for each micro-batch."""
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            # divided by the items of all micro-batches, or a mean over those of its own
            self._is_sum = kwargs.get("num_items_in_batch") is not None
            self._losses.append(loss.detach())

    def _loss_of(self, losses: list[Tensor]) -> Tensor | None:
        """The loss of a step; None where the Trainer computes it outside of the model."""
        if not losses or self._smoothed:
            return None
        total = torch.stack(losses).sum()
        return total if self._is_sum else total / len(losses)

    def on_log(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        logs: dict[str, Any] | None = None,
        **known: Any,  # noqa: ANN401
    ) -> None:
        """Note the loss that the Trainer logs: a mean over its `logging_steps`."""
        if self._session is not None and "loss" in (logs or {}):
            self._session.add_loss(state.global_step - 1, float((logs or {})["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:  # noqa: ANN401
        """Remove every hook."""
        self.close("done" if state.global_step >= state.max_steps else "stopped")

    def _read(self) -> None:
        self.monitor.read_gradients("pre_clip")
