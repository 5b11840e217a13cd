"""What people see on terminals of several widths, and in a pipe: tables, colour, progress."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from terminals import on_terminal

from resdiag.cli import output
from resdiag.cli.main import app
from resdiag.cli.output import print_table, say, style_of
from resdiag.study import live
from resdiag.study.ledger import Entry
from resdiag.terminal import STYLES, open_console
from resdiag.training import display
from resdiag.training.display import Bar, Lines, Progress, open_display

TABLES = [["variants"], ["metrics"], ["data", "list"], ["study", "list"], ["plot", "--list"]]
AT = Progress(
    done=30, loss=2.345, error=0.5, images_per_s=1234.0, worst="block 17: gradient x0.01 since 4"
)


@pytest.fixture(autouse=True)
def _no_habits(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "RESDIAG_RUNS", "RESDIAG_DATA"):
        monkeypatch.delenv(name, raising=False)


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("args", TABLES, ids=" ".join)
def test_a_table_fits_the_terminal_and_no_word_is_cut(monkeypatch, call, args, width):
    with on_terminal(monkeypatch, width) as screen:
        assert app.run(args) == 0
    assert max(map(len, screen.lines)) <= width
    assert "…" not in screen.text
    rows = app_rows(call, args)
    known = set(screen.text.split())
    assert {word for row in rows for cell in row.values() for word in cell.split()} <= known


def app_rows(call, args):
    return [{k: str(v) for k, v in row.items()} for row in json.loads(call(*args, "--json")[1])]


@pytest.mark.parametrize("args", TABLES, ids=" ".join)
def test_in_a_pipe_a_table_has_at_most_120_columns_and_no_colour(call, args):
    code, out, _ = call(*args)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120
    assert "\x1b" not in out


def test_a_word_that_is_wider_than_the_table_is_whole_on_its_line(capsys):
    path = "a/very/long/path" * 20
    print_table(("name", "state", "place"), [("one", "done", path), ("two", "failed", "")], False)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "one",
        "  state  done",
        f"  place  {path}",
        "two",
        "  state  failed",
    ]


def test_short_cells_stand_in_columns(capsys):
    print_table(("name", "state"), [("one", "done"), ("zwölf", "stale")], False)
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == "name   state"
    assert rows[2:] == ["one    done", "zwölf  stale"]


# -- colour -------------------------------------------------------------------------------------


def test_states_and_verdicts_have_their_colours():
    assert style_of("state", "failed") == STYLES["failed"]
    assert style_of("status", "diverged") == STYLES["diverged"]
    assert style_of("verdict", "exploded") == STYLES["fault"]
    assert style_of("verdict", "grows_at_init") == STYLES["condition"]
    assert style_of("verdict", "healthy") == STYLES["healthy"]
    assert style_of("cell", "failed") == style_of("verdict", "") == ""


def test_there_is_colour_on_a_terminal_and_none_where_it_is_not_wanted(monkeypatch):
    def shown(**environment):
        with on_terminal(monkeypatch, 80, "stdout", "stderr", **environment) as screen:
            print_table(("name", "state"), [("one", "failed")], False)
            assert app.run(["nothing"]) == 2
        return screen.raw

    assert "\x1b[1;31mfailed" in shown()
    assert "\x1b[1;31mresdiag:" in shown()
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in shown(**environment)


# -- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("title", ["elu d8", "a_variant_with_quite_a_long_name d110"])
@pytest.mark.parametrize("steps", [60, 64_000])
def test_bar_step_and_time_left_are_seen_at_every_width(monkeypatch, width, title, steps):
    with on_terminal(monkeypatch, width, "stderr") as screen:
        bar = open_display(title, steps, 0, quiet=False)
        assert isinstance(bar, Bar)
        bar.show(AT)
        bar.bar.refresh()
        bar.close()
    line = [line for line in screen.lines if "30/" in line][-1]
    assert len(line) <= width
    assert line.startswith(title[:6])
    assert "━" in line
    assert f"30/{steps}" in line
    assert re.search(r"-:--:--|\d:\d\d:\d\d", line)
    assert "loss 2.35" in line or (width, steps) == (60, 64_000)
    assert ("images/s" in line) == (width == 120 and len(title) < 10)


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch):
    with on_terminal(monkeypatch, 80, "stderr", TERM="dumb"):
        assert isinstance(open_display("elu d8", 5, 0, quiet=False), Lines)


@pytest.mark.parametrize("columns", [0, 9, 20, 40, 60, 80, 200])
def test_what_has_no_room_is_left_out_the_least_important_first(columns):
    said = AT.fit(columns)
    assert len(said) <= columns
    order = ["loss", "error", "block", "images/s"]
    there = [word in said for word in order]
    assert there == sorted(there, reverse=True)


def test_studies_say_a_line_every_ten_seconds(monkeypatch):
    clock, shown = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(live.time, "monotonic", lambda: clock.now)
    look = live.at_most_every(display.LINE_EVERY_S, lambda: shown.append(clock.now))
    for clock.now in range(25):
        look()
    assert shown == [0, 10, 20]


def test_loading_is_said_unless_it_is_done(monkeypatch, capsys):
    output.say_loading()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    output.say_loading(quiet=True)
    assert capsys.readouterr().err == ""
    output.say_loading()
    assert capsys.readouterr().err == "loading PyTorch ...\n"


def test_notices_are_wrapped_on_a_terminal_only(monkeypatch, capsys):
    line = "a notice of many words " * 10
    with on_terminal(monkeypatch, 60, "stderr") as screen:
        say(line)
    assert max(map(len, screen.lines)) <= 60
    assert screen.text.split() == line.split()
    say(line)
    assert capsys.readouterr().err == f"{line.rstrip()}\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_of_a_study_leaves_columns_out_before_it_cuts_a_cell(
    monkeypatch, tmp_path, width
):
    entries = [
        Entry(
            id=f"elu_pre-d110-lr0.1-s{seed}", state=state, folder=tmp_path, step=300, steps=64_000,
            progress={"loss": 2.345, "error": 0.5, "eta_s": 5000.0}, message="no CUDA device",
        )
        for seed, state in enumerate(("running", "failed", "done"))
    ]  # fmt: skip
    with on_terminal(monkeypatch, width) as screen:
        console = open_console(sys.stdout)
        assert console.width == width
        console.print(live.draw_table(entries, console.width))
    assert max(map(len, screen.lines)) <= width
    assert "…" not in screen.text
    for word in ("elu_pre-d110-lr0.1-s0", "running", "failed", "300/64000"):
        assert word in screen.text
    assert ("50%" in screen.text) == (width == 120)
