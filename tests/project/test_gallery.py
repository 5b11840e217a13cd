"""The gallery has every kind of plot, and its pictures are there and small."""

import sys

import pytest
from pages import DOCS, generate  # the generator loads the gallery beside it

from resdiag.plots.kinds import KINDS

gallery = sys.modules["gallery"]


def test_the_page_draws_every_kind_of_plot():
    page = (DOCS / "gallery.md").read_text("utf-8")
    assert page == generate.PAGES["../gallery.md"]()
    for name, kind in KINDS.items():
        assert f"resdiag plot {name} " in page
        assert kind.question in page


@pytest.mark.parametrize("chapter", gallery.CHAPTERS, ids=lambda chapter: chapter.name)
def test_each_subject_is_drawn_in_every_kind_or_says_why_not(chapter):
    reasons = dict(chapter.left_out)
    assert set(chapter.kinds) | set(reasons) == set(KINDS)
    assert all(reasons.values())
    for number in range(1, len(chapter.pairs) + 1):
        size = (gallery.PICTURES / chapter.picture(number)).stat().st_size
        assert 5_000 < size < 72_000


def test_no_picture_is_left_over():
    wanted = {
        chapter.picture(number)
        for chapter in gallery.CHAPTERS
        for number in range(1, len(chapter.pairs) + 1)
    }
    assert {path.name for path in gallery.PICTURES.iterdir()} == wanted
