"""What the parts of one monitor share."""

from dataclasses import dataclass

from torch import nn

from resdiag.watch.base.warnings import Warnings
from resdiag.watch.forward import Recorder
from resdiag.watch.lossscale import LossScale
from resdiag.watch.record import Record
from resdiag.watch.step import Step


@dataclass(eq=False)
class State:
    """The state of one monitor.

    Attributes:
        model: The model that is watched.
        now: The step under way.
        recorder: What measures the recorded pass.
        record: Where numbers are written.
        scale: The loss scale.
        warnings: What could not be watched.
    """

    model: nn.Module
    now: Step
    recorder: Recorder
    record: Record
    scale: LossScale
    warnings: Warnings
