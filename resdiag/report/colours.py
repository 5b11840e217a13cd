"""Colours of figures on dark paper: greys turned round, colours lightened until they stand out."""

from functools import lru_cache

PAPER, DARK_PAPER = "#ffffff", "#15171c"
DARK_INK = "#e9e9ea"
_CONTRAST = 4.0
"""Least contrast of a coloured line with the dark paper; 3 is what WCAG asks of graphics."""


def both(colour: str) -> str:
    """A colour for CSS, by the scheme in which it is shown.

    >>> both("#ffffff"), both("#000000")
    ('light-dark(#ffffff,#15171c)', 'light-dark(#000000,#e9e9ea)')
    """
    return f"light-dark({colour},{on_dark(colour)})"


@lru_cache(maxsize=4096)
def on_dark(colour: str) -> str:
    """The colour that does on dark paper what `colour` does on white."""
    red, green, blue = _channels(colour)
    if max(red, green, blue) - min(red, green, blue) < 0.05:
        share = (red + green + blue) / 3
        return _mix(DARK_INK, DARK_PAPER, share)
    share = 0.0
    while contrast(_mix(colour, "#ffffff", share), DARK_PAPER) < _CONTRAST:
        share += 0.05
    return _mix(colour, "#ffffff", share)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2, 1 to 21.

    >>> round(contrast("#000000", "#ffffff"), 6)
    21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = _channels(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mix(one: str, other: str, share: float) -> str:
    """`share` of the other colour, the rest of the first."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return "#" + "".join(f"{round(255 * ((1 - share) * a + share * b)):02x}" for a, b in pairs)


def _channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
