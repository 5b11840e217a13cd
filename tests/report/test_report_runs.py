"""The report of runs without a study: what it says first, what it refuses, that it is harmless."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import synthetic_runs
from hostile import HOSTILE, check_harmless
from made_runs import make_config, write_run

from resdiag.cli.main import app
from resdiag.cli.report import MOST_RUNS
from resdiag.diagnose.verdict import judge
from resdiag.plots.kinds import KINDS
from resdiag.report.figures import draw_runs
from resdiag.report.render import to_html, to_markdown
from resdiag.report.runpage import MOST_PLOTS, choose_plots, write_run_page
from resdiag.report.words import number
from resdiag.report.write import write_run_report
from resdiag.runs.watched_config import WatchedConfig


def test_the_first_words_are_the_verdict_and_its_evidence_has_the_numbers():
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    verdict = judge(run)
    seen = check_harmless(to_html(write_run_page([run], [])))
    places = [seen.text.index(words) for words in (
        "What happened in elu_pre-56?",
        f"elu_pre-56 diverges: not finite from step 4 on. Cause: {verdict.cause}.",
        f"{verdict.name}: {verdict.summary}", verdict.why,
        "diverged after 6 of 150 steps", "How sure", "one seed", "Evidence",
    )]  # fmt: skip
    assert places == sorted(places)
    assert len(verdict.evidence) > 1
    for item in verdict.evidence:
        assert item.text in seen.text
        assert number(item.threshold) in seen.text
        assert item.source in seen.text
    assert verdict.next[0] in seen.text


def test_every_kind_of_plot_is_drawn_or_says_why_not():
    run = synthetic_runs.make_run("elu", 20)
    columns = [name for name in run.metrics_frame if name != "update_ratio"]
    short = replace(run, metrics_frame=run.metrics_frame[columns])
    pictures = list(draw_runs(["gradnorms", "updates", "curves"], [short]))
    why = "elu-20 has no column update_ratio, which plot 'updates' needs"
    assert [picture.reason for picture in pictures] == ["", why, ""]
    seen = check_harmless(to_html(write_run_page([short], pictures)))
    assert seen.tags["svg"] == 2
    assert f"not drawn: {why}" in seen.text


def test_runs_side_by_side_are_counted_named_and_compared_over_depth():
    depths, seeds = (20, 56), (0, 1, 2)
    runs = [synthetic_runs.make_run("elu", d, seed=s) for d in depths for s in seeds]
    page = write_run_page(runs, [])
    tally = Counter(judge(run).name for run in runs)
    assert page.headline == "6 runs train."
    said = ", ".join(f"{name} {amount}" for name, amount in tally.most_common())
    assert page.found[0] == f"Verdicts: {said}."
    assert page.found[1].startswith("elu, error by depth: ")
    assert "depth 56 against 20" in page.found[1]
    rows = page.sections[0].parts[0].rows
    assert [row[0] for row in rows] == [run.label for run in runs]


def with_loss(loss, **more):
    """A healthy run of 151 steps whose loss is another one in all of them."""
    run = synthetic_runs.make_run("elu", 20)
    curve = run.curve().assign(loss=loss)
    return replace(run, curve_frame=curve, **more)


def test_a_run_that_is_done_is_not_said_to_be_trained():
    chance = write_run_page([with_loss(np.log(10) * 0.99)], [])
    assert chance.headline.startswith(
        "elu-20 stays at chance: after 151 steps, the mean loss of the last fifth is 2.28, "
        "guessing is 2.3"
    )
    assert write_run_page([with_loss(np.log(10) * 0.97)], []).headline.startswith("elu-20 trains")
    unknown = {"name": "own"}  # without classes, it is the fall of the loss that counts
    flat = write_run_page([with_loss(1.0, data=unknown)], [])
    assert flat.headline.startswith("elu-20 does not lower its loss: after 151 steps")
    falling = write_run_page([with_loss(np.linspace(2, 1, 151), data=unknown)], [])
    assert falling.headline.startswith("elu-20 lowers its loss: after 151 steps, the mean")
    short = with_loss(1.0)
    short = replace(short, curve_frame=short.curve().head(19), steps=19)
    assert "whether it trains cannot be judged" in write_run_page([short], []).headline
    both = write_run_page([with_loss(3.0), synthetic_runs.make_run("elu_pre", 56, explode=4)], [])
    assert both.headline == "elu-20 stays at chance; elu_pre-56 diverges."


def test_the_figure_that_the_verdict_advises_stands_first_and_once():
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    (kind, *_) = re.findall(r"resdiag plot (\S+)", "\n".join(judge(run).next))
    pictures = list(draw_runs(["curves", kind], [run]))
    page = write_run_page([run], pictures)
    assert page.key is pictures[1]
    html = to_html(page)
    assert check_harmless(html).tags["svg"] == 2
    assert html.index("<svg") < html.index("How sure")


def test_the_plots_that_the_verdict_advises_are_drawn_and_the_others_are_named(tmp_path):
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    wanted = choose_plots([judge(run)])
    assert wanted[0] == "curves"
    advised = re.findall(r"resdiag plot (\S+)", "\n".join(judge(run).next))
    assert set(wanted) <= {"curves", *advised, "gradnorms", "signal"}
    assert len(wanted) == MOST_PLOTS
    files = {path.name for path in write_run_report([run], tmp_path, every=False, pdf=False)}
    assert {name.split("-")[1] for name in files if name.endswith(".svg")} == {
        f"{kind}.svg" for kind in wanted
    }
    assert not [name for name in files if name.endswith(".pdf")]
    kinds = [kind for kind in KINDS.values() if not kind.compares]
    assert len([name for name in files if name.endswith(".csv")]) == len(kinds)  # all data
    text = check_harmless((tmp_path / "report.html").read_text()).text
    (left,) = re.findall(r"Not drawn here: ([^.]*)\.", text)
    for kind in kinds:
        assert (kind.title in left) == (kind.name not in wanted)


def test_rules_that_were_not_applied_for_one_reason_share_a_line():
    lines = [
        line for line in write_run_page([synthetic_runs.make_run()], []).sure if "loop" in line
    ]
    assert len(lines) == 1
    assert "optimizer_mismatch" in lines[0]


def hostile(words):
    """A run whose every text is of a stranger."""
    return replace(
        synthetic_runs.make_run("elu", 20),
        config=WatchedConfig(model=f"{words}\x1b[31m", data=words, settings={words: words}),
        data={"name": words, "sha256": words},
        environment={"device": words, "torch": words},
        notes=(words,),
        unavailable=[{"metric": "skip_gain", "blocks": [0], "reason": words}],
    )


def test_hostile_words_of_runs_are_shown_and_do_nothing():
    page = write_run_page([hostile(words) for words in HOSTILE], [])
    html = to_html(page)
    plain = [synthetic_runs.make_run("elu", 20, seed=seed) for seed in (0, 1)]
    known = check_harmless(to_html(write_run_page(plain, []))).tags
    seen = check_harmless(html)
    assert set(seen.tags) <= set(known)
    assert all(" ".join(words.split())[:60] in seen.text for words in HOSTILE)
    assert "\x1b" not in html
    assert max(map(len, to_markdown(page, bulky=False).splitlines())) < 4000


def test_the_command_writes_one_page_and_figures_beside_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {name: KINDS[name] for name in ("curves", "nonfinite")}  # drawing all takes ten seconds
    monkeypatch.setattr("resdiag.report.write.KINDS", few)
    folder = write_run(tmp_path / "runs")
    assert app.run(["report", "--json", "--pdf", "--all-figures"]) == 0  # the latest run
    files = json.loads(capsys.readouterr().out)["files"]
    assert files[0] == f"runs/{folder.name}/report/report.html"
    endings = Counter(name.rpartition(".")[2] for name in files)
    assert endings["svg"] == endings["pdf"] == endings["csv"] == len(few)
    assert all((tmp_path / name).stat().st_size for name in files)
    check_harmless((tmp_path / files[0]).read_text())
    write_run(tmp_path / "runs", make_config(seed=1))
    assert app.run(["report", "runs", "--out", "both"]) == 0
    assert capsys.readouterr().out == "both/report.html\n"
    assert "What happened in these runs?" in (tmp_path / "both/report.html").read_text()


def test_what_is_no_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "plan-0123abcd.json").write_text("{}")
    (tmp_path / "ice").mkdir()
    (tmp_path / "ice" / "results.json").write_text("{}")
    for path, message in (
        ("smoke", "smoke is a study (resdiag study report smoke)"),
        ("own.toml", "own.toml is a study (resdiag study report own.toml)"),
        ("grid", "grid is a study (resdiag study report grid --runs .)"),
        ("ice", "ice is a study (resdiag study report ice)"),
        ("nothing", "no such folder: nothing"),
    ):
        assert app.run(["report", path]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    for seed in range(MOST_RUNS + 1):
        write_run(tmp_path / "many", make_config(seed=seed))
    assert app.run(["report", "many"]) == 2
    assert f"{MOST_RUNS + 1} runs: one page shows at most {MOST_RUNS}" in capsys.readouterr().err


def test_reservations_that_do_not_fit_the_first_screen_stand_below_and_name_their_runs():
    runs = [synthetic_runs.make_run("elu", 20, seed=seed) for seed in range(2)]
    page = write_run_page(runs, [])
    cut = [line for line in page.sure if line.startswith("And ")]
    (folded,) = [
        part
        for section in page.sections
        for part in section.parts
        if getattr(part, "title", "") == "All that was not judged"
    ]
    (bullets,) = folded.parts
    assert len(cut) == 1
    assert len(set(bullets.items)) == len(bullets.items)  # what both runs lack is said once
    shown = [line for line in page.sure if line.startswith("Not judged")]
    assert set(shown) < set(bullets.items)
    assert str(len(bullets.items) - len(shown)) in cut[0]


def test_figures_are_numbered_only_where_none_is_left_out():
    run = synthetic_runs.make_run("elu", 20)
    pictures = list(draw_runs(["curves", "signal"], [run]))
    whole = to_html(write_run_page([run], pictures))
    assert "Figure 1. " in whole
    part = to_html(write_run_page([run], [pictures[0], replace(pictures[1], svg=b"")]))
    assert "Figure " not in part
    assert pictures[0].question in part
