"""Text that would do harm in a page, and what a harmless page is."""

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import resdiag

_SCRIPT = Path(resdiag.__file__).parent / "report" / "templates" / "heatmap.js"


class _Reader(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._path = Counter(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._path.append(tag)

    def handle_endtag(self, tag):
        while self._path and self._path.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._path):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check_harmless(html):
    """No handler, no request; a style sheet, at most a heat map's script, known by their hash."""
    seen = _Reader(html)
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', html)
    _check_scripts(html, policy, seen.tags["script"])
    forbidden = ("iframe", "object", "embed", "form", "link", "base", "img")
    assert not [tag for tag in forbidden if seen.tags[tag]]
    assert not [a for a in seen.attributes if a[1].startswith("on") or a[1] in ("style", "srcset")]
    for tag, name, value in seen.attributes:
        if name in ("href", "src", "xlink:href", "action"):
            assert value.startswith("#") or (tag == "image" and value.startswith("data:image/png"))
    assert "url(http" not in html
    assert "@import" not in html
    (sheet,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert f"style-src '{_digest(sheet)}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    return seen


def _check_scripts(html, policy, amount):
    """None, and none is allowed; or the one that the package ships, and its data."""
    found = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert len(found) == amount
    if not found:
        assert "script-src" not in policy
        return
    (about, data), (plain, script) = found
    assert (about, plain) == (' type="application/json" id="heat-data"', "")
    assert not set("<>&") & set(data)
    assert json.loads(data)
    assert script == _SCRIPT.read_text("utf-8")
    assert re.findall(r"script-src ([^;]*);", policy) == [f"'{_digest(script)}'"]
    for word in ("http", "fetch", "import", "innerHTML", "eval", "Request", "WebSocket"):
        assert word not in script


def _digest(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP TABLE runs; --",
    "{{ 7*7 }}{% raw %}",
    "</style></title><svg onload=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://example.org/x.png)",
    "עברית و العربية",
    "&lt;b&gt; &amp; $x^2$ `code` | pipe",
    "x" * 3900,
]
