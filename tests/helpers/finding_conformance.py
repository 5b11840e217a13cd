"""What every rule of a verdict must do; inherit `FindingConformance` to try one of your own."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import pytest

from resdiag.catalog.table import METRICS
from resdiag.diagnose.finding import Finding, NotJudged, Rule
from resdiag.diagnose.registry import FINDINGS
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.text import render
from resdiag.diagnose.verdict import judge
from resdiag.plots.kinds import KINDS
from resdiag.runs.folder import Run

STEP_COLUMNS = {
    "loss",
    "error",
    "lr",
    "epoch",
    "train_loss",
    "train_error",
    "test_loss",
    "test_error",
}
BAD = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e38, 1e-38)


class FindingConformance:
    """Inherit it and define three fixtures.

    `rule` is the row. `ill` and `healthy` are runs on the two sides of one of its thresholds: of
    the first it reports a finding, of the second it does not.
    """

    @pytest.fixture
    def rule(self) -> Rule:
        raise NotImplementedError

    @pytest.fixture
    def ill(self) -> Run:
        raise NotImplementedError

    @pytest.fixture
    def healthy(self) -> Run:
        raise NotImplementedError

    def outcomes(self, rule: Rule, run: Run) -> list[Finding | NotJudged]:
        """What the rule yields; all of it is named after the rule and can be written as JSON."""
        found = list(rule.judge(RunData(run)))
        assert all(isinstance(outcome, Finding | NotJudged) for outcome in found)
        assert {outcome.name for outcome in found} <= {rule.name}
        for outcome in self.findings(found):
            json.dumps(outcome.to_dict(), allow_nan=False)
            assert outcome.summary
            assert outcome.cause
            assert outcome.why
            assert outcome.evidence
        return found

    def findings(self, outcomes: list[Finding | NotJudged]) -> list[Finding]:
        return [outcome for outcome in outcomes if isinstance(outcome, Finding)]

    def test_the_row_says_all_that_the_reference_prints(self, rule):
        assert rule.fires_when.endswith(".")
        assert all((rule.cause, rule.why, rule.remedy, rule.applies, rule.source))
        assert set(rule.plots) <= set(KINDS)
        known = {*METRICS, *STEP_COLUMNS, "blocks", "unavailable", "inventory"}
        assert rule.needs
        assert set(rule.needs) <= known
        for threshold in rule.thresholds:
            assert math.isfinite(threshold)
            assert threshold.meaning

    def test_it_reports_the_run_beyond_its_threshold_and_not_the_other(self, rule, ill, healthy):
        assert self.findings(self.outcomes(rule, ill))
        assert not self.findings(self.outcomes(rule, healthy))

    def test_the_verdict_has_its_finding(self, rule, ill, healthy):
        with FINDINGS.added(rule):
            verdict = judge(ill)
            assert rule.name in {finding.name for finding in verdict.findings}
            assert all(len(line) <= 100 for line in render(verdict).splitlines())
            assert rule.name not in {finding.name for finding in judge(healthy).findings}

    def test_without_what_it_needs_it_reports_nothing(self, rule, ill):
        assert not self.findings(self.outcomes(rule, _without(ill, rule.needs)))

    @pytest.mark.parametrize("value", BAD)
    def test_no_number_makes_it_raise(self, rule, ill, value):
        for needs in (rule.needs, *((name,) for name in rule.needs)):
            self.outcomes(rule, _with(ill, dict.fromkeys(needs, value)))

    @pytest.mark.parametrize("rows", [0, 1])
    def test_no_empty_or_short_table_makes_it_raise(self, rule, ill, rows):
        blocks, steps = ill.metrics_frame, ill.curve_frame
        self.outcomes(rule, replace(ill, metrics_frame=blocks.iloc[:rows]))
        self.outcomes(rule, replace(ill, curve_frame=steps.iloc[:rows]))
        none = replace(
            ill, metrics_frame=blocks.iloc[:rows], curve_frame=steps.iloc[:rows], inventory={}
        )
        assert not self.findings(self.outcomes(rule, none)) or rows
        self.outcomes(rule, replace(ill, blocks=[]))


def _without(run: Run, needs: tuple[str, ...]) -> Run:
    needs = (*needs, "head_loss") if "loss" in needs else needs  # one stands for the other
    return replace(
        run,
        metrics_frame=run.metrics_frame.drop(columns=list(needs), errors="ignore"),
        curve_frame=run.curve_frame.drop(columns=list(needs), errors="ignore"),
        blocks=[] if "blocks" in needs else run.blocks,
        unavailable=[] if "unavailable" in needs else run.unavailable,
        inventory={} if "inventory" in needs else run.inventory,
    )


def _with(run: Run, values: Mapping[str, float]) -> Run:
    def changed(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(**{name: v for name, v in values.items() if name in frame})

    return replace(
        run, metrics_frame=changed(run.metrics_frame), curve_frame=changed(run.curve_frame)
    )
