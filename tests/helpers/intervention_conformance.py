"""What every intervention obeys: inherit `InterventionConformance`, give the fixture a row."""

import pytest
import torch
from tiny_training import tiny_config, tiny_data
from torch import nn

from resdiag.errors import UsageError
from resdiag.interventions.additions import apply, lesion
from resdiag.interventions.arms import train_arm
from resdiag.interventions.starts import VariantStart
from resdiag.interventions.table import find_for_variant
from resdiag.models.variants import VARIANTS


class _Unit(nn.Module):
    """relu(W x + x): a branch, a shortcut and an activation after the addition."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.relu(self.linear(x) + x)


class InterventionConformance:
    """Tests of the row that the fixture `intervention` returns.

    Attributes:
        variant: Id of a variant that the row changes something about.
    """

    variant = "elu_after"

    @pytest.fixture
    def intervention(self):
        raise NotImplementedError("return an Intervention")

    @pytest.fixture
    def model(self):
        return nn.Sequential(*(_Unit() for _ in range(4))).eval()

    @pytest.fixture
    def x(self):
        return torch.randn(5, 6)

    def test_it_says_what_it_changes_what_is_expected_and_by_whom(self, intervention):
        assert intervention.name.isidentifier()
        assert intervention.words
        assert intervention.expects
        assert intervention.source
        assert intervention.addition or intervention.variant

    def test_removed_it_leaves_the_model_bit_equal(self, intervention, model, x):
        if not intervention.addition:
            return
        before, output = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
        with apply(intervention, model, x):
            changed = model(x)
        assert not torch.equal(changed, output)
        assert torch.equal(model(x), output)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_it_changes_exactly_the_named_blocks(self, intervention, model, x):
        if not intervention.addition:
            return
        seen = []
        handles = [
            unit.register_forward_hook(lambda unit, args, out: seen.append((unit, args[0], out)))
            for unit in model
        ]
        with apply(intervention, model, x, blocks=["2"]) as handle:
            assert [block.name for block in handle.blocks] == ["2"]
            seen.clear()
            model(x)
        for handle in handles:
            handle.remove()
        same = [torch.equal(unit(given), out) for unit, given, out in seen]
        assert same == [True, True, False, True]

    def test_it_draws_no_global_random_number(self, intervention, model, x):
        before = torch.get_rng_state()
        if intervention.addition:
            with apply(intervention, model, x):
                model(x)
        start = VariantStart(self.config(), tiny_data())
        train_arm(start.prepare(intervention), steps=1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_variant_with_it_trains_on_the_batches_of_the_control(self, intervention):
        if intervention.changed_row(VARIANTS[self.variant]) is None:
            pytest.fail(f"set `variant`: {intervention.name} changes nothing in {self.variant}")
        start = VariantStart(self.config(), tiny_data())
        arms = [start.prepare(change) for change in (None, intervention, intervention)]
        control, changed, again = (train_arm(arm, steps=2) for arm in arms)
        assert changed.batches == control.batches
        assert changed.losses == again.losses  # without a shortcut the skip gain is NaN
        weights = [
            {
                name: tuple(value.flatten().tolist())
                for name, value in arm.model.state_dict().items()
            }
            for arm in arms
        ]
        assert weights[0] != weights[1]
        assert weights[1] == weights[2]

    def test_where_it_cannot_apply_it_is_refused_in_one_line(self, intervention, model, x):
        attempts = []
        if intervention.addition:
            attempts.append(lambda: apply(intervention, nn.Linear(6, 2), x))
        else:
            attempts.append(lambda: lesion(model, intervention.name, x))
        for variant, row in VARIANTS.items():
            if intervention.changed_row(row) is None:
                attempts.append(lambda name=variant: find_for_variant(intervention.name, name))
        for attempt in attempts:
            with pytest.raises(UsageError) as refusal:
                attempt()
            assert refusal.value.message
            assert "\n" not in refusal.value.message + refusal.value.hint

    def config(self):
        """A tiny run of the variant."""
        return tiny_config(variant=self.variant, batch_size=8, lr=0.001)
