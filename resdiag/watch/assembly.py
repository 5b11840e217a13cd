"""The end of a step that several ranks record together: their numbers become those of all."""

import math

import torch
from torch import Tensor

from resdiag.watch.distributed import Ranks
from resdiag.watch.gradients import Gradients
from resdiag.watch.pool import Pool
from resdiag.watch.state import State


class Assembly:
    """Lets ranks meet at the end of a step, and keeps what came of it.

    Args:
        ranks: The ranks.
        pool: What this one has recorded.
        state: The monitor's state.
        gradients: The parameters' gradients.
    """

    def __init__(self, ranks: Ranks, pool: Pool, state: State, gradients: Gradients) -> None:
        self._ranks, self._pool, self._now = ranks, pool, state.now
        self._recorder, self._record = state.recorder, state.record
        self._gradients, self._warnings = gradients, state.warnings

    def check(self) -> None:
        """Say what past meetings tell of the ranks; waits for the device."""
        for text in self._ranks.check():
            self._warnings.say(text)

    def close(self) -> None:
        """Let go of the ranks."""
        self._ranks.close()

    def meet(self) -> None:
        """Let the ranks make the metrics of all from what each has recorded in this step."""
        if not self._ranks.is_open:
            return
        whole = self._now.forward and not self._recorder.guard.failure
        norm = torch.zeros((), dtype=torch.float64, device=self._gradients.device())
        if whole:
            norm = self._gradients.total.to(norm.device)
        met = None
        try:
            met = self._ranks.meet(
                self._pool,
                len(self._recorder.anatomy.blocks) if whole else None,
                self._now.number,
                self._record.cells.slot,
                norm,
                self._gradients.weights,
            )
        except Exception as error:  # training goes on, whatever happened to the record
            self._recorder.guard.failure = str(error) or type(error).__name__
            self._ranks.close()
            self._warnings.say(
                f"watching stopped at step {self._now.number}: {self._recorder.guard.failure}"
            )
        if not self._now.forward:
            return
        if met is not None:
            self._keep(*met)
        else:
            self._record.cells.wipe()
            self._record.head.wipe()
            if self._ranks.is_open:
                self._warnings.say(
                    f"step {self._now.number} was not recorded by every rank: its numbers are NaN"
                )

    def _keep(self, norm: Tensor, same: Tensor) -> None:
        """Write the gradient norm of all ranks; what was read before the reduction is nobody's."""
        slot = self._record.cells.slot
        self._record.head.write(slot, 0, "grad_norm", torch.where(same, norm, math.nan))
        if not self._pool.sharded:
            for column in ("grad_param", "update_ratio"):
                read = self._record.cells.read_column(slot, column)
                self._record.cells.write_column(slot, column, torch.where(same, read, math.nan))
