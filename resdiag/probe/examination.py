"""What an examination found: its experiments with their numbers, and what follows from them."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.probe.experiments.experiment import Conclusion, Experiment

_COLUMNS = 100
_INDENT = 10


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
        head = f"{self.model}, {self.parameters:,} parameters; {self.batch}; {self.loss}"
        lines = _wrap("Examined", head)
        for kind, label in (("shown", "Shown"), ("ruled out", "Ruled out"), ("open", "Open")):
            texts = [f"- {one.text}" for one in self.conclusions if one.kind == kind]
            lines += _entry(label, texts or (["- nothing"] if kind == "shown" else []))
        for one in self.experiments:
            lines += _wrap(one.title, f"not done: {one.reason}" if one.reason else one.text)
            lines += [f"{'':{_INDENT}}{line}" for line in one.lines]
        return "\n".join([*lines, *_entry("Notes", [f"- {note}" for note in self.notes])])

    def __repr__(self) -> str:
        done = sum(not one.reason for one in self.experiments)
        shown = ", ".join(self.shown) or "nothing"
        return f"<Examination of {self.model}: {done} experiments; shown: {shown}>"


def _entry(label: str, texts: Iterable[str]) -> list[str]:
    lines = list[str]()
    for index, text in enumerate(texts):
        lines += _wrap(label * (index == 0), text)
    return lines


def _wrap(label: str, text: str) -> list[str]:
    """Lines of one entry: the label in the first ten columns, the text wrapped beside it."""
    lines = textwrap.wrap(text, _COLUMNS - _INDENT) or [""]
    return [f"{label if i == 0 else '':{_INDENT}}{line}".rstrip() for i, line in enumerate(lines)]
