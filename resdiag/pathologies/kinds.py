"""What a kind of fault is: how it is planted, where, when and how strongly, and what names it."""

from collections.abc import Callable
from dataclasses import dataclass

from resdiag.pathologies.trial import Trial

MIDWAY = 20
"""The step at which a fault begins that does not begin with the training."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of fault.

    Attributes:
        name: What it is called in tables.
        plant: Changes a trial before it begins.
        finding: The verdict that names it.
        cause: Words that the cause of the verdict contains; "" if any will do.
        also: Other verdicts that say the same about the training.
        place: The trait of the blocks that it can sit in, see `traits_of`; "" for the whole
            network.
        extents: Whether it sits in "one" block or in "all" that have the trait.
        needs: What the architecture has, words of `traits_of`; "no X" for what it lacks.
        onsets: Steps at which it can begin.
        strengths: Its magnitudes, in its own unit.
        optimizers: Optimizers under which it has an effect; () for all.
        told: Whether it can only be seen if the loop tells the monitor its loss.
        hurts: Whether the training is compared with its healthy twin, because the fault may be too
            weak to do any harm there.
        shifts: How far from the planted block's index the named one may lie: a block that has lost
            its addition is no block any more, and its neighbours are renumbered.
    """

    name: str
    plant: Callable[[Trial], None]
    finding: str
    cause: str = ""
    also: tuple[str, ...] = ()
    place: str = ""
    extents: tuple[str, ...] = ("one",)
    needs: tuple[str, ...] = ()
    onsets: tuple[int, ...] = (0,)
    strengths: tuple[float, ...] = (1.0,)
    optimizers: tuple[str, ...] = ()
    told: bool = False
    hurts: bool = False
    shifts: tuple[int, ...] = (0,)


def both(*steps: int) -> tuple[int, ...]:
    """From the first step, or from midway."""
    return (0, *(steps or (MIDWAY,)))
