import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from sparsify.allocators.budget import apply_pattern, as_is_plan, fit_plan, scale, shift
from sparsify.errors import BudgetError, PatternError
from sparsify.types import Ledger, Pattern, SparsityPlan, Target

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=8)
SHARE = st.floats(0, 1, allow_subnormal=False)


def zeros_of(plan, table):
    """Parameter-weighted mean sparsity, summed by hand."""
    return sum(plan.targets[layer.name].sparsity * layer.numel for layer in table) / table.numel


def profile_of(table, values):
    return {layer.name: value for layer, value in zip(table, values, strict=True)}


@pytest.fixture(scope="session")
def row_table(make_table):
    """One block per layer, of the given sizes."""
    return lambda sizes, inputs=1: make_table(*([(size, inputs)] for size in sizes))


@settings(max_examples=60, deadline=None)
@given(st.data(), SIZES, st.sampled_from([shift, scale]), st.floats(0.01, 0.98))
def test_the_weighted_budget_is_met_within_the_bounds(row_table, data, sizes, adjust, wanted):
    table = row_table(sizes)
    values = data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes)))
    plan = fit_plan(table, profile_of(table, values), wanted, adjust=adjust)
    assert zeros_of(plan, table) == pytest.approx(wanted, abs=1e-9)
    assert all(0 <= s <= 0.99 for s in plan.sparsities().values())
    assert plan.ledger.clipped == plan.ledger.rounded == pytest.approx(wanted, abs=1e-9)
    assert plan.ledger.raw == pytest.approx(sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes))


@pytest.mark.parametrize(("adjust", "wanted"), [(shift, 0.99), (scale, 0.0)])
def test_a_budget_at_a_bound_puts_every_layer_there(row_table, adjust, wanted):
    table = row_table([4, 6, 6, 24, 11])
    values = [0.69, 0.64, 0.35, 0.58, 0.59]
    plan = fit_plan(table, profile_of(table, values), wanted, adjust=adjust)
    assert list(plan.sparsities().values()) == pytest.approx([wanted] * 5, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data(), SIZES, SHARE)
def test_the_order_of_the_profile_is_kept(row_table, data, sizes, wanted):
    assume(0.01 < wanted < 0.98)
    table = row_table(sizes)
    values = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes))))
    for adjust in (shift, scale):
        fitted = list(fit_plan(table, profile_of(table, values), wanted, adjust=adjust).sparsities().values())
        assert fitted == sorted(fitted)


def test_shift_keeps_differences_and_scale_keeps_ratios(row_table):
    table = row_table([10, 30])
    profile = profile_of(table, [0.2, 0.4])
    shifted = list(fit_plan(table, profile, 0.5, adjust=shift).sparsities().values())
    scaled = list(fit_plan(table, profile, 0.5, adjust=scale).sparsities().values())
    assert shifted == pytest.approx([0.35, 0.55])
    assert scaled == pytest.approx([0.5 * 0.2 / 0.35, 0.5 * 0.4 / 0.35])


def test_layers_held_at_a_bound_pass_their_share_to_the_others(row_table):
    table = row_table([1, 1, 2])
    plan = fit_plan(table, profile_of(table, [0.9, 0.8, 0.4]), 0.75, high=0.9)
    assert list(plan.sparsities().values()) == pytest.approx([0.9, 0.9, 0.6])
    assert plan.ledger.num_clipped == 1
    assert plan.ledger.raw == pytest.approx(0.625)


def test_a_profile_that_meets_the_budget_is_not_touched(row_table):
    table = row_table([5, 5])
    plan = fit_plan(table, profile_of(table, [0.3, 0.7]), 0.5)
    assert list(plan.sparsities().values()) == [0.3, 0.7]
    assert plan.ledger == Ledger(0.5, 0.5, 0.5, 0.5, 0)


@pytest.mark.parametrize(("wanted", "low", "high"), [(0.995, 0.0, 0.99), (0.05, 0.1, 0.9), (0.95, 0.1, 0.9)])
def test_a_budget_outside_the_bounds_is_refused(row_table, wanted, low, high):
    table = row_table([3, 4])
    with pytest.raises(BudgetError):
        fit_plan(table, profile_of(table, [0.4, 0.6]), wanted, low=low, high=high)


def test_a_profile_of_zeros_cannot_be_scaled(row_table):
    table = row_table([3, 4])
    with pytest.raises(BudgetError, match="profile from 0 to 0"):
        fit_plan(table, profile_of(table, [0.0, 0.0]), 0.5, adjust=scale)


