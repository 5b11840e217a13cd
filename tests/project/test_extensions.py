"""The examples of the pages "Add a ..." as an installed package that the commands load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
PAGES = ("dataset", "finding", "intervention", "plot", "tracker", "variant")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as pip leaves it: a module per page, their entry points, and one that is broken."""
    folder = tmp_path_factory.mktemp("site")
    for page in PAGES:
        text = (HOWTO / f"extend-{page}.md").read_text()
        example = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        (folder / f"example_{page}.py").write_text(example[1])
    (folder / "example_broken.py").write_text("import no_such_module\n")
    about = folder / "examples-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    points = "".join(f"{page} = example_{page}\n" for page in (*PAGES, "broken"))
    (about / "entry_points.txt").write_text(f"[resdiag.extensions]\n{points}")
    return folder


@pytest.fixture
def resdiag(site, tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "resdiag", *map(str, words)],
            capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{HOWTO.parents[1]}"},
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("words", "row"),
    [(("plot", "--list"), "idle"), (("data", "list"), "stripes"), (("variants",), "relu_first")],
)
def test_commands_know_rows_of_installed_packages(resdiag, words, row):
    done = resdiag(*words)

    assert done.returncode == 0
    assert row in done.stdout
    (line,) = done.stderr.splitlines()
    assert "extension 'broken' of examples: ModuleNotFoundError: No module named" in line


def test_processes_of_a_study_know_them_too(resdiag, tmp_path):
    (tmp_path / "stripes.toml").write_text(
        'question = "q"\nexpects = "e"\nsource = "s"\nseeds = [0]\n'
        '[fixed]\ndata = "stripes"\ndepth = 8\nrecipe = "short"\nsteps = 2\nbatch_size = 8\n'
        '[grid]\nvariant = ["relu_first"]\n'
    )
    got = resdiag("data", "get", "stripes", "--data-root", "mine")
    done = resdiag("study", "run", "stripes.toml", "--data-root", "mine", "--runs", "runs")

    assert got.returncode == done.returncode == 0, got.stderr + done.stderr
    assert len(list(tmp_path.glob("runs/**/verdict.json"))) == 1
