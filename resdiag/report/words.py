"""Numbers, settings and measures in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from resdiag.plots.grouping import variant_words
from resdiag.report.outcomes import Outcome

ERRORS = ("test_error", "best_test_error", "train_error")
"""Measures that are shares, shown in percent."""

MEASURES: Mapping[str, str] = {
    "status": "how it ended",
    "verdict": "verdict",
    "test_error": "final test error",
    "best_test_error": "best test error",
    "train_error": "training error",
    "first_nonfinite_step": "first non-finite step",
}


def measure_words(measure: str, step: int | None = None, block: int | None = None) -> str:
    """A measure, with where a metric is read.

    >>> measure_words("best_test_error"), measure_words("skip_gain", 0, -1)
    ('best test error', 'skip_gain at step 0, last block')
    """
    words = MEASURES.get(measure, measure)
    if step is None:
        return words
    place = "" if block is None else f", {'last block' if block == -1 else f'block {block}'}"
    return f"{words} at step {step}{place}"


def number(value: Outcome, measure: str = "") -> str:
    """A number with three digits, an error in percent, a word as it is, a dash for none.

    >>> number(0.0838, "best_test_error"), number(4.5e9), number(27.0), number(math.nan)
    ('8.38 %', '4.50e9', '27.0', '-')
    """
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "-"
    if measure in ERRORS:
        return f"{100 * value:.2f} %"
    if math.isinf(value):
        return str(value)
    if measure.endswith("_step"):
        return f"{value:g}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:,.0f}"


def settings_words(settings: Mapping[str, Any]) -> str:
    """Settings as a reader names them; one that is not set is what the recipe says.

    >>> settings_words({"variant": "elu_pre", "depth": 20, "lr": 0.1, "epochs": None})
    'elu_pre (b), depth 20, lr 0.1'
    """
    return ", ".join(
        variant_words(str(value)) if name == "variant" else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if value is not None
    )


def count(amount: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "cell"), count(2, "cell")
    ('1 cell', '2 cells')
    """
    return f"{amount} {noun}" + ("" if amount == 1 else "s")


def listing(words: Sequence[str], most: int = 6) -> str:
    """Words with commas, the last ones left out if they are many.

    >>> listing(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def tame(text: str, most: int = 600) -> str:
    r"""Words that no study file checked, on one bounded line without control characters.

    >>> tame("out of\nmemory\u202e", 9)
    'out of me...'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[:most]}..."
