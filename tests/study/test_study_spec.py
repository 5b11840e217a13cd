"""Study files: all mistakes at once, the grid, what a study may not do to who reads it."""

import cProfile
import itertools
import json
import os
import pstats
import string
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studyfiles import TINY, write_study

from resdiag.cli.main import app
from resdiag.errors import ResdiagError, UsageError
from resdiag.study.document import StudyError, override, read_document
from resdiag.study.grid import MOST_CELLS
from resdiag.study.shipped import shipped_studies, study_template
from resdiag.study.spec import MOST_MISTAKES, check_document
from resdiag.study.study import build_study, load_study
from resdiag.study.work import Task, work
from resdiag.training.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "paper", "explosion", "degradation", "degradation-cpu", "initialisation", "rescue-cpu", "smoke",
    "branch-dose",
)  # fmt: skip


def build(text, *sets, mini=False):
    return build_study("x", read_document(text, "x.toml"), sets, mini, "x.toml")


def problems(text, *sets):
    with pytest.raises(StudyError) as caught:
        build(text, *sets)
    assert caught.value.exit_code == 2
    return caught.value.problems


def mistakes(read):
    """What is wrong with what `read` reads; None if nothing is."""
    try:
        read()
    except StudyError as error:
        return error.problems
    return None


# -- mistakes --------------------------------------------------------------------------------------

WRONG = """
question = "q"
seeds = [0, 0]
sed = 3
lr = 0.1
[fixed]
epoch = 3
data = "cifar"
lr = "0.1"
device = "cuda"
[grid]
variant = ["elu", "elu_prr"]
depth = [20, 57]
seed = [1]
[[include]]
variant = "elu"
depth = 20
momentm = 0.5
[resources]
threads = 0
[[expected]]
measure = "test_eror"
value = 0.1
tolerance = 1.0
source = "x"
[[expected]]
measure = "test_error"
value = "low"
source = "x"
[[figure]]
plot = "gradnrms"
cells = { dept = 20 }
"""


def test_all_mistakes_are_named_at_once_with_place_and_nearest_match():
    found = problems(WRONG)
    expected = [
        "x.toml: seeds = [0, 0]: 0 is there twice",
        "x.toml: unknown key 'sed'; did you mean 'seeds'?",
        "x.toml: unknown key 'lr'; did you mean 'fixed.lr' or 'grid.lr'?",
        "x.toml: [fixed] unknown key 'epoch'; did you mean 'epochs'?",
        "x.toml: [fixed] data = 'cifar': unknown data 'cifar'; did you mean 'cifar10'?",
        "x.toml: [fixed] lr = '0.1': must be a number",
        "x.toml: [fixed] unknown key 'device'; the device is the machine's: --device",
        "x.toml: [grid] variant[1] = 'elu_prr': unknown variant 'elu_prr'; did you mean 'elu_pre'?",
        "x.toml: [grid] depth[1] = 57: depth 57 is not 6n+2; nearest: 56, 62",
        "x.toml: [grid] unknown key 'seed'; seeds stand at the top of the file",
        "x.toml: [[include]] no. 1 unknown key 'momentm'; did you mean 'momentum'?",
        "x.toml: [resources] threads = 0: must be greater than or equal to 1",
        "x.toml: [[expected]] no. 1 measure = 'test_eror': unknown measure 'test_eror'; did you",
        "x.toml: [[expected]] no. 2: test_error is a number, not 'low'",
        "x.toml: [[figure]] no. 1 plot = 'gradnrms': unknown plot 'gradnrms'; did you mean",
        "x.toml: [[figure]] no. 1 cells unknown key 'dept'; did you mean 'depth'?",
    ]
    for start in expected:
        assert [line for line in found if line.startswith(start)], start
    assert len(found) == len(expected)


