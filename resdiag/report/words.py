"""Numbers, settings, measures and their spread over seeds, in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resdiag.models.variants import variant_words
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


def joined(words: Sequence[str]) -> str:
    """Words as a sentence lists them.

    >>> joined(["a", "b", "c"]), joined(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def tame(text: str, most: int = 600) -> str:
    r"""Words that no study file checked, on one bounded line without control characters.

    >>> tame("out of\nmemory\u202e", 9)
    'out of me...'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[:most]}..."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of cells that differ in their seed only.

    Attributes:
        mean: Arithmetic, or geometric for what is compared by a factor; NaN if there is none.
        deviation: Sample standard deviation, of the logarithms for a geometric mean; NaN below two.
        low: Smallest.
        high: Largest.
        n: How many there are.
    """

    mean: float = math.nan
    deviation: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0


def summarise(values: Sequence[float], *, geometric: bool = False) -> Summary:
    """Mean and spread of the finite values.

    >>> summarise([1.0, 3.0]).mean, round(summarise([1.0, 100.0], geometric=True).mean, 9)
    (2.0, 10.0)
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if geometric:
        known = known[known > 0]
    if not known.size:
        return Summary()
    scale = np.log(known) if geometric else known
    mean = float(np.mean(scale))
    return Summary(
        mean=float(np.exp(mean)) if geometric else mean,
        deviation=float(np.std(scale, ddof=1)) if known.size > 1 else math.nan,
        low=float(known.min()),
        high=float(known.max()),
        n=int(known.size),
    )


def spread_words(found: Summary, name: str) -> str:
    """Mean and deviation of a measure; without the latter if there is one number only.

    >>> spread_words(summarise([0.0826, 0.085]), "test_error")
    '8.38 ± 0.17 %'
    """
    if found.n < 2:
        return number(found.mean, name)
    mean, spread = (number(v, name).removesuffix(" %") for v in (found.mean, found.deviation))
    return f"{mean} ± {spread}" + (" %" if name in ERRORS else "")
