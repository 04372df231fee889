"""A plan in whole heads and channels: the budget to within half a channel, whatever blocks and plans are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.allocators.units import Removal, Units, whole_units
from sparsify.errors import BudgetError

units = st.builds(Units, st.integers(1, 12), st.integers(1, 40))
fractions = st.floats(0, 1, allow_nan=False)


def removal(heads, channels, of_heads, of_channels):
    """Channels no larger than a head, as in every model."""
    size = max(heads.size, channels.size)
    return Removal(Units(heads.count, size), channels, of_heads, of_channels)


blocks = st.builds(removal, units, st.builds(Units, st.integers(40, 90), st.integers(1, 6)), fractions, fractions)
plans = st.lists(blocks)


def possible(removals):
    return [x for x in removals if x.weights <= x.most]


def taken(removals, lost):
    return sum(h * x.heads.size + c * x.channels.size for x, (h, c) in zip(removals, lost, strict=True))


@given(plans)
def test_the_total_is_within_half_a_channel_of_what_was_asked_for(removals):
    removals = possible(removals)
    missing = sum(x.weights for x in removals) - taken(removals, whole_units(removals))
    assert abs(missing) <= max((x.channels.size for x in removals), default=0) / 2 + 1e-6


@given(plans)
def test_every_block_is_within_one_channel_of_its_own_and_keeps_a_head_and_a_channel(removals):
    removals = possible(removals)
    for x, (heads, channels) in zip(removals, whole_units(removals), strict=True):
        assert 0 <= heads < x.heads.count
        assert 0 <= channels < x.channels.count
        assert abs(x.weights - heads * x.heads.size - channels * x.channels.size) <= x.channels.size + 1e-6


@given(st.integers(2, 9), units, fractions, fractions)
def test_alike_blocks_stay_alike_if_that_is_asked_for(blocks, heads, of_heads, of_channels):
    removals = possible([removal(heads, Units(64, 3), of_heads, of_channels)] * blocks)
    lost = whole_units(removals, alike=True)
    assert len(set(lost)) <= 1
    missing = sum(x.weights for x in removals) - taken(removals, lost)
    assert abs(missing) <= len(removals) * 3 / 2 + 1e-6


def test_heads_are_rounded_down_and_channels_make_up_for_it():
    # SmolLM2-135M at half: 1.5 of 3 heads, and the channels take what one head leaves.
    smol = Removal(Units(3, 294_912), Units(1536, 1728), 0.5, 0.5)
    assert whole_units([smol] * 30) == [(1, 853)] * 20 + [(1, 854)] * 10
    assert whole_units([smol] * 30, alike=True) == [(1, 853)] * 30
    assert whole_units([Removal(smol.heads, smol.channels, 0.3, 0.3)]) == [(0, 614)]
    assert smol.weights == pytest.approx(294_912 + 1728 * (853 + 1 / 3))


def test_channels_that_run_out_are_made_up_for_by_heads():
    block = Removal(Units(8, 100), Units(10, 10), 0.25, 1.0)
    assert whole_units([block]) == [(3, 0)]
    assert whole_units([Removal(Units(8, 100), Units(40, 10), 0.25, 1.0)]) == [(3, 30)]


def test_a_model_without_plan_loses_nothing():
    assert whole_units([Removal(Units(3, 7), Units(5, 2), 0.0, 0.0)] * 4) == [(0, 0)] * 4


def test_a_block_that_would_be_left_without_a_head_is_refused_with_its_numbers():
    fine, empty = Removal(Units(4, 10), Units(20, 3), 0.5, 0.5), Removal(Units(4, 10), Units(20, 3), 1.0, 0.95)
    with pytest.raises(BudgetError, match=r"block 1 .*0\.9700 of its 100 weights.*at most 0\.8700: 3 of 4 .*19 of 20"):
        whole_units([fine, empty])
    assert math.isclose(empty.most, 87)
