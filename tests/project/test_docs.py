"""The documentation cannot rot: pages follow the code, links resolve, examples run."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from pages import DOCS, ROOT, generate

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(p for p in DOCS.rglob("*.md") if "_build" not in p.relative_to(DOCS).parts),
    ]
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _named(path):
    return str(path.relative_to(ROOT))


def _blocks(page, language):
    return [body for found, body in _FENCE.findall(page.read_text("utf-8")) if found == language]


def _without_code(page):
    return _FENCE.sub("", page.read_text("utf-8"))


def _anchors(page):
    """Ids of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", _without_code(page), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def _commands():
    """Every command line in the pages that begins with `resdiag`, comments and prompts removed."""
    for page in PAGES:
        prompted = re.findall(r"^\$ (resdiag .*)$", page.read_text("utf-8"), re.MULTILINE)
        for body in (*_blocks(page, "sh"), *prompted):
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = words[: words.index("|")] if "|" in words else words
                if words[:1] == ["resdiag"]:
                    yield pytest.param(words[1:], id=f"{_named(page)}: {' '.join(words)}")


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_page_is_what_the_code_says(name):
    written = (generate.HERE / name).read_text("utf-8")
    assert written == generate.PAGES[name](), "run `make pages`"


def test_every_command_and_option_has_help_and_is_in_the_reference():
    page = (DOCS / "reference" / "cli.md").read_text("utf-8")
    for words, command in generate.commands():
        assert command.help, words
        assert f"## `{' '.join(words)}`" in page
        for parameter in () if hasattr(command, "commands") else command.params:
            assert parameter.help, (words, parameter.name)
            if parameter.opts[0].startswith("-"):
                assert f"`{parameter.opts[0]}`" in page


def test_every_public_name_has_a_docstring_and_is_in_the_reference():
    import resdiag

    page = (DOCS / "reference" / "api.md").read_text("utf-8")
    for name in set(resdiag.__all__) - {"__version__"}:
        value = getattr(resdiag, name)
        assert value.__doc__ or not callable(value)  # a constant's is a string below it
        assert f"## `resdiag.{name}`" in page


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_relative_links_resolve(page):
    for target in _LINK.findall(_without_code(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


def test_a_broken_link_would_be_seen():
    assert _LINK.findall("see [there](docs/none.md) and ![a figure](docs/_static/x.png)") == [
        "docs/none.md",
        "docs/_static/x.png",
    ]


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_page_is_reachable_and_says_nothing_of_a_machine(page):
    text = page.read_text("utf-8")
    assert not re.search(r"(?<![\w.~])/(home|root|tmp|work|Users)/", text)
    if DOCS in page.parents and page != DOCS / "index.md":
        inside = page.relative_to(DOCS).with_suffix("").as_posix()
        toc = "".join("".join(_FENCE_TOC.findall(p.read_text("utf-8"))) for p in PAGES)
        assert inside in toc or inside.split("/")[-1] in toc


_FENCE_TOC = re.compile(r"```\{toctree\}.*?```", re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "howto" / "attach.md"], ids=_named)
def test_python_examples_run_from_top_to_bottom(page, capsys):
    blocks = _blocks(page, "python")
    assert blocks
    source = "\n".join(blocks)
    exec(compile(source, _named(page), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_the_readme_shows_the_beginning_of_what_its_example_prints(capsys):
    (example,), texts = _blocks(ROOT / "README.md", "python"), _blocks(ROOT / "README.md", "text")
    exec(compile(example, "README.md", "exec"), {})
    printed, shown = capsys.readouterr().out.split(), texts[0].partition("[...")[0].split()
    assert shown[0] == "Verdict"
    assert "Why" in shown
    _compare(printed[: len(shown)], shown)


def test_the_page_about_attaching_prints_what_it_shows(capsys):
    page = DOCS / "howto" / "attach.md"
    exec(compile("\n".join(_blocks(page, "python")), "attach.md", "exec"), {})
    printed = capsys.readouterr().out.split()
    shown = "".join(_blocks(page, "text")).split()
    assert len(printed) == len(shown)
    _compare(printed, shown)


def _compare(printed, shown):
    for word, expected in zip(printed, shown, strict=True):
        try:  # numbers differ in their last digits between processors
            assert float(word) == pytest.approx(float(expected), rel=0.05, nan_ok=True)
        except ValueError:
            assert word == expected


def test_the_example_of_the_readme_is_short_and_on_the_front_page_too():
    (example,) = _blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    assert example in (DOCS / "index.md").read_text("utf-8")


@pytest.mark.parametrize("words", list(_commands()))
def test_command_lines_in_the_pages_parse(words):
    command, rest = generate.get_command(generate.app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    context = command.make_context("resdiag", rest)
    assert set(context.params) == {parameter.name for parameter in command.params}


def _contract():
    """The rooms of the import-linter contract, the highest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    return [layer.removeprefix("resdiag.") for layer in layers]


def test_the_diagram_of_the_rooms_is_the_contract():
    page = (DOCS / "architecture.md").read_text("utf-8")
    diagram = page.partition("<!-- rooms:")[2].partition("```text\n")[2].partition("```")[0]
    assert [line.split()[0] for line in diagram.splitlines()] == _contract()


def test_every_folder_of_the_package_is_a_room_of_the_contract():
    package = ROOT / "resdiag"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders | {"errors", "registry", "summary", "terminal"} == set(_contract())


def test_modules_that_the_architecture_names_exist():
    page = (DOCS / "architecture.md").read_text("utf-8")
    names = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", page))
    rooms = "|".join(_contract())
    dotted = set(re.findall(rf"`((?:{rooms})(?:\.[a-z_]+)+)\.[A-Za-z_]+`", page))
    assert names
    assert dotted
    for name in names | {name.replace(".", "/") + ".py" for name in dotted}:
        inside = list((ROOT / "resdiag").rglob(name.split("/")[-1]))
        assert any(path.as_posix().endswith("/" + name) for path in inside), name


def test_make_targets_that_the_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in PAGES:
        for body in _blocks(page, "sh"):
            for target in re.findall(r"^make (\w+)", body, re.MULTILINE):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


def test_exit_codes_of_their_page_are_those_of_the_errors():
    from resdiag import errors

    table = _without_code(DOCS / "reference" / "exit-codes.md")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds if issubclass(kind, errors.ResdiagError)} <= listed


def test_variants_of_the_readme_are_those_of_the_table():
    from resdiag.models.variants import VARIANTS

    table = (
        _without_code(ROOT / "README.md")
        .partition("\n## The paper's networks\n")[2]
        .partition("\n## ")[0]
    )
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(VARIANTS)


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
