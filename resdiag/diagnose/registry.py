"""Every rule, in their order, and those that users register.

To add a built-in one, write its row in the module of its subject and enter it into `_ORDER`.
"""

from resdiag.diagnose.attention import ATTENTION_COLLAPSED, ATTENTION_LOGITS_GROW
from resdiag.diagnose.breakdown import EXPLODED
from resdiag.diagnose.dataset import DATA_FAULT
from resdiag.diagnose.experts import ROUTER_COLLAPSED
from resdiag.diagnose.finding import Rule
from resdiag.diagnose.learning import AT_RISK, OVERFIT, SKIP_COLLAPSED, STALLED
from resdiag.diagnose.loop import (
    EVAL_MODE,
    GRADIENTS_NOT_ZEROED,
    GROUP_LR,
    LR_SCHEDULE,
    OPTIMIZER_MISMATCH,
    STEPS_SKIPPED,
)
from resdiag.diagnose.moments import SECOND_MOMENT_STALE
from resdiag.diagnose.network import (
    DETACHED_OUTPUT,
    DROPOUT_ON_SKIP,
    MISSING_SKIP,
    NORM_FAULT,
    SYMMETRIC_UNITS,
)
from resdiag.diagnose.objective import LOSS_FAULT
from resdiag.diagnose.rates import LR_TOO_HIGH, LR_TOO_LOW, WEIGHT_DECAY_TOO_LARGE
from resdiag.diagnose.signal import GROWS_AT_INIT, VANISHING
from resdiag.diagnose.structure import (
    BRANCH_TOO_LARGE,
    DETACHED_BRANCH,
    DETACHED_SHORTCUT,
    FROZEN_BLOCK,
    MISSING_NORM,
    SHORTCUT_SCALED,
)
from resdiag.diagnose.units import BIAS_SHIFT, DEAD_BLOCK, DRIFT, FP16_OVERFLOW, SATURATED_BLOCK
from resdiag.registry import Registry

HEALTHY = "healthy"
"""The verdict where no rule reports anything, and the run shows that it learns."""

UNDETERMINED = "undetermined"
"""The verdict where no rule reports anything, and too little is known to call the run healthy."""

_ORDER = (
    OPTIMIZER_MISMATCH,
    EVAL_MODE,
    DATA_FAULT,
    LOSS_FAULT,
    GRADIENTS_NOT_ZEROED,
    FP16_OVERFLOW,
    STEPS_SKIPPED,
    DETACHED_OUTPUT,
    DETACHED_SHORTCUT,
    DETACHED_BRANCH,
    MISSING_SKIP,
    DROPOUT_ON_SKIP,
    SHORTCUT_SCALED,
    SYMMETRIC_UNITS,
    NORM_FAULT,
    ATTENTION_LOGITS_GROW,
    ATTENTION_COLLAPSED,
    ROUTER_COLLAPSED,
    BRANCH_TOO_LARGE,
    MISSING_NORM,
    BIAS_SHIFT,
    GROWS_AT_INIT,
    VANISHING,
    FROZEN_BLOCK,
    DEAD_BLOCK,
    SATURATED_BLOCK,
    SECOND_MOMENT_STALE,
    LR_SCHEDULE,
    GROUP_LR,
    WEIGHT_DECAY_TOO_LARGE,
    LR_TOO_HIGH,
    LR_TOO_LOW,
    EXPLODED,
    SKIP_COLLAPSED,
    DRIFT,
    STALLED,
    AT_RISK,
    OVERFIT,
)
"""Most upstream cause first: the first one that reports something names the verdict."""

CAUSES_FROM_THE_START = frozenset(
    {"dead_block", "saturated_block", "branch_too_large", "vanishing", "bias_shift"}
    | {"attention_collapsed"}
)
"""Causes only if they were there at step 0; what came with training stands beside `exploded`."""

FINDINGS = Registry("finding", _ORDER)
"""Every rule by the name of its finding, most upstream cause first."""


def register_finding(row: Rule, *, before: str = "") -> Rule:
    """Add a rule; every verdict from then on applies it.

    A registered rule that raises is listed in `Verdict.not_judged` with its error; the others are
    applied all the same.

    Args:
        row: The rule, see `Rule`.
        before: Name of the finding that is a consequence of this one: where both are found, this
            one names the verdict. Without it, any other finding names it.

    Returns:
        The rule.

    Raises:
        TypeError: It is not a `Rule`.
        RegistrationError: Its name is taken or not of small letters, digits and "_", or `before` is
            unknown.
    """
    if not isinstance(row, Rule):
        raise TypeError(f"a finding is registered as a Rule, not {type(row).__name__}")
    FINDINGS.add(row, before=before, taken=(HEALTHY, UNDETERMINED))
    return row


def unregister_finding(name: str) -> None:
    """Forget a rule that was registered.

    Raises:
        RegistrationError: It is built in, or not registered.
    """
    FINDINGS.remove(name)


def is_built_in(row: Rule) -> bool:
    """Whether the rule is resdiag's own, which never raises."""
    return FINDINGS.is_built_in(row.name)
