"""What an installation costs and contains: lazy imports, fast answers, a lean wheel."""

import json
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from fresh_imports import modules_of_commands

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "pandas", "numpy", "scipy", "matplotlib", "seaborn", "pyarrow")

_REPORT = """
import json, sys
{code}
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def _imported_by(code):
    """Which of the heavy packages a fresh interpreter has after running `code`."""
    source = _REPORT.format(code=code, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_resdiag_imports_nothing_heavy():
    assert _imported_by("import resdiag; dir(resdiag)") == []


def test_the_check_of_imports_can_fail():
    assert "numpy" in _imported_by("import resdiag, numpy")


def test_a_public_name_is_imported_when_it_is_used():
    assert "torch" in _imported_by("import resdiag; resdiag.attach")


LIGHT = [
    "--help",
    "run --help",
    "plot --help",
    "version",
    "variants",
    "metrics grad_output",
    "plot --list",
    "data list",
    "rnu",
    "run --depht 20",
    "run --variant elu_pre",
    "run --variant elu_prr --depth 20",
    "run --variant elu_pre --depth 57",
    "run --variant elu_pre --depth 20 --recipe paperr",
    "run --variant elu_pre --depth 20 --data cifar",
    "run --variant elu_pre --depth 20 --data folder:nowhere",
    "plot gradnrms",
    "plot gradnorms no/such/run",
    "explain no/such/run",
    "study list",
    "study run paper --dry-run",
    "study status smoke",
    "study report smoek",
    "study cell smoke elu",
]


@pytest.mark.parametrize("line", LIGHT)
def test_help_and_usage_errors_answer_without_the_heavy_packages(line):
    heavy = {"torch", "torchvision", "pandas", "scipy", "matplotlib", "seaborn", "pyarrow"}
    _, modules = modules_of_commands(*(tuple(each.split()) for each in LIGHT))[*line.split(),]
    assert heavy.isdisjoint(modules)


def test_every_public_name_resolves():
    import resdiag

    assert sorted(resdiag.__all__) == dir(resdiag)
    for name in resdiag.__all__:
        assert getattr(resdiag, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        resdiag.atach  # noqa: B018


def test_the_door_is_the_installed_command():
    done = subprocess.run(
        [sys.executable, "cli.py", "version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    import resdiag

    assert done.stdout.strip() == resdiag.__version__


def test_the_door_passes_exit_codes_and_says_one_line():
    command = [sys.executable, "cli.py", "run", "--variant", "elu_pre", "--depth", "57"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "depth 57 is not 6n+2" in done.stderr


def test_errors_under_json_are_one_document_with_the_same_exit_code():
    command = [sys.executable, "cli.py", "plot", "gradnrms", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert set(json.loads(done.stdout)) == {"error", "hint"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that the checkout builds, offline; hatchling is there wherever the tests are."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        capture_output=True,
        cwd=ROOT,
        check=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_the_data_and_the_types_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"resdiag/data/digits.npz", "resdiag/py.typed", "resdiag/cli/main.py"} <= names
    assert "resdiag/data/digits.LICENSE.md" in names
    assert {f"resdiag/report/templates/report.{kind}" for kind in ("html", "css")} <= names
    assert {name.split("/")[0] for name in names} == {"resdiag", "resdiag-0.1.0.dist-info"}
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".md.orig"))]


def test_wheel_has_every_module_of_the_checkout(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "resdiag").rglob("*.py")}
    assert modules <= names


def test_wheel_is_small_and_offers_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    rest = [entry for entry in archive.infolist() if not entry.filename.endswith(".py")]
    assert sum(entry.compress_size for entry in rest) < 100_000  # digits, but no picture, no result
    assert wheel.stat().st_size < 3_000 * len(archive.namelist())  # modules are small
    entry = archive.read("resdiag-0.1.0.dist-info/entry_points.txt").decode()
    assert "resdiag = resdiag.cli.main:app" in entry
    metadata = archive.read("resdiag-0.1.0.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: MIT" in metadata


def test_the_version_stands_in_one_place_and_the_citation_agrees():
    import tomllib

    import resdiag

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "resdiag/__init__.py"
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {resdiag.__version__}\n" in citation


def test_python_dash_m_resdiag_is_the_command():
    words = [sys.executable, "-m", "resdiag"]
    done = subprocess.run([*words, "version"], capture_output=True, text=True, cwd=ROOT, check=True)
    import resdiag

    assert done.stdout.strip() == resdiag.__version__
    wrong = subprocess.run([*words, "rnu"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("resdiag: ")


def test_the_bounds_of_the_matrix_are_those_of_the_project():
    text = (ROOT / "noxfile.py").read_text("utf-8")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in ("torch", "torchvision"):
        (least,) = set(re.findall(rf'"{name}>=([\d.]+)"', project))
        assert f'"{name}=={least}.*"' in text
    (least,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    assert f'PYTHONS = ["{least}"' in text


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("resdiag", exclude_type_checking_imports=True, cache_dir=None)
    modules = [name for name in graph.modules if name != "resdiag"]  # it resolves names lazily
    order = TopologicalSorter(
        {name: graph.find_modules_directly_imported_by(name) for name in modules}
    )
    order.prepare()  # a CycleError names the circle
