"""Built-in and registered interventions obey the same rules."""

import json
import re
from pathlib import Path

import pytest
from intervention_conformance import InterventionConformance

import resdiag
from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.interventions.table import (
    INTERVENTIONS,
    AdditionChange,
    Intervention,
    VariantChange,
    register_intervention,
    unregister_intervention,
)

QUARTER = Intervention(
    name="quarter_branch", words="a quarter of the branch", expects="less growth", source="test",
    addition=AdditionChange(branch=lambda blocks: 0.25), remedy_for=("exploded",),
)  # fmt: skip
PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "extend-intervention.md"


@pytest.fixture
def registered():
    register_intervention(QUARTER)
    yield QUARTER
    unregister_intervention(QUARTER.name)


class TestBuiltIn(InterventionConformance):
    @pytest.fixture(params=list(INTERVENTIONS))
    def intervention(self, request):
        # what inserts an activation needs a variant without one
        self.variant = "elu" if request.param.startswith("after_add") else "elu_after"
        if request.param == "bn_before_add":
            self.variant = "elu_pre"
        return INTERVENTIONS[request.param]


class TestRegistered(InterventionConformance):
    @pytest.fixture
    def intervention(self, registered):
        return registered


def test_a_registered_intervention_is_known_to_every_command(registered, capsys, tmp_path):
    words = "lesion resdiag:b-8 quarter_branch --seeds 1 --steps 1 --batch-size 2 --json"
    assert app.run(words.split()) == 0
    (effect,) = json.loads(capsys.readouterr().out)["lesions"]
    assert (effect["name"], effect["words"]) == ("quarter_branch", "a quarter of the branch")
    words = "run --variant b --depth 8 --width 0.25 --data digits --batch-size 8 --steps 1 -q"
    assert app.run([*words.split(), "--json", "--runs", str(tmp_path)]) == 0
    folder = json.loads(capsys.readouterr().out)["run"]
    options = ["--lesion", "--seeds", "1", "--lesion-steps", "1", "--json"]
    assert app.run(["explain", folder, "quarter_branch", *options]) == 0
    (effect,) = json.loads(capsys.readouterr().out)["lesions"]
    assert effect["changed"][0]["growth_per_block"] < effect["control"][0]["growth_per_block"]


def test_rows_that_cannot_be_used_are_refused_at_registration(registered):
    parts = {"words": "x", "expects": "x", "source": "x"}
    with pytest.raises(ValueError, match="choose another name"):
        register_intervention(QUARTER)
    with pytest.raises(ValueError, match="must begin with a-z"):
        register_intervention(Intervention(name="Half", variant=VariantChange(), **parts))
    with pytest.raises(ValueError, match="addition= or variant="):
        register_intervention(Intervention(name="nothing", **parts))
    with pytest.raises(ValueError, match="'drop_block' is part of resdiag and stays"):
        unregister_intervention("drop_block")


def test_an_intervention_on_the_variants_is_refused_on_any_model():
    model = resdiag.build_model("c", 8, width=0.25, seed=0)
    with pytest.raises(UsageError, match="runs of the variants only"):
        resdiag.lesion(model, "bn_before_add")


def test_the_page_about_interventions_runs(capsys):
    text = PAGE.read_text("utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile("".join(b for kind, b in found if kind == "python"), PAGE.name, "exec"), {})
    assert capsys.readouterr().out == "".join(b for kind, b in found if kind == "text")