def test_as_is_clamps_to_one_and_the_ledger_shows_the_miss(row_table):
    table = row_table([1, 1])
    plan = as_is_plan(table, profile_of(table, [1.2, 0.4]), 0.8)
    assert list(plan.sparsities().values()) == [1.0, 0.4]
    ledger = plan.ledger
    assert (ledger.wanted, ledger.raw, ledger.clipped, ledger.rounded) == pytest.approx((0.8, 0.8, 0.7, 0.7))
    assert ledger.num_clipped == 1


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8), st.sampled_from([4, 8]))
def test_mixed_n_of_m_keeps_the_budget_within_a_level_of_a_block(row_table, data, blocks, group):
    table = row_table([16] * blocks, 32)
    values = data.draw(st.lists(st.floats(0, 1 - 1 / group), min_size=blocks, max_size=blocks))
    plan = as_is_plan(table, profile_of(table, values), 0.5)
    rounded = apply_pattern(plan, table, Pattern.parse(f"mixed:{group}"))
    assert abs(zeros_of(rounded, table) - zeros_of(plan, table)) <= 1 / group / blocks
    for name, target in rounded.targets.items():
        assert 1 <= target.kept <= target.group == group
        assert target.sparsity == 1 - target.kept / group
        assert abs(target.sparsity - plan.targets[name].sparsity) < 1 / group + 1e-9
    assert rounded.ledger.rounded == pytest.approx(zeros_of(rounded, table))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_mixed_n_of_m_misses_by_at_most_half_a_level_of_the_largest_block(row_table, data, sizes):
    table = row_table(sizes, 8)
    values = data.draw(st.lists(st.floats(0, 0.75), min_size=len(sizes), max_size=len(sizes)))
    plan = as_is_plan(table, profile_of(table, values), 0.5)
    rounded = apply_pattern(plan, table, Pattern.parse("mixed:4"))
    assert abs(zeros_of(rounded, table) - zeros_of(plan, table)) <= max(sizes) / sum(sizes) / 8 + 1e-9


@settings(max_examples=120, deadline=None)
@given(st.data(), st.lists(st.sampled_from([3, 5, 7, 8]), min_size=1, max_size=7))
def test_mixed_n_of_m_is_as_near_to_the_budget_as_rounding_up_or_down_can_be(row_table, data, sizes):
    table = row_table(sizes, 8)
    values = data.draw(st.lists(st.floats(0.01, 0.74), min_size=len(sizes), max_size=len(sizes)))
    rounded = apply_pattern(as_is_plan(table, profile_of(table, values), 0.5), table, Pattern.parse("mixed:4"))
    exact = [4 * (1 - value) for value in values]
    wanted = sum(v * n for v, n in zip(exact, sizes, strict=True))
    choices = itertools.product(*({math.floor(v + 1e-9), math.ceil(v - 1e-9)} for v in exact))
    nearest = min(abs(sum(k * n for k, n in zip(kept, sizes, strict=True)) - wanted) for kept in choices)
    kept = [rounded.targets[layer.name].kept for layer in table]
    assert abs(sum(k * n for k, n in zip(kept, sizes, strict=True)) - wanted) == pytest.approx(nearest, abs=1e-6)


def test_layers_of_a_block_share_their_n(make_table):
    table = make_table([(4, 8), (9, 8)], [(4, 8), (9, 8)])
    plan = apply_pattern(as_is_plan(table, table.spread([0.35, 0.65]), 0.5), table, Pattern.parse("mixed:4"))
    kept = [target.kept for target in plan.targets.values()]
    assert kept[0] == kept[1]
    assert kept[2] == kept[3]


def test_mixed_n_of_m_refuses_a_budget_that_one_kept_weight_a_group_overshoots(row_table):
    table = row_table([4, 4], 8)
    plan = fit_plan(table, profile_of(table, [0.9, 0.9]), 0.9)
    with pytest.raises(BudgetError):
        apply_pattern(plan, table, Pattern.parse("mixed:4"))


def test_a_fixed_pattern_sets_every_layer(row_table):
    table = row_table([4, 9], 8)
    plan = apply_pattern(fit_plan(table, profile_of(table, [0.75, 0.75]), 0.75), table, Pattern.parse("2:8"))
    assert set(plan.targets.values()) == {Target(0.75, 2, 8)}


@pytest.mark.parametrize("values", [[0.4, 0.6], [0.6, 0.6]])
def test_a_fixed_pattern_refuses_any_other_allocation(row_table, values):
    table = row_table([4, 4], 8)
    with pytest.raises(PatternError, match="mixed:4"):
        apply_pattern(as_is_plan(table, profile_of(table, values), 0.5), table, Pattern.parse("2:4"))


@pytest.mark.parametrize("pattern", ["2:4", "mixed:4"])
def test_m_must_divide_the_inputs_of_every_layer(make_table, pattern):
    table = make_table([(4, 8), (4, 6)])
    plan = fit_plan(table, table.spread([0.5]), 0.5)
    with pytest.raises(PatternError, match=r"blocks\.0\.layer1.*inputs = 6.*\[2\]"):
        apply_pattern(plan, table, Pattern.parse(pattern))


def test_an_unstructured_plan_passes_through(row_table):
    table = row_table([3])
    plan = SparsityPlan({table.layers[0].name: Target(0.3)}, Ledger(0.3, 0.3, 0.3, 0.3))
    assert apply_pattern(plan, table, Pattern()) is plan


@pytest.mark.parametrize("wanted", [0.7, 0.8, 0.85, 0.875])
def test_mixed_levels_keep_the_budget_where_layers_want_more_than_the_pattern_allows(make_table, wanted):
    table = make_table(*([(4, 8)] for _ in range(30)))
    plan = fit_plan(table, profile_of(table, [wanted + (0.2 if i < 15 else -0.2) for i in range(30)]), wanted)
    rounded = apply_pattern(plan, table, Pattern.parse("mixed:8"))
    assert zeros_of(rounded, table) == pytest.approx(wanted, abs=1 / 8 / 30 / 2 + 1e-9)
    assert min(target.kept for target in rounded.targets.values()) == 1
