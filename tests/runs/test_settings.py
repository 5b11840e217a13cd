"""A run setting is one row; results that were made before a setting was renamed stay valid."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from made_runs import make_config

from resdiag.runs.config import RunConfig, from_stored, row_of, to_stored
from resdiag.study.settings import SETTINGS
from resdiag.training.recipe import Request, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", [Request, RunConfig])
def test_every_setting_has_a_row_for_people(kind):
    for entry in fields(kind):
        assert row_of(entry).help.endswith("."), entry.name


def test_a_study_sets_everything_but_the_seed_and_the_device():
    assert {entry.name for entry in fields(Request)} - set(SETTINGS) == {"seed", "device"}


def test_the_folder_of_a_run_is_the_one_it_always_had():
    """Golden: `resdiag run --variant elu_pre --depth 110`, as the README has shown it."""
    config = resolve(Request(variant="elu_pre", depth=110), data_name="digits", train_size=1437)
    assert config.name == "elu_pre-d110-s0-2367bcf1"


def test_a_configuration_with_the_old_names_is_the_same_run():
    new = make_config(backend="fast")
    old = {**new.to_dict(), "engine": "fast", "recipe": "probe"}
    del old["backend"]
    assert RunConfig.from_dict(old) == new
    assert to_stored(new.to_dict())["engine"] == "fast"
    assert to_stored(new.to_dict())["recipe"] == "probe"


def test_committed_results_are_read_with_the_names_of_now():
    (path, *_) = sorted(ROOT.glob("studies/results/degradation-cpu/results.json"))
    for cell in json.loads(path.read_text())["cells"]:
        assert Request(**from_stored(cell["request"])).backend == "eager"


def test_the_setting_of_the_page_needs_one_field_and_nothing_else(tmp_path):
    """The example is put into a copy of the package: option, study file, digest follow."""
    page = (ROOT / "docs/howto/extend-setting.md").read_text("utf-8")
    (row,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(ROOT / "resdiag", tmp_path / "resdiag")
    (tmp_path / "studies").mkdir()
    file = tmp_path / "resdiag/runs/config.py"
    text = file.read_text("utf-8")
    last = "@settings\nclass RunConfig"
    row = "\n".join("    " + line.strip(" ") if line else line for line in row.splitlines())
    file.write_text(text.replace(last, f"{row.rstrip()}\n\n\n{last}"))

    def ask(*code):
        command = [sys.executable, *code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    door = ["-c", "import sys; from resdiag.cli.main import app; sys.exit(app.run())"]
    run = [*door, "run", "--variant", "elu_pre", "--depth", "110"]
    assert "--label-smoothing 2.0 must be at most 1" in ask(*run, "--label-smoothing", "2")
    assert "--label-smoothing" in ask(*run, "--help")
    (tmp_path / "s.toml").write_text(
        'question = "q"\n[fixed]\ndata = "digits"\ndepth = 8\nvariant = "elu"\n'
        "[grid]\nlabel_smoothing = [0.0, 0.1, 3.0]\n"
    )
    said = ask(*door, "study", "run", "s.toml", "--dry-run")
    assert "[grid] label_smoothing[2] = 3.0: must be at most 1" in said
    code = (
        "from resdiag.training.recipe import Request, resolve\n"
        "for more in ({}, {'label_smoothing': 0.1}):\n"
        "    asked = Request(variant='elu_pre', depth=110, **more)\n"
        "    print(resolve(asked, data_name='digits', train_size=1437).name)"
    )
    same, other = ask("-c", code).split()
    assert same == "elu_pre-d110-s0-2367bcf1" != other
