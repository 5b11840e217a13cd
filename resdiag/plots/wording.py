"""Words for numbers in the titles of plots."""

import math


def times_words(factor: float) -> str:
    """How many times, in words.

    >>> times_words(1.234), times_words(43210.0), times_words(9.4e7), times_words(2.21e15)
    ('1.2 times', '43,200 times', '94 million times', '2.2e15 times')
    """
    if not math.isfinite(factor):
        return "beyond all numbers"
    if factor < 10:
        return f"{factor:.2g} times"
    for limit, size, word in ((1e6, 1.0, ""), (1e9, 1e6, " million"), (1e12, 1e9, " billion")):
        if factor < limit:
            digits = 10.0 ** (math.floor(math.log10(factor / size)) - 2)
            rounded = round(factor / size / digits) * digits
            return f"{rounded:,.0f}{word} times" if rounded >= 10 else f"{rounded:.2g}{word} times"
    return f"{power_words(factor)} times"


def power_words(value: float) -> str:
    """A large or small number without plus signs and zeros: "2.2e15"."""
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def change_words(factor: float) -> str:
    """What a factor per block does, in words and as a number.

    >>> change_words(1.89), change_words(1.04), change_words(1.0), change_words(0.5)
    ('nearly doubles (×1.89)', 'grows by 4 % (×1.04)', 'keeps its size (×1)', 'halves (×0.5)')
    """
    number = f"(×{factor:.3g})"
    for low, high, words in (
        (0.99, 1.01, "keeps its size"), (1.7, 1.95, "nearly doubles"), (1.95, 2.05, "doubles"),
        (2.05, 2.3, "more than doubles"), (0.48, 0.52, "halves"),
    ):  # fmt: skip
        if low <= factor <= high:
            return f"{words} {number}"
    if factor > 2.3:
        return f"grows {times_words(factor)}"
    if factor > 1:
        return f"grows by {100 * (factor - 1):.0f} % {number}"
    return f"shrinks by {100 * (1 - factor):.0f} % {number}"


def size_words(value: float) -> str:
    """A measured value with three digits: "0.0312", "1,230", "2.2e15"."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return power_words(value)