def test_the_command_prints_a_line_for_each_mistake(tmp_path, capsys):
    path = write_study(tmp_path, WRONG)
    assert app.run(["study", "run", str(path), "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 16
    assert all(line.startswith(f"resdiag: {path}: ") for line in lines)
    assert app.run(["study", "status", str(path), "--json"]) == 2
    assert set(json.loads(capsys.readouterr().out)) == {"error", "hint"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[grid]\ndepth = [20]", "'variant' is missing in [fixed] and [grid]"),
        ("[fixed]\ndepth = 20", "[grid] is missing, and there is no [[include]]"),
        ('[[include]]\nvariant = "elu"', "[[include]] no. 1 depth is missing"),
        (
            '[fixed]\nlr = 0.1\n[grid]\nvariant = ["elu"]\ndepth = [20]\nlr = [0.2]',
            "'lr' stands in [fixed] and in [grid]",
        ),
        (
            '[fixed]\nsteps = 3\n[grid]\nvariant = ["elu"]\ndepth = [20]\nepochs = [2]',
            "--steps and --epochs exclude each other",
        ),
        (
            '[grid]\nvariant = ["elu"]\ndepth = [20]\n[[exclude]]\ndepth = 20',
            "no cells are left: 'exclude' takes all of them",
        ),
        (
            '[grid]\nvariant = ["elu"]\ndepth = [20]\n[[figure]]\nplot = "skip"\n'
            "cells = { depth = 56 }",
            "[[figure]] no. 1 means no cell of the study: depth = [56]",
        ),
        ('[fixed]\ndata = "auto"', "a study names its data"),
        ('[grid]\nvariant = ["d", "elu"]\ndepth = [20]', "'elu' is there twice"),
        (
            '[grid]\nvariant = ["elu"]\ndepth = [20]\n[[expected]]\nmeasure = "skip_gain"\n'
            'value = 1\ntolerance = 0\nsource = "s"',
            "a metric has a step",
        ),
        (
            '[grid]\nvariant = ["elu"]\ndepth = [20]\n[[expected]]\nmeasure = "test_error"\n'
            'value = 1\nsource = "s"',
            "a number has a tolerance or a factor",
        ),
    ],
)
def test_contradictions_are_refused(change, message):
    assert message in "\n".join(problems(f'question = "q"\n{change}'))


MEANT = """
question = "q"
[fixed]
data = "digits"
[grid]
variant = ["elu"]
depth = [8, 20]
[[figure]]
plot = "skip"
cells = { depth = 20 }
[[figure]]
plot = "curves"
[[expected]]
cells = { depth = 20 }
measure = "status"
value = "done"
source = "s"
"""


def test_what_set_leaves_without_a_cell_is_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, MEANT, "meant")
    study = load_study("meant.toml", ["grid.depth=[8]"])
    assert study.dropped == ("[[figure]] no. 1", "[[expected]] no. 1")
    assert ([f.plot for f in study.file.figure], study.file.expected) == (["curves"], [])
    again = load_study(str(study.write_plan(tmp_path / "runs")))  # engines read the plan
    assert (again.cells, again.digest) == (study.cells, study.digest)
    assert load_study("meant.toml", ["grid.depth=[20]"]).dropped == ()
    assert app.run(["study", "status", "meant.toml", "--set", "grid.depth=[8]"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no cell of theirs: [[figure]] no. 1, [[expected]] no. 1 (2 in all)")


def test_a_slip_in_the_file_stays_one_whatever_is_set(tmp_path):
    path = write_study(
        tmp_path, MEANT.replace("{ depth = 20 }\nmeasure", "{ depth = 56 }\nmeasure")
    )
    for sets in ((), ("grid.depth=[8]",), ("seeds=[3]",)):
        with pytest.raises(StudyError, match=r"expected.. no. 1 means no cell"):
            load_study(str(path), sets)


def test_paper_can_be_run_at_one_depth():
    study = load_study("paper", ["grid.depth=[20]", "include=[]"])
    assert {cell.request.depth for cell in study.cells} == {20}
    assert study.file.expected
    assert len(study.file.expected) + sum("expected" in d for d in study.dropped) == len(
        load_study("paper").file.expected
    )


# -- hostile files ---------------------------------------------------------------------------------

GRID = '[grid]\nvariant = ["elu"]\ndepth = [20]\n'
_DEPTHS = ",".join(str(6 * n + 2) for n in range(1, 1001))
_SEEDS = ",".join(map(str, range(1000)))
HOSTILE = {
    "a billion cells": f'question = "q"\nseeds = [{_SEEDS}]\n[grid]\nvariant = ["elu"]\n'
    f"depth = [{_DEPTHS}]\nlr = [{','.join(f'{n}e-4' for n in range(1000))}]",
    "deep arrays": 'question = "q"\nseeds = ' + "[" * 50_000 + "]" * 50_000,
    "deep tables": 'question = "q"\nfixed = ' + "{a=" * 20_000 + "1" + "}" * 20_000,
    "deep keys": f'question = "q"\n[{".".join("a" * 9000)}]\nx = 1',
    "a huge integer": 'question = "q"\nseeds = [' + "9" * 5000 + "]",
    "a large integer": f'question = "q"\nseeds = [{"9" * 4000}]\n{GRID}',
    "a huge depth": 'question = "q"\n[grid]\nvariant = ["elu"]\ndepth = [6000000000000000002]',
    "infinity": f'question = "q"\n{GRID}lr = [inf]',
    "not a number": f'question = "q"\n{GRID}lr = [nan]',
    "a negative rate": f'question = "q"\n{GRID}lr = [-0.1]',
    "a terminal's commands": f'question = "\\u001b]0;owned\\u0007"\n{GRID}',
    "a long text": f'question = "{"a" * 100_000}"\n{GRID}',
    "two megabytes": f'question = "q"\n#{"a" * 2_000_000}',
    "not UTF-8": b'question = "\xff\xfe"',
    "zeros": b"\x00" * 1000,
    "a date": f"question = 1979-05-27\nseeds = [1979-05-27T07:32:00Z]\n{GRID}",
    "every type wrong": "question = 1\nexpects = []\nseeds = {}\nfixed = 3\ngrid = [1]\n"
    "include = 'x'\nresources = true\nfigure = [1, 'a']\nexpected = [[1]]",
    "a name that climbs": 'question = "q"\n[grid]\nvariant = ["../../../etc/passwd"]\ndepth = [20]',
    "a key that climbs": f'question = "q"\n"../../x" = 1\n{GRID}',
    "a boolean for a number": 'question = "q"\n[grid]\nvariant = ["elu"]\ndepth = [true]',
    "thousands of mistakes": 'question = "q"\n[grid]\nvariant = ['
    + ",".join(f'"v{n}"' for n in range(900))
    + "]\ndepth = [20]",
    "a huge hexadecimal": f'question = "q"\n{GRID}lr = [0x{"f" * 9000}]',
    "a key of a hundred thousand parts": f'question = "q"\n{".".join("a" * 100_000)} = 1',
    "keys twice": f'question = "q"\nquestion = "r"\n{GRID}',
    "ten megabytes": b"#" * 10_000_000,
    "a negative seed": f'question = "q"\nseeds = [-1]\n{GRID}',
    "an empty grid": 'question = "q"\n[grid]',
    "an empty list": 'question = "q"\n[grid]\nvariant = []\ndepth = [20]',
    "a letter like another": 'question = "q"\n[grid]\nvariant = ["\u0435lu"]\ndepth = [20]',
    "text from right to left": f'question = "abc\u202edef"\n{GRID}',
    "no width": 'question = "q"\n[grid]\nvariant = ["e\u200blu"]\ndepth = [20]',
    "a zero in a path": f'question = "q"\n[fixed]\ndata = "folder:a\\u0000b"\n{GRID}',
    "sixty thousand unknown keys": 'question = "q"\n'
    + "\n".join(f"k{n} = 1" for n in range(60_000)),
    "thousands of filters on thousands of cells": f'question = "q"\nseeds = [{_SEEDS}]\n[grid]\n'
    'variant = ["elu", "elu_pre"]\ndepth = [20, 26, 32, 38, 44]\n'
    + '[[expected]]\ncells = { lr = 0.5 }\nmeasure = "status"\nvalue = "done"\nsource = "x"\n'
    * 7000,
    "half a character": f'question = "\\ud800"\n{GRID}',
    "a million tables": 'question = "q"\n' + "[[include]]\n" * 80_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_fast_and_in_printable_lines(name, tmp_path):
    text = HOSTILE[name]
    path = tmp_path / "hostile.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    # what a busy machine does not change: the calls that reading a file takes
    with cProfile.Profile() as profile, pytest.raises(StudyError) as caught:
        load_study(str(path))
    assert pstats.Stats(profile).total_calls < 5_000_000
    assert all(line.isprintable() and len(line) < 1000 for line in caught.value.problems)
    assert len(caught.value.problems) <= MOST_MISTAKES + 1


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zeros.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for name, words in (("pipe", "not a file"), ("zeros", "not a file"), ("loop", "cannot read")):
        with pytest.raises(UsageError, match=words):
            load_study(str(tmp_path / f"{name}.toml"))


def test_a_mark_of_the_byte_order_and_line_ends_of_windows_do_no_harm(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TINY.replace("\n", "\r\n").encode())
    assert len(load_study(str(path)).cells) == 4


def test_two_cells_of_one_id_are_refused(monkeypatch):
    from resdiag.study import grid

    monkeypatch.setattr(grid, "_name", lambda request: f"{request.variant}-x")
    assert [line for line in problems(TINY) if "has the id of another cell, elu-x" in line]


def test_a_letter_that_looks_like_another_is_shown_by_its_number():
    (line,) = problems('question = "q"\n[grid]\nvariant = ["\u0435lu"]\ndepth = [20]')
    assert "variant[0] = '\\u0435lu'" in line
    assert "did you mean 'elu'" in line


def test_the_limit_of_cells_is_named():
    (line,) = problems(HOSTILE["a billion cells"])
    assert line == f"x.toml: 1000000000 cells; a study has at most {MOST_CELLS}"


def test_markup_in_every_string_stays_text(tmp_path, capsys):
    bad = "<script>alert(1)</script>[red]x[/red]"
    text = f"""
question = "{bad}"
expects = "{bad}"
source = "{bad}"
cost = "{bad}"
[fixed]
data = "folder:{bad}"
[grid]
variant = ["elu"]
depth = [20]
[[figure]]
plot = "skip"
title = "{bad}"
[[expected]]
measure = "status"
value = "{bad}"
source = "{bad}"
"""
    study = build(text)
    assert study.file.question == study.file.expected[0].value == bad
    assert "<" not in study.cells[0].id
    path = write_study(tmp_path, text, "markup")
    assert app.run(["study", "watch", str(path), "--runs", str(tmp_path / "runs")]) == 0
    assert bad in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a b", "-x", "..", "é", "x" * 70, "con.", "a\nb"])
def test_a_study_is_named_like_its_file_and_such_names_only(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(TINY)
    with pytest.raises(UsageError, match=r"is not a study|unknown study"):
        load_study(str(path))


def test_a_cell_that_is_none_is_refused_whatever_it_is_called(tmp_path):
    path = write_study(tmp_path)
    for name in ("../../etc", "elu-d8-s0-00000000", "/", ""):
        words = ["study", "cell", str(path), name, "--runs", str(tmp_path / "runs")]
        assert app.run(words) == 2
    assert not (tmp_path / "runs").exists()


WORDS = st.text(string.printable, max_size=20)
SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(), WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["question", "seeds", "fixed", "grid", "include", "exclude", "figure", "expected", "resources",
     "variant", "depth", "lr", "cells", "measure", "value"]
)  # fmt: skip


@settings(max_examples=150)
@given(st.dictionaries(st.one_of(KEYS, WORDS), VALUES, max_size=6))
def test_any_document_is_a_study_or_a_list_of_mistakes(document):
    found = mistakes(lambda: check_document(document, "x.toml"))
    assert found != ()
    assert all(line.startswith("x.toml: ") and line.isprintable() for line in found or ())


@settings(max_examples=150)
@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text):
    found = mistakes(lambda: read_document(text, "x.toml"))
    assert all(line.isprintable() for line in found or ())


# -- the grid --------------------------------------------------------------------------------------

DEPTHS = st.lists(st.sampled_from([8, 14, 20, 26]), min_size=1, max_size=4, unique=True)
NAMES = st.lists(
    st.sampled_from(["original", "elu", "elu_pre", "plain"]), min_size=1, max_size=4, unique=True
)
RATES = st.lists(st.sampled_from([0.1, 0.01, 0.001]), min_size=1, max_size=3, unique=True)
SEEDS = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)


@settings(max_examples=60)
@given(variant=NAMES, depth=DEPTHS, lr=RATES, seeds=SEEDS)
def test_cells_are_the_product_of_the_grid(variant, depth, lr, seeds):
    grid = {"variant": variant, "depth": depth, "lr": lr}
    study = build_study("x", {"question": "q", "seeds": seeds, "grid": grid}, (), False, "x.toml")
    requests = [(c.request.variant, c.request.depth, c.request.lr, c.request.seed)
                for c in study.cells]  # fmt: skip
    assert requests == list(itertools.product(variant, depth, lr, seeds))
    assert len({cell.id for cell in study.cells}) == len(requests)


def test_include_adds_and_exclude_takes_away():
    study = build("""
question = "q"
seeds = [0, 1]
[fixed]
steps = 5
[grid]
variant = ["elu", "b"]
depth = [20, 56]
[[exclude]]
variant = ["elu_pre", "plain"]
depth = 56
[[include]]
variant = "original"
depth = [20, 110]
lr = 0.01
seed = 7
[[include]]
variant = "elu"
depth = 20
""")
    found = [(c.request.variant, c.request.depth, c.request.lr, c.request.seed)
             for c in study.cells]  # fmt: skip
    assert found == [
        ("elu", 20, None, 0), ("elu", 20, None, 1), ("elu", 56, None, 0), ("elu", 56, None, 1),
        ("elu_pre", 20, None, 0), ("elu_pre", 20, None, 1),
        ("original", 20, 0.01, 7), ("original", 110, 0.01, 7),
    ]  # fmt: skip  # the last table names cells that are there already
    assert all(cell.request.steps == 5 for cell in study.cells)


def test_ids_follow_what_decides_the_numbers_and_nothing_else(monkeypatch):
    plain = build(TINY).cells[0]
    assert plain.id.startswith("elu-d8-s0-")
    same = [
        build(TINY.replace("Do tiny networks learn?", "Other words")),
        build(TINY, "resources.threads=2", "resources.gpus=0.5"),
        build(TINY.replace('"elu"', '"d"')),
        build(TINY, 'grid.variant=["elu_pre", "elu"]'),
    ]
    assert all(plain.id in {cell.id for cell in study.cells} for study in same)
    for change in ("fixed.lr=0.05", "fixed.steps=7", "fixed.data=fashion", "fixed.every=9"):
        assert plain.id not in {cell.id for cell in build(TINY, change).cells}
    from dataclasses import replace

    from resdiag.study import grid

    other = {**RECIPES, "short": replace(RECIPES["short"], lr=0.2)}
    monkeypatch.setattr(grid, "RECIPES", other)
    assert build(TINY).cells[0].id != plain.id


# -- --set, --mini, plans --------------------------------------------------------------------------


def test_set_changes_a_value_and_is_checked_like_the_file():
    study = build(TINY, "fixed.lr=0.05", "grid.depth=[14]", "seeds=[3]", "fixed.data=fashion")
    assert {(c.request.lr, c.request.depth, c.request.seed, c.request.data)
            for c in study.cells} == {(0.05, 14, 3, "fashion")}  # fmt: skip
    assert problems(TINY, "fixed.lrr=0.05") == (
        "x.toml: [fixed] unknown key 'lrr'; did you mean 'lr'?",
    )
    assert problems(TINY, "fixed.lr=oops")[0].startswith("x.toml: [fixed] lr = 'oops'")
    found = problems(TINY, "lr", "a.b.c=1", "fixed.lr=[", "grid.depth=1]\nx=2")
    assert len(found) == 4
    assert all(line.startswith("--set ") for line in found)


def test_set_leaves_the_document_alone():
    document = tomllib.loads(TINY)
    override(document, ["fixed.lr=0.5"])
    assert document == tomllib.loads(TINY)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_expand_and_shrink(name):
    study, mini = load_study(name), load_study(name, mini=True)
    assert study.file.question
    assert study.file.expects
    assert study.file.source
    assert study.file.cost
    assert study.file.figure
    assert {cell.request.variant for cell in mini.cells} == {
        cell.request.variant for cell in study.cells
    }
    assert len(mini.cells) <= 18
    for cell in mini.cells:
        assert cell.request.data == "digits"
        assert cell.request.depth <= 14
        assert cell.request.steps == 4
    assert mini.name == f"{name}-mini"
    assert not {c.id for c in study.cells} & {c.id for c in mini.cells}


def test_the_shipped_studies_are_all_there_and_in_the_wheel():
    assert set(shipped_studies()) == set(SHIPPED)
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"]["force-include"] == {
        f"studies/{name}.toml": f"resdiag/study/shipped/{name}.toml" for name in SHIPPED
    }


