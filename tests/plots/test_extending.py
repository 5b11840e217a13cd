"""The pages about adding a plot and a variant: their examples run, and what they register works."""

import re

import pytest
from pages import DOCS
from plot_conformance import PlotConformance
from synthetic_runs import make_run
from variant_conformance import VariantConformance

import resdiag
from resdiag.cli.main import app
from resdiag.plots.kinds import KINDS
from resdiag.report.figures import draw_runs


def run_page(name):
    """The names that the examples of a page leave behind, run from top to bottom."""
    text = (DOCS / "howto" / name).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile("\n".join(blocks), name, "exec"), names)
    return names, "".join(re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


class TestThePageAboutPlots(PlotConformance):
    @pytest.fixture
    def kind(self, capsys):
        names, _ = run_page("extend-plot.md")
        self.printed = capsys.readouterr().out
        yield names["IDLE"]
        resdiag.unregister_plot("idle")

    @pytest.fixture
    def name(self, kind):
        return kind.name

    def test_it_is_listed_drawn_by_the_command_and_a_part_of_a_report(
        self, kind, tmp_path, monkeypatch, capsys
    ):
        assert "idle" in self.printed
        run = make_run("original", 20, steps=(0, 1))
        (picture,) = draw_runs(["idle"], [run])
        assert picture.svg
        assert "dead_fraction" in picture.csv
        monkeypatch.setattr("resdiag.cli.plot.open_runs", lambda *_: [run])
        assert app.run(["plot", "idle", "-o", str(tmp_path / "idle.png")]) == 0
        assert (tmp_path / "idle.png").stat().st_size > 10_000
        resdiag.unregister_plot("idle")
        assert "idle" not in KINDS
        resdiag.register_plot(kind)


class TestThePageAboutVariants(VariantConformance):
    @pytest.fixture
    def row(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        names, self.shown = run_page("extend-variant.md")
        self.printed = capsys.readouterr().out
        self.runs = list((tmp_path / "runs").iterdir())
        yield resdiag.VARIANTS["relu_first"]
        resdiag.unregister_variant("relu_first")
        resdiag.unregister_law(names["law"].name)

    def test_it_is_trained_judged_and_predicted(self, row, capsys):
        (folder,) = self.runs
        assert folder.name.startswith("relu_first-d8")
        assert self.printed.endswith(self.shown)
        assert row.law == "relu_first_sum"
        assert app.run(["explain", str(folder), "--json"]) == 0
        words = "predict --variant relu_first --depth 8 --data digits --batch-size 8 --json"
        assert app.run(words.split()) == 0
        assert "NaN" not in capsys.readouterr().out
        assert "output_second_moment" in resdiag.load_run(folder).metrics()
