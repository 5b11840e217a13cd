"""Faults of attention, of routers and of what Adam remembers."""

import torch

from resdiag.pathologies.kinds import MIDWAY, Kind, both
from resdiag.pathologies.layers import Attention, Mixture
from resdiag.pathologies.trial import Trial

_OFTEN = {"attention": 5, "experts": 5, "optimizer": 1}
"""Cadences at which these faults can be seen in a few dozen steps."""


def grow_logits(trial: Trial) -> None:
    """The attention's logits grow by the strength at every step, as where q and k run away."""
    trial.watch |= {"metrics": _OFTEN}

    def act(step: int) -> None:
        for owner in trial.owners:
            for module in owner.modules():
                if isinstance(module, Attention) and step > trial.onset:
                    module.sharpness *= trial.strength

    trial.before_step.append(act)


def collapse_router(trial: Trial) -> None:
    """Nothing balances the router, and two experts win more of the tokens at every step."""
    trial.watch |= {"metrics": _OFTEN}

    def act(step: int) -> None:
        for owner in trial.owners:
            for module in owner.modules():
                if isinstance(module, Mixture) and step >= trial.onset:
                    module.balance = 0.0
                    module.favour = module.favour.clone()
                    module.favour[:2] += trial.strength

    trial.before_step.append(act)


def spike_gradient(trial: Trial) -> None:
    """The gradients of one step are the strength times as large, as a corrupt batch makes them."""
    trial.watch |= {"metrics": _OFTEN}

    def act(step: int) -> None:
        if step == trial.onset:
            grads = [p.grad for p in trial.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, trial.strength)

    trial.before_update.append(act)


TRANSFORMER_FAULTS = (
    Kind(name="attention logits grow", plant=grow_logits, finding="attention_logits_grow",
         place="attention block", onsets=both(), strengths=(1.2, 1.3), extents=("one", "all")),
    Kind(name="router collapses", plant=collapse_router, finding="router_collapsed",
         place="experts", onsets=both(), strengths=(0.5, 2.0), extents=("one", "all")),
    Kind(name="one gradient too large", plant=spike_gradient, finding="second_moment_stale",
         onsets=(MIDWAY,), strengths=(300.0, 3000.0), optimizers=("adam", "adamw")),
)  # fmt: skip
"""Faults of transformers and their optimizers."""