def test_the_paper_is_asked_for_its_own_numbers():
    study = load_study("paper")
    assert len(study.cells) == 3 * (5 * 5 + 2)
    table = {
        (e.cells.given["variant"][0], e.cells.given["depth"][0]): e.value
        for e in study.file.expected
        if e.source.endswith("Table 1")
    }
    published = {
        20: (8.38, 8.32), 32: (7.51, 7.30), 44: (7.17, 6.93), 56: (6.97, 6.31), 110: (6.42, 5.62),
    }  # fmt: skip
    assert table == {
        (variant, depth): pytest.approx(row[i] / 100)
        for depth, row in published.items()
        for i, variant in enumerate(("original", "elu"))
    }
    assert {cell.request.recipe for cell in study.cells} == {"paper"}


def test_a_template_is_a_study(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    assert app.run(["study", "init", str(path)]) == 0
    assert len(load_study(str(path)).cells) == 8
    assert app.run(["study", "init", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    commented = study_template("x").replace("# [[", "[[")
    lines = [line.removeprefix("# ") if " = " in line else line for line in commented.splitlines()]
    assert len(build("\n".join(lines)).file.expected) == 1  # what is commented out is right too


def test_a_folder_without_a_plan_does_not_hide_a_shipped_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke" / "smoke").mkdir(parents=True)  # as `--runs smoke` leaves it
    (tmp_path / "other").mkdir()

    assert load_study("smoke").name == "smoke"
    with pytest.raises(UsageError, match="no study in other"):
        load_study("other")


def test_a_plan_is_the_study_and_cannot_be_altered(tmp_path):
    for mini in (False, True):
        study = load_study(str(write_study(tmp_path)), ["fixed.lr=0.05"], mini=mini)
        plan = study.write_plan(tmp_path / "runs")
        assert plan == study.write_plan(tmp_path / "runs")
        assert load_study(str(plan)) == study
        assert load_study(str(plan.parent)) == study
    plan.write_text(plan.read_text().replace('"digits"', '"fashion"'))
    with pytest.raises(UsageError, match="was altered"):
        load_study(str(plan))
    with pytest.raises(UsageError, match="is a plan and is not changed"):
        load_study(str(plan), ["fixed.lr=1.0"])


def test_a_plan_in_the_words_of_an_older_version_is_read(tmp_path):
    study = load_study(str(write_study(tmp_path)), ['fixed.recipe="short"'])
    document = {**study.document, "fixed": {**study.document["fixed"], "recipe": "probe"}}
    old = replace(study, document=document).write_plan(tmp_path / "runs")

    assert load_study(str(old)) == study


def test_two_processes_that_write_one_plan_leave_each_other_alone(tmp_path, monkeypatch):
    """While one has its temporary file, another writes the whole plan; then the first renames."""
    from resdiag.runs import files

    study = load_study(str(write_study(tmp_path)))
    rename, here = files.system.rename, os.getpid()

    def rename_after_the_other(source, target):
        monkeypatch.setattr(files.system, "rename", rename)
        monkeypatch.setattr(files.os, "getpid", lambda: here + 1)
        study.write_plan(tmp_path / "runs")
        rename(source, target)

    monkeypatch.setattr(files.system, "rename", rename_after_the_other)
    plan = study.write_plan(tmp_path / "runs")
    assert load_study(str(plan)) == study
    assert [path.name for path in plan.parent.iterdir()] == [plan.name]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', "[" * 100_000, "\x00"])
def test_a_file_that_is_no_plan_is_refused(content, tmp_path):
    path = tmp_path / "plan-00000000.json"
    path.write_text(content)
    with pytest.raises(ResdiagError):
        load_study(str(path))


def test_a_study_that_is_not_there_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'paper'"):
        load_study("papr")
    with pytest.raises(UsageError, match="cannot read"):
        load_study(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="no study in"):
        load_study(str(tmp_path))


def test_the_eager_backend_leaves_the_ids_that_cells_had_before_there_were_others():
    (cell, *_) = load_study("smoke").cells
    (other, *_) = load_study("smoke", ['fixed.backend="fast"']).cells

    assert cell.id == "original-d8-s0-141df718"
    assert other.id != cell.id


def test_a_study_whose_data_are_not_here_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--set", 'fixed.data="cifar10"', "--data-root", "none"]

    assert app.run(["study", "run", str(write_study(tmp_path)), *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cifar10 is not on disk; searched none (`resdiag data get cifar10`" in line


def test_a_backend_for_some_machines_is_seen_where_the_cell_runs(tmp_path):
    """A plan is made on one machine for others."""
    study = load_study("smoke", ['fixed.backend="graph"'])
    plan, cell = study.write_plan(tmp_path), study.cells[0]
    with pytest.raises(UsageError, match="replays CUDA graphs, not on cpu"):
        work(Task(study=str(plan), cell=cell.id, runs=str(tmp_path), device="cpu"))
