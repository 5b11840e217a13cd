"""What the parts of one monitor share."""

from dataclasses import dataclass

from torch import nn

from resdiag.watch.lossscale import LossScale
from resdiag.watch.notes import Notes
from resdiag.watch.record import Record
from resdiag.watch.forward import Recorder
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
        notes: What could not be watched.
    """

    model: nn.Module
    now: Step
    recorder: Recorder
    record: Record
    scale: LossScale
    notes: Notes
