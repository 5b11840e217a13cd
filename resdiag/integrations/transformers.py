"""Hugging Face Trainer: a callback that records a training."""

import os
from collections.abc import Sequence
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("transformers is missing: pip install 'resdiag[transformers]'") from error

from resdiag.integrations.accelerate import tell_unscaled
from resdiag.integrations.session import Session, SessionOwner, Watching, unwrapped


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
    ) -> None:
        self._watching = Watching(
            every=every,
            record_first=record_first,
            blocks=blocks,
            trackers=trackers,
            save=save,
            name=name,
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

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:  # noqa: ANN401
        """End the step: the parameters have moved, their gradients are still there."""
        self.monitor.step()

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
