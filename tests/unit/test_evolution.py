"""Genomes that keep a budget of unequal genes exactly, and an evolution of them that can be killed."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparsify.errors import BudgetError, UsageError
from sparsify.methods.checkpoint import Checkpoint
from sparsify.search.budgets import Budget
from sparsify.search.evolution import Evolution, Scheme, crossed, drawn, exchange, exchanged, neighbours, repaired

RATIOS = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=9),  # any sizes
    st.lists(st.sampled_from([3, 1, 8]), min_size=1, max_size=24),  # a LLaMA's matrices
)


@st.composite
def budgets(draw):
    sizes = draw(RATIOS)
    M = draw(st.sampled_from([4, 8, 16]))
    low = [draw(st.integers(1, M)) for _ in sizes]
    high = [draw(st.integers(a, M)) for a in low]
    share = draw(st.fractions(0, 1, max_denominator=100))
    least, most = (Fraction(sum(s * n for s, n in zip(sizes, x, strict=True)), sum(sizes)) for x in (low, high))
    return sizes, low, high, least + share * (most - least)


@settings(max_examples=150, deadline=None)
@given(budgets(), st.integers(0, 2**31))
def test_every_way_to_a_genome_keeps_the_budget_exactly(given_budget, seed):
    budget = Budget.nearest(*given_budget)
    rng = np.random.default_rng(seed)
    one, other = drawn(budget, rng), drawn(budget, rng)
    found = [one, other, crossed(budget, one, other, rng), exchanged(budget, one, 5, rng), exchange(budget, one, rng)]
    found += [repaired(budget, rng.integers(-3, 40, size=len(budget)).tolist(), rng)]
    found += neighbours(budget, one, 4, 1, 3, rng)
    for genome in found:
        assert all(a <= n <= b for a, n, b in zip(budget.low, genome, budget.high, strict=True))
        assert sum(s * n for s, n in zip(budget.sizes, genome, strict=True)) == budget.total
        assert budget.holds(genome)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 3), st.fractions(0, 1, max_denominator=50))
def test_the_budget_is_the_nearest_sum_that_levels_can_make(sizes, width, share):
    low, high = [1] * len(sizes), [1 + width] * len(sizes)
    wanted = 1 + share * width
    budget = Budget.nearest(sizes, low, high, wanted)
    unit = math.gcd(*sizes)
    sums = {
        sum(s * n for s, n in zip(sizes, g, strict=True))
        for g in itertools.product(*([range(1, 2 + width)] * len(sizes)))
    }
    best = min(sums, key=lambda total: (abs(total - wanted * sum(sizes)), total))
    assert budget.total * unit == best


def test_a_budget_out_of_reach_is_refused_with_what_can_be_reached():
    with pytest.raises(BudgetError, match="1 to 4"):
        Budget.nearest([3, 5], [1, 1], [4, 4], Fraction(9, 2))


def test_genes_of_one_size_exchange_one_level_between_two():
    budget = Budget.nearest([5] * 6, [1] * 6, [4] * 6, Fraction(2))
    rng, genome = np.random.default_rng(0), (2,) * 6
    for _ in range(30):
        new = exchange(budget, genome, rng)
        assert sorted(a - b for a, b in zip(new, genome, strict=True)) == [-1, 0, 0, 0, 0, 1]
        genome = new


def test_a_large_gene_is_paid_for_by_several_small_ones():
    sizes = [8] + [1] * 8 + [3] * 4
    budget = Budget.nearest(sizes, [1] * 13, [7] * 13, Fraction(4))
    rng, moved = np.random.default_rng(1), set()
    genome = (4,) * 13
    for _ in range(200):
        genome = exchange(budget, genome, rng)
        moved.add(genome[0])
    assert {3, 4, 5} <= moved  # weights go from one size to another


def test_no_room_leaves_a_genome_as_it_is():
    budget = Budget.nearest([3, 5], [1, 1], [4, 4], Fraction(1))
    assert exchange(budget, (1, 1), np.random.default_rng(0)) == (1, 1)


BUDGET = Budget.nearest([2, 2, 3, 3, 1, 1, 4, 4], [1] * 8, [6] * 8, Fraction(3))
BEST = (1, 5, 2, 4, 1, 5, 3, 3)
SCHEME = Scheme(population=16, generations=20, elites=4, patience=20, survivors=(6,))


def loss_of(genome, stage=1):
    rough = 0.1 * math.sin(sum(i * n for i, n in enumerate(genome))) if stage == 0 else 0.0
    return sum((n - b) ** 2 for n, b in zip(genome, BEST, strict=True)) + rough


def search(scheme=SCHEME, seed=0):
    rng = np.random.default_rng(5)
    start = repaired(BUDGET, [3] * 8, rng)
    return Evolution(BUDGET, scheme, neighbours(BUDGET, start, scheme.population, 1, 2, rng), seed)


def run(evolution, asked=None, save=None):
    while genomes := evolution.ask():
        stage = evolution.stage
        if asked is not None:
            asked.extend((stage, genome) for genome in genomes)
        if evolution.tell([loss_of(genome, stage) for genome in genomes]) and save:
            save(evolution.state())
    return evolution


def test_an_evolution_finds_what_is_best_and_never_measures_twice():
    asked = []
    evolution = run(search(), asked)
    assert evolution.best == (BEST, 0.0)
    assert len(asked) == len(set(asked)) == evolution.history[-1]["evaluations"]
    assert all(BUDGET.holds(genome) for _, genome in asked)
    losses = [row["loss"] for row in evolution.history]
    assert losses == sorted(losses, reverse=True)


def test_survivors_of_a_stage_are_its_best():
    evolution = search()
    first = evolution.ask()
    assert evolution.stage == 0
    evolution.tell([loss_of(genome, 0) for genome in first])
    assert evolution.stage == 1
    assert evolution.ask() == sorted(first, key=lambda genome: loss_of(genome, 0))[:6]


def test_breeding_beats_drawing_anew_at_equal_evaluations():
    drawn_anew = run(search(replace(SCHEME, breeding="random", generations=6)))
    bred = run(search(replace(SCHEME, generations=6)))
    assert bred.best[1] < drawn_anew.best[1]
    assert abs(len(bred.memo) - len(drawn_anew.memo)) <= 0.2 * len(bred.memo)


def test_a_killed_search_goes_on_to_the_same_winner(tmp_path):
    whole = run(search())

    class Killed(Exception):
        pass

    def save(state):
        Checkpoint(tmp_path).save({"search": state})
        if evolution.generation == 4:
            raise Killed

    evolution = search()
    with pytest.raises(Killed):
        run(evolution, save=save)
    again = Evolution(BUDGET, SCHEME, [], 0)
    again.resume(Checkpoint(tmp_path).load()["search"])
    assert again.generation == 4
    run(again)
    assert (again.best, again.history, again.memo) == (whole.best, whole.history, whole.memo)


def test_a_seed_decides_the_search():
    assert run(search(seed=1)).memo == run(search(seed=1)).memo != run(search(seed=2)).memo


def test_it_stops_when_nothing_is_gained():
    evolution = search(replace(SCHEME, patience=3))
    while genomes := evolution.ask():
        evolution.tell([1.0] * len(genomes))
    assert len(evolution.history) == 4


def test_a_loss_that_is_no_number_never_wins():
    evolution = search(replace(SCHEME, generations=2))
    while genomes := evolution.ask():
        evolution.tell([math.nan if i else 2.0 for i in range(len(genomes))])
    assert evolution.best[1] == 2.0


def test_a_genome_off_the_budget_is_refused():
    with pytest.raises(UsageError, match="off the budget"):
        Evolution(BUDGET, SCHEME, [(1,) * 8], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"population": 1},
        {"elites": 16},
        {"crossover": 1.5},
        {"mutation": -0.1},
        {"exchanges": (3, 1)},
        {"exchanges": (0, 1)},
        {"patience": 0},
        {"survivors": (0,)},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        replace(SCHEME, **options)


def test_a_state_is_what_a_checkpoint_may_hold(tmp_path):
    evolution = run(search(replace(SCHEME, generations=1)))
    torch.save(evolution.state(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == evolution.state()
