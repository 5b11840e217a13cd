"""Lightning: a callback that records a training."""

import os
from collections.abc import Callable, Sequence
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("lightning is missing: pip install 'resdiag[lightning]'") from error
import torch
from torch import Tensor, nn

from resdiag.diagnose.finding import Finding
from resdiag.errors import StopTraining
from resdiag.integrations.session import Session, SessionOwner, Watching, say_stop


class ResdiagCallback(SessionOwner, Callback):
    """Records a training by Lightning: `Trainer(callbacks=[ResdiagCallback()])`.

    Gradients are read in `on_before_optimizer_step`: after unscaling, before clipping. Validation
    is ignored, a resumed training counts on, and the end or an exception removes every hook.

    Args:
        module: Name of the network inside the LightningModule, e.g. "net". By default its only
            child with parameters, or the LightningModule itself if there are several.
        every: Record every `every`-th step.
        record_first: Record each of the first steps.
        blocks: Names or patterns of modules to take as the blocks.
        trackers: Trackers to tell, e.g. `tensorboard:logs`.
        save: Folder to write the run to at the end, with its verdict; a resumed training writes
            beside it, into `<save>-from-<step>`.
        name: Of the run: in the trackers, and in labels.
        live: As of `resdiag.attach`: True for a panel, "http" for a page; the first process shows.
        on_finding: As of `resdiag.attach`: called with each finding once, or "warn"; "stop" ends
            the training as `trainer.should_stop` does.
    """

    def __init__(
        self,
        module: str | None = None,
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
        self._module = module
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
        self._optimizer: Any = None
        self._is_due = False
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the network; a checkpoint has been loaded by now."""
        self.close("stopped")
        if not trainer.optimizers:
            raise ValueError("the LightningModule has no optimizer to watch")
        self._optimizer, self._is_due, self._losses = trainer.optimizers[0], False, []
        self._session = Session(
            self._watching,
            _network(pl_module, self._module),
            self._optimizer,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            begun=trainer.global_step,
            is_first=trainer.is_global_zero,
            config={key: str(value) for key, value in pl_module.hparams.items()},
        )

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Any,  # noqa: ANN401
    ) -> None:
        """Read the gradients: all micro-batches are in them, nothing is clipped."""
        if optimizer is self._optimizer:
            self.monitor.read_gradients("pre_clip")
            self._is_due = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """End the step, if this batch ended one."""
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            # of this micro-batch, and divided by their number already
            self._losses.append(outputs["loss"].detach())
        if self._is_due:
            self._is_due = False
            losses, self._losses = self._losses, []
            try:
                self.monitor.step(torch.stack(losses).sum() if losses else None)
            except StopTraining as stop:
                say_stop(stop)
                trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook."""
        self.close("done")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove every hook; what was recorded stays readable."""
        self.close("stopped")


def _network(pl_module: LightningModule, name: str | None) -> nn.Module:
    """The module whose call is the forward pass."""
    if name is not None:
        return pl_module.get_submodule(name)
    children = [m for m in pl_module.children() if any(True for _ in m.parameters())]
    return children[0] if len(children) == 1 else pl_module
