"""SVG of matplotlib made small, readable in light and dark, and fit to stand beside others."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import lru_cache

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ET.register_namespace("", SVG)
ET.register_namespace("xlink", XLINK)

_HREF = f"{{{XLINK}}}href"
_G, _DEFS, _USE, _PATH = (f"{{{SVG}}}{name}" for name in ("g", "defs", "use", "path"))
_STYLE = f"{{{SVG}}}style"
_JOINT = re.compile(r" ?([MLCQZz]) ?")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_URL = re.compile(r"url\(#([^)]+)\)")
_PLACES = ("d", "x", "y", "width", "height", "points", "cx", "cy", "r")
_SMALL = 300
"""Letters of a path that may be a mark, a few points wide: a tenth of a point would deform it."""
_FONT = "'DejaVu Sans', Verdana, sans-serif"
_COLOURED = ("fill", "stroke")
_JOINS = "svg *{stroke-linejoin:round;stroke-linecap:butt}"
"""What matplotlib says of all elements, in a style sheet that a policy would refuse."""


class Styles:
    """Style declarations by class name; one for all figures of a page, or one for a file."""

    def __init__(self, prefix: str = "f") -> None:
        self._names: dict[str, str] = {}
        self._prefix = prefix

    def name(self, style: str) -> str:
        """The class for what a style attribute says."""
        rule = "".join(_declare(part) for part in style.split(";") if ":" in part)
        return self._names.setdefault(rule, f"{self._prefix}{len(self._names)}")

    def css(self) -> str:
        """The rules of all classes so far."""
        rules = (f".{name}{{{rule}}}" for rule, name in self._names.items())
        return "\n".join([_JOINS, *rules])


def _declare(part: str) -> str:
    """One declaration; a colour as itself, and again for light and dark where that is known."""
    key, _, value = (piece.strip() for piece in part.partition(":"))
    value = value.replace("'DejaVu Sans'", _FONT)
    if key in _COLOURED and value.startswith("#"):
        return f"{key}:{value};{key}:{both(value)};"
    return f"{key}:{_rounded(value, 3)};"


def refine(
    svg: bytes, *, prefix: str, title: str, description: str, styles: Styles | None = None
) -> str:
    """Rewrite an SVG file of matplotlib's.

    Args:
        svg: What matplotlib wrote, with text as text.
        prefix: Of the ids, different for each figure of a page.
        title: Name of the figure for who cannot see it.
        description: What it shows, for the same.
        styles: Collects the styles of a page; None keeps them in the file, which then follows the
            scheme of who shows it.

    Returns:
        An `svg` element with role "img", titled and described.
    """
    root = ET.fromstring(svg)
    for name in ("metadata", "title"):
        for found in root.findall(f"{{{SVG}}}{name}"):
            root.remove(found)
    own = styles or Styles(prefix)
    _hoist_defs(root)
    _rename_ids(root, prefix)
    for element in root.iter():
        _shrink(element, own)
    root.set("class", own.name("fill: #000000"))  # what is black, matplotlib leaves to the viewer
    _share_classes(root)
    _flatten(root)
    _introduce(root, prefix, title, description)
    if styles is None:
        sheet = ET.Element(_STYLE)
        sheet.text = f"svg{{color-scheme:light dark}}\n{own.css()}"
        root.insert(2, sheet)
    for element in root.iter():
        element.tail = None
        if element.text and not element.text.strip():
            element.text = None
    return ET.tostring(root, encoding="unicode")


def _introduce(root: ET.Element, prefix: str, title: str, description: str) -> None:
    """Name and description for assistive technology; the size is left to the page."""
    for place, (name, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{SVG}}}{name}", {"id": f"{prefix}-{name}"})
        element.text = text
        root.insert(place, element)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title")
    root.set("aria-describedby", f"{prefix}-desc")


def _hoist_defs(root: ET.Element) -> None:
    """All definitions in one place, each once: a mark that two axes use is the same mark."""
    defs, known = ET.Element(_DEFS), set[str]()
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag == _DEFS]:
            parent.remove(child)
            for item in child:
                if item.tag != _STYLE and item.get("id", "") not in known:
                    known.add(item.get("id", ""))
                    defs.append(item)
    root.insert(0, defs)


def _rename_ids(root: ET.Element, prefix: str) -> None:
    """Short ids where something refers to them, none elsewhere."""
    used = dict[str, str]()
    for element in root.iter():
        for found in _references(element):
            used.setdefault(found, f"{prefix}{len(used)}")
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", used[name])
        href = element.get(_HREF, "")
        if href.startswith("#"):
            del element.attrib[_HREF]  # SVG 2 has it without a namespace: a third of all bytes
            element.attrib = {"href": f"#{used[href[1:]]}", **element.attrib}
        for name in ("clip-path", "style"):  # a style can fill with a hatching
            if "url(#" in element.get(name, ""):
                text = _URL.sub(lambda m: f"url(#{used[m.group(1)]})", element.get(name, ""))
                element.set(name, text)


def _references(element: ET.Element) -> Iterator[str]:
    href = element.get(_HREF, "")
    if href.startswith("#"):
        yield href[1:]
    for name in ("clip-path", "style"):
        yield from _URL.findall(element.get(name, ""))


def _shrink(element: ET.Element, styles: Styles) -> None:
    """Rounded numbers, and a class instead of a style."""
    for name in _PLACES:
        if name in element.attrib:
            digits = 2 if len(element.get(name, "")) < _SMALL else 1
            short = _rounded(element.get(name, ""), digits)
            element.set(name, _JOINT.sub(r"\1", " ".join(short.split())))
    if "transform" in element.attrib:
        element.set("transform", _rounded(element.get("transform", ""), 3))
    style = element.attrib.pop("style", None)
    if style:
        element.set("class", styles.name(style))


def _rounded(text: str, digits: int) -> str:
    """A text with the numbers in it rounded.

    >>> _rounded("M 1.2345 -0.04 L 3.0 2", 1)
    'M 1.2 0 L 3 2'
    """

    def one(match: "re.Match[str]") -> str:
        short = f"{float(match.group()):.{digits}f}".rstrip("0").rstrip(".")
        return "0" if short in ("-0", "") else short

    return _NUMBER.sub(one, text)


def _share_classes(root: ET.Element) -> None:
    """A class that all uses of a mark in a group have stands at the group."""
    for group in root.iter(_G):
        children = list(group)
        classes = {child.get("class") for child in children}
        if len(children) > 1 and len(classes) == 1 and {c.tag for c in children} == {_USE}:
            shared = classes.pop()
            if shared and "class" not in group.attrib:
                group.set("class", shared)
                for child in children:
                    del child.attrib["class"]


def _flatten(element: ET.Element) -> None:
    """Groups that say nothing are replaced by what is in them."""
    for child in list(element):
        _flatten(child)
        if child.tag == _G and not child.attrib:
            place = list(element).index(child)
            element.remove(child)
            for offset, grandchild in enumerate(child):
                element.insert(place + offset, grandchild)


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
