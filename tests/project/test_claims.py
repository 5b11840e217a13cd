"""The page of the paper's claims: no empty row, and how many seeds a difference needs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
from claimspage import CLAIMS, claims_page, seeds_needed, select  # noqa: E402


def test_every_claim_has_a_status_numbers_and_a_command():
    rows = [
        line.split(" | ") for line in claims_page().splitlines() if re.match(r"\| \d+ \| ", line)
    ]
    rows = [row for row in rows if len(row) == 8]
    assert len(rows) == len(CLAIMS)
    for row in rows:
        assert all(cell.strip() for cell in row)
        assert row[3] in {"**confirmed**", "**refuted**", "**bounded**", "**open**"}
        if row[3] == "**open**":  # nothing was trained, or a rule asks for more
            assert row[5] == "0" or "its rule asks for 3 seeds" in row[4]
        else:
            assert row[5] != "0"
            assert re.search(r"\d", row[4]) or row[5] == "-"


def test_a_rescue_is_open_until_its_rule_can_be_applied():
    for letter, variant in (("a:", "elu_nobn"), ("b:", "elu_pre")):
        found = select("rescue-cpu", variant=variant)
        seeds = {item.cell.request.seed for item in found}
        words = "lower learning rate" if letter == "a:" else "decreasing the learning rate"
        (claim,) = (c for c in CLAIMS if c.words.startswith(letter) and words in c.words)
        assert (claim.judge().status == "open") == (len(seeds) < 3)


@pytest.mark.parametrize(("gap", "spread"), [(0.66, 0.23), (0.24, 0.23), (1.0, 1.0)])
def test_the_number_of_seeds_is_where_simulated_tests_begin_to_find_the_difference(gap, spread):
    rng = np.random.default_rng(0)
    n = seeds_needed(gap, spread)

    def found(size):
        a, b = rng.normal(gap, spread, (20_000, size)), rng.normal(0, spread, (20_000, size))
        return float((stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean())

    assert found(n) > 0.79  # 0.8 within the simulation's error of 0.003
    assert found(n - 1) < 0.81
