"""What is remembered of the last forward pass, and whether that is worth it."""

from dataclasses import dataclass

from resdiag.watch.routine import Routine


@dataclass(eq=False)
class Memory:
    """The pass that the next one is expected to repeat.

    Attributes:
        routine: It, or None before one was learned.
        can_learn: Whether passes repeat often enough to be worth remembering.
    """

    routine: Routine | None = None
    can_learn: bool = True
    _repeats: int = 0
    _others: int = 0

    def recognised(self) -> None:
        """A pass was what was expected."""
        self._repeats += 1

    def strayed(self) -> None:
        """A pass was something else: the next one is learned anew, if that is ever of use."""
        self.routine = None
        self._others += 1
        self.can_learn = self._others <= 2 + self._repeats

    def learn(self, routine: Routine | None) -> None:
        """A pass was followed; None if it cannot be recognised."""
        self.routine = routine
        if routine is None:
            self.strayed()
