"""What an examination found: its experiments with their numbers, and what follows from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.probe.experiments.experiment import Conclusion, Experiment
from resdiag.terminal import LABEL, beside, width_of_text, wrap


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `resdiag.examine` found; `str()` is a page of text.

    Attributes:
        model: Class of the model.
        parameters: Numbers that are trained.
        batch: Sizes and types of the batch.
        loss: The loss in words.
        seed: Of every random number.
        experiments: What was tried, in order.
        conclusions: What follows: faults that are shown, causes that are ruled out, open remarks.
        notes: What was done differently from a training.
    """

    model: str
    parameters: int
    batch: str
    loss: str
    seed: int
    experiments: tuple[Experiment, ...]
    conclusions: tuple[Conclusion, ...]
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> dict[str, str]:
        """The faults by name."""
        return {one.name: one.text for one in self.conclusions if one.kind == "shown"}

    @property
    def ruled_out(self) -> dict[str, str]:
        """The causes that it is not, by name."""
        return {one.name: one.text for one in self.conclusions if one.kind == "ruled out"}

    def __getitem__(self, name: str) -> Experiment:
        """The experiment of this name.

        Raises:
            KeyError: There is none.
        """
        for one in self.experiments:
            if one.name == name:
                return one
        raise KeyError(f"no experiment '{name}'; {', '.join(e.name for e in self.experiments)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        document = plain(
            {
                "schema": 1, "model": self.model, "parameters": self.parameters,
                "batch": self.batch, "loss": self.loss, "seed": self.seed,
                "conclusions": [asdict(one) for one in self.conclusions],
                "experiments": [
                    {
                        "name": one.name, "title": one.title, "text": one.text,
                        "reason": one.reason, "numbers": dict(one.numbers),
                        "shows": dict(one.shows), "rules_out": dict(one.rules_out),
                        "open": dict(one.open),
                    }
                    for one in self.experiments
                ],
                "notes": list(self.notes),
            }
        )  # fmt: skip
        assert isinstance(document, dict)
        return document

    def __str__(self) -> str:
        width = width_of_text() - LABEL
        head = f"{self.model}, {self.parameters:,} parameters; {self.batch}; {self.loss}"
        lines = beside("Examined", wrap(head, width))
        for kind, label in (("shown", "Shown"), ("ruled out", "Ruled out"), ("open", "Open")):
            texts = [one.text for one in self.conclusions if one.kind == kind]
            lines += _list(label, texts or (["nothing"] if kind == "shown" else []), width)
        for one in self.experiments:
            said = wrap(f"not done: {one.reason}" if one.reason else one.text, width)
            lines += beside(one.title, [*said, *one.lines])
        return "\n".join([*lines, *_list("Notes", self.notes, width)])

    def __repr__(self) -> str:
        done = sum(not one.reason for one in self.experiments)
        shown = ", ".join(self.shown) or "nothing"
        return f"<Examination of {self.model}: {done} experiments; shown: {shown}>"


def _list(label: str, texts: Sequence[str], width: int) -> list[str]:
    return beside(label, [line for text in texts for line in wrap(f"- {text}", width, "  ")])
