"""Which passes are traced to record attention and experts, and what looks at them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from resdiag.watch.find.passes import Surveyor
from resdiag.watch.record.attention import AttentionSurvey
from resdiag.watch.record.block_survey import BlockSurvey
from resdiag.watch.record.routers import RouterSurvey
from resdiag.watch.record.sets import Sets
from resdiag.watch.record.sites import Sites

_WORDS = {"attention": ("atten",), "experts": ("moe", "expert", "router")}
"""What a class of module is called of which a set is expected."""

COMPILED = "torch.compile runs the pass, and its operations are not seen"
RANKS = "several ranks record together, and this is not added up over them"


class SetSurveys:
    """Gives each pass the surveyors of the sets that are due in it.

    A set of which a whole pass has nothing is not looked for again.

    Args:
        modules: The model's modules by name.
        sets: Which sets are due.
        sites: Has the blocks.
        samples: First samples of the batch to measure; None for all.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], sets: Sets, sites: Sites, samples: int | None
    ) -> None:
        self._modules, self._sets, self._sites, self._samples = modules, sets, sites, samples
        self._classes = " ".join(type(module).__name__.lower() for module in modules.values())
        self._last: list[BlockSurvey[Any]] = []

    def begin(self, step: int) -> None:
        """A pass is recorded in this step."""
        self._sets.begin(step)

    def refuse(self, reason: str) -> None:
        """Nothing can be recorded at all."""
        for name in self._sets.names:
            self._sets.stop(name, reason if self._is_expected(name) else "")

    def hide(self) -> None:
        """A pass is recorded whose operations nobody sees."""
        for name in ("attention", "experts", "extremes"):
            if self._sets.is_due(name) and self._is_expected(name):
                self._sets.lack(name, COMPILED)

    def due(self) -> list[Surveyor]:
        """The surveyors of a pass that begins."""
        self.settle()
        parts = lambda: self._sites.anatomy, self._modules, self._sets
        if self._sets.is_due("attention"):
            told = self._is_expected("attention")
            self._last.append(AttentionSurvey(self._samples, *parts, is_expected=told))
        if self._sets.is_due("experts"):
            self._last.append(RouterSurvey(*parts, is_expected=self._is_expected("experts")))
        return [*self._last]

    def settle(self) -> None:
        """Draw the conclusions from the last pass, if it has ended."""
        last, self._last = self._last, []
        for survey in last:
            if survey.guard.failure:
                self._sets.stop(survey.SET, f"an error inside resdiag: {survey.guard.failure}")
            elif survey.is_whole and not survey.of_blocks:
                self._sets.stop(survey.SET)

    def _is_expected(self, name: str) -> bool:
        return self._sets.asked or any(word in self._classes for word in _WORDS.get(name, ()))
