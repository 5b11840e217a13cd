"""Help: every summary whole at 80 columns, -h everywhere, --version, and what `run` can run."""

import re

import pytest
from typer.main import get_command

from resdiag.cli.main import app
from resdiag.models.variants import VARIANTS, Variant

MINE = Variant(
    id="of_an_extension", branch="conv-bn", after_add="none", stem="conv-elu", source="an example"
)


def every_command():
    def walk(words, command):
        yield words, command
        for name, member in getattr(command, "commands", {}).items():
            yield from walk((*words, name), member)

    return dict(walk((), get_command(app)))


COMMANDS = every_command()
GROUPS = [words for words, command in COMMANDS.items() if getattr(command, "commands", None)]


@pytest.fixture(autouse=True)
def _columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("TERMINAL_WIDTH", "MAX_WIDTH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_the_summary_of_each_command_is_one_whole_line_of_80_columns(call, words):
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    listed = dict(re.findall(r"^  (\S+) +(.*\.)$", out.partition("Commands:")[2], re.MULTILINE))
    for name, member in COMMANDS[words].commands.items():
        said = " ".join(member.help.split())
        assert not listed[name].endswith("...")
        assert re.fullmatch(rf"{re.escape(listed[name])}( [A-Z`].*)?", said)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_h_for_help(call, words):
    assert call(*words, "-h") == call(*words, "--help")
    assert call(*words, "-h")[0] == 0


def test_version_is_an_option_and_a_command(call):
    assert call("--version") == call("version")
    assert call("--version")[0] == 0


def test_run_alone_says_in_a_few_lines_what_there_is(call):
    with VARIANTS.added(MINE):
        code, out, err = call("run")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("resdiag: ") for line in lines)
    assert "resdiag run --variant elu_pre --depth 110" in lines[0]
    assert all(name in lines[1] for name in VARIANTS)
    assert "elu_pre (b)" in lines[1]
    assert MINE.id in lines[1]
    assert MINE.id not in call("run")[2]


def test_the_help_of_run_lists_variants_of_extensions(call):
    with VARIANTS.added(MINE):
        assert MINE.id in call("run", "--help")[1]
    assert MINE.id not in call("run", "--help")[1]


def test_a_study_without_results_has_no_report(call, tmp_path):
    code, out, err = call("study", "report", "smoke", "--runs", tmp_path / "none")
    assert (code, out) == (2, "")
    assert "no cell of smoke was begun" in err
    assert "resdiag study run smoke" in err
    assert not list(tmp_path.iterdir())
