import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import BudgetError, UsageError
from sparsify.recovery.ranks import allocate_ranks, mean_rank, step_sparsity

LOSSES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda losses: sum(losses) > 0)


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.7, [0.3416, 0.5488, 0.6552, 0.6944, 0.7]),
        (0.6, [0.2928, 0.4704, 0.5616, 0.5952, 0.6]),
        (0.5, [0.244, 0.392, 0.468, 0.496, 0.5]),
    ],
)
def test_sparsity_rises_by_a_cube(final, expected):
    assert [step_sparsity(t, 5, final) for t in range(1, 6)] == pytest.approx(expected, abs=1e-12)


def test_the_mean_rank_rises_by_one_a_step():
    assert [mean_rank(t) for t in range(1, 6)] == [6, 7, 8, 9, 10]
    assert mean_rank(3, first=2) == 4


@pytest.mark.parametrize(
    "call", [lambda: mean_rank(0), lambda: step_sparsity(0, 5, 0.7), lambda: step_sparsity(6, 5, 0.7)]
)
def test_steps_are_counted_from_one_to_the_last(call):
    with pytest.raises(UsageError, match="t="):
        call()


def test_ranks_by_hand():
    # shares of 24: 2.4, 4.8, 16.8 -> 2, 5, 16 (clipped); one is missing, and the largest is full: the next gains it
    assert allocate_ranks([1.0, 2.0, 7.0], 8) == [2, 6, 16]
    # halves go to even: 2.5 -> 2 and 7.5 -> 8
    assert allocate_ranks([1.0, 3.0], 5) == [2, 8]
    # 1.33 each -> 1: one of the budget of four is missing, and the first of equals gains it
    assert allocate_ranks([1.0] * 3, 4 / 3) == [2, 1, 1]
    # too many: 0.02 of 6 -> 1 (clipped) twice, and 5.9 -> 6: two too many, and only the largest can lose them
    assert allocate_ranks([1.0, 1.0, 300.0], 2) == [1, 1, 4]


def test_the_release_corrects_once():
    assert allocate_ranks([1.0, 1.0, 300.0], 2, released=True) == [1, 1, 5]
    assert allocate_ranks([1.0, 2.0, 7.0], 8, released=True) == [2, 6, 16]
    assert sum(allocate_ranks([0.0] * 9 + [1.0], 6, released=True)) == 9 * 2 + 16  # 60 were wanted


@given(LOSSES, st.integers(1, 16))
def test_the_sum_is_the_budget_within_the_bounds(losses, mean):
    ranks = allocate_ranks(losses, mean)
    assert sum(ranks) == mean * len(losses)
    assert all(1 <= rank <= 16 for rank in ranks)


@given(LOSSES, st.floats(2, 9), st.integers(0, 2), st.integers(9, 12))
def test_any_bounds_and_any_mean(losses, mean, low, high):
    ranks = allocate_ranks(losses, mean, low, high)
    assert sum(ranks) == round(mean * len(losses))
    assert all(low <= rank <= high for rank in ranks)


@given(LOSSES, st.integers(1, 16))
def test_a_larger_loss_has_no_smaller_rank(losses, mean):
    ranks = dict(zip(losses, allocate_ranks(losses, mean), strict=True))  # of equal losses the last
    by_loss = [rank for _, rank in sorted(ranks.items())]
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(by_loss))


@given(LOSSES, st.integers(1, 16))
def test_one_pass_of_the_release_goes_no_further_than_ours(losses, mean):
    once, ours = allocate_ranks(losses, mean, released=True), allocate_ranks(losses, mean)
    budget = mean * len(losses)
    assert abs(sum(once) - budget) >= abs(sum(ours) - budget) == 0
    assert all(1 <= rank <= 16 for rank in once)


def test_a_mean_outside_the_bounds_is_refused():
    with pytest.raises(BudgetError, match="1 to 16"):
        allocate_ranks([1.0, 2.0], 17)


@pytest.mark.parametrize("losses", [[], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_losses_that_measure_nothing_are_refused(losses):
    with pytest.raises(UsageError, match="losses"):
        allocate_ranks(losses, 4)
