"""The verdict in words: wrapped between words at any width, commands whole, colour by severity."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminals import on_terminal

from resdiag.diagnose.finding import Evidence, Finding
from resdiag.diagnose.registry import FINDINGS
from resdiag.diagnose.text import render, severity
from resdiag.diagnose.verdict import Verdict
from resdiag.terminal import STYLES, paint, wrap

LONG = "runs/" + "a-very-long-name-of-a-run/" * 4 + "elu_pre-d110-s0-2367bcf1"
CONDITION = next(name for name, row in FINDINGS.items() if row.is_condition)


def made(name="exploded", **changes):
    found = Finding(name=name, summary="It broke.", why="So.", evidence=())
    verdict = Verdict(
        name=name, cause="a norm that is not finite", step=1, block=2,
        summary=f"non-finite at step 1, forward in block 2 (stages.0.2), see {LONG} for it.",
        why="Each block adds a branch as large as its shortcut, so E[H^2] grows x1.89 per block.",
        evidence=(
            Evidence(metric="output_second_moment", value=2.0, threshold=1.4, source="x",
                     text="E[H^2] grows 2.28 times per block in stage 0, from block 0 (s.0.0)"),
        ),
        next=(
            f"resdiag plot signal {LONG}",
            "resdiag run --variant elu --depth 110 --lr 0.001  # nothing on the skip path, and "
            "a tenth of the learning rate; not tried",
            "no learning rate helps: it would survive below 2.2e-09, and learn nothing",
        ),
        findings=(found,),
        not_judged=("overfit: no test error", "stalled: no test error", "the rest: it runs"),
    )  # fmt: skip
    return replace(verdict, **changes)


@pytest.mark.parametrize("width", [60, 61, 80, 100, 200])
def test_lines_fit_and_words_paths_and_commands_stay_whole(width):
    text = render(made(), width)
    for line in text.splitlines():
        assert len(line) <= width or LONG in line or line.split()[0] == "resdiag"
    words, wide = ([w for w in of.split() if w != "#"] for of in (text, render(made(), 10_000)))
    assert words == wide
    lines = [line[10:] for line in text.splitlines()]
    assert f"resdiag plot signal {LONG}" in lines
    assert any(
        line.startswith("resdiag run --variant elu --depth 110 --lr 0.001") for line in lines
    )


def test_a_remark_is_beside_its_command_where_both_fit_and_below_where_not():
    def next_lines(width):
        (entry,) = made(next=("resdiag run --depth 110  # not tried",)).next
        lines = render(made(next=(entry,)), width).splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("Next"))
        return [line[10:] for line in lines[first : first + 2]]

    assert next_lines(60)[0] == "resdiag run --depth 110  # not tried"
    assert next_lines(40) == ["resdiag run --depth 110", "  # not tried"]


def test_reasons_are_said_once_with_all_they_concern():
    text = render(made(), 100)
    assert "- overfit, stalled: no test error\n" in text
    assert text.endswith("- the rest: it runs")


def test_colour_changes_no_letter():
    plain, coloured = render(made(), 70), render(made(), 70, colour=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


@pytest.mark.parametrize(
    ("name", "findings", "wanted"),
    [
        ("exploded", ("exploded",), "fault"),
        (CONDITION, (CONDITION,), "condition"),
        (CONDITION, (CONDITION, "exploded"), "fault"),
        ("healthy", (), "healthy"),
        ("healthy", (CONDITION,), "healthy"),
        ("undetermined", (), "undetermined"),
    ],
)
def test_the_name_has_the_colour_of_its_severity(name, findings, wanted):
    found = tuple(Finding(name=n, summary="", why="", evidence=()) for n in findings)
    verdict = made(name, findings=found)
    assert severity(verdict) == wanted
    assert paint(name, wanted) in render(verdict, 100, colour=True)


def test_every_style_is_drawn_with_the_colours_of_the_terminal():
    for style in STYLES:
        assert re.fullmatch(r"\x1b\[[\d;]+mx\x1b\[0m", paint("x", style))
        assert "38;" not in paint("x", style)


@pytest.mark.parametrize(("columns", "wanted"), [(40, 60), (60, 60), (80, 80), (120, 100)])
def test_the_text_is_as_wide_as_the_terminal_from_60_to_100(monkeypatch, columns, wanted):
    with on_terminal(monkeypatch, columns):
        assert str(made()) == render(made(), wanted)


def test_in_a_pipe_the_text_has_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "61")  # says how wide a terminal is, and this is none
    assert str(made()) == render(made(), 100)


def test_the_folder_in_a_command_is_quoted_for_the_shell():
    from judged_runs import plant

    from resdiag.diagnose.verdict import judge

    run = replace(plant(steps=5), path=Path("my runs/one"))
    assert any("'my runs/one'" in line for line in judge(run).next)


@given(st.text(), st.integers(1, 80), st.sampled_from(["", "  "]))
def test_wrapping_keeps_every_word(text, width, indent):
    lines = wrap(text, width, indent)
    assert " ".join(lines).split() == text.split()
    for line in lines:
        words = re.findall(r"[^\t\n\v\f\r ]+", line)  # no line breaks at other white space
        assert len(line) <= width or len(words) == 1
