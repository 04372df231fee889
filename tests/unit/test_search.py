import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from sparsify.allocators.arithmetic import RelativeProgression, legal_maximum
from sparsify.allocators.blend import Blend
from sparsify.allocators.budget import fit_plan, weighted_mean
from sparsify.allocators.equimarginal import Equimarginal, moved
from sparsify.allocators.search import Search
from sparsify.allocators.uniform import Uniform
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.oneshot import OneShot
from sparsify.model.blocks import BlockView
from sparsify.runs import registry
from sparsify.search import spaces
from sparsify.search.algorithms import ALGORITHMS
from sparsify.search.screen import Screen, row_ranks
from sparsify.types import LayerSpec, LayerTable

TABLE = LayerTable(tuple(LayerSpec(f"b{b}.{k}", b, k, 4 * (i + 1), 8) for b in range(6) for i, k in enumerate("qd")))


@dataclass
class FakeScreen:
    """A model whose loss is known: the squared distance of a plan from the best one."""

    best: dict[str, float]
    settled: int = 0
    plan: dict[str, float] = field(default_factory=dict)

    def settle(self, sparsities):
        self.settled += 1
        self.plan = dict(sparsities)

    def apply(self, sparsities):
        self.plan = dict(sparsities)

    def loss(self, tokens):
        return sum((self.plan[name] - value) ** 2 for name, value in self.best.items())

    def marginal_costs(self, tokens, band):
        return {name: 2 * (self.plan[name] - value) for name, value in self.best.items()}


@dataclass
class FakeContext:
    screened: FakeScreen
    seed: int = 0
    asked: list = field(default_factory=list)

    def heldout_tokens(self, windows):
        return torch.zeros(5, 4, dtype=torch.long)[:windows]

    def progress(self, done, total):
        assert done <= total

    def objective(self, plan):
        self.asked.append(plan)
        self.screened.apply(plan.sparsities())
        return math.exp(self.screened.loss(None))

    @contextmanager
    def screen(self, windows):
        yield self.screened

    def _never(self, *_):
        raise AssertionError("a search does not ask for this")

    weights = dense_stats = dense_blocks = hidden_states = input_norms = drift = once = _never


@pytest.fixture
def context():
    best = {x.name: 0.5 + 0.06 * (x.block - 2.5) + (0.1 if x.kind == "q" else -0.05) for x in TABLE}
    return FakeContext(FakeScreen(fit_plan(TABLE, best, 0.5).sparsities()))


def distance(plan, context):
    return sum((plan.sparsities()[name] - value) ** 2 for name, value in context.screened.best.items())


def mean(plan):
    return weighted_mean([plan.targets[x.name].sparsity for x in TABLE], [x.numel for x in TABLE])


def bowl(point):
    return float(((point - 0.3) ** 2).sum())


def box(dim):
    one = np.ones(dim)
    return spaces.Space(
        np.zeros((1, dim)), -one, one, 0.3 * np.eye(dim), dict, np.linspace(-1, 1, 21)[:, None] if dim == 1 else None
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_asks_no_more_than_its_trials_and_comes_near_the_minimum(name):
    asked = []

    def objective(point):
        asked.append(bowl(point))
        return asked[-1]

    ALGORITHMS[name](objective, box(1), 25, np.random.default_rng(0))
    assert len(asked) <= 25
    assert min(asked) < 0.01


def test_golden_section_closes_in_by_the_golden_ratio():
    asked = []
    ALGORITHMS["golden"](lambda p: asked.append(float(p[0])) or bowl(p), box(1), 30, np.random.default_rng(0))
    assert asked[-1] == pytest.approx(0.3, abs=2 * 0.6181**28)


@pytest.mark.parametrize("name", ["grid", "golden"])
def test_searches_of_one_number_refuse_more(name):
    space = spaces.groups(TABLE, "layer", [{x.name: 0.5 for x in TABLE}], 0.1)
    with pytest.raises(UsageError, match="space=beta"):
        ALGORITHMS[name](bowl, space, 5, np.random.default_rng(0))


def test_the_same_seed_gives_the_same_trials():
    def trials(seed):
        asked = []
        ALGORITHMS["evolution"](lambda p: asked.append(p.tolist()) or bowl(p), box(4), 30, np.random.default_rng(seed))
        return asked

    assert trials(3) == trials(3) != trials(4)


@pytest.mark.parametrize(("by", "dim"), [("block", 6), ("layer", 12)])
def test_a_group_space_starts_at_the_rules_and_moves_groups(by, dim):
    rule = {x.name: 0.4 + 0.02 * x.block for x in TABLE}
    space = spaces.groups(TABLE, by, [rule], 0.2)
    assert (space.dim, space.profile(space.starts[0])) == (dim, pytest.approx(rule))
    assert space.moves.shape[1] == dim
    assert np.abs(space.moves).max() == pytest.approx(0.03)


def test_a_blend_adds_centred_profiles(context):
    up, down = ({x.name: 0.5 + s * 0.01 * (x.block - 2.5) for x in TABLE} for s in (1, -3))
    space = spaces.blends([up, down], 0.5)
    together = space.profile(np.array([1.0, 0.5]))
    assert together == pytest.approx({x.name: 0.5 - 0.5 * 0.01 * (x.block - 2.5) for x in TABLE})
    plan = Blend(parts={"a": RelativeProgression(0.4), "b": RelativeProgression(-0.1)}, weights={"a": 1.0, "b": 2.0})
    beta = 0.2 * legal_maximum(0.5, 6)
    expected = {x.name: 0.5 + beta * (x.block - 2.5) for x in TABLE}
    assert plan.allocate(TABLE, 0.5, context).sparsities() == pytest.approx(expected)


@pytest.mark.parametrize("algorithm", ["random", "tpe", "evolution"])
def test_a_search_keeps_the_budget_and_beats_its_start(context, algorithm):
    search = Search(algorithm=algorithm, space="block", trials=60, finalists=4)
    plan = search.allocate(TABLE, 0.5, context)
    uniform = Uniform().allocate(TABLE, 0.5, context)
    assert mean(plan) == pytest.approx(0.5)
    assert distance(plan, context) < distance(uniform, context)
    assert len(plan.trials) == 60
    assert len(context.asked) == len(plan.notes["finalists"]) == 4
    assert plan.notes["rank_correlation"] == pytest.approx(1.0)


def test_the_winner_is_the_best_finalist_in_full_not_the_best_trial(context):
    full = context.objective
    context.objective = lambda plan: 1 / full(plan)  # the screen ranks them the wrong way round
    plan = Search(space="block", trials=30, finalists=6).allocate(TABLE, 0.5, context)
    assert plan.notes["rank_correlation"] == pytest.approx(-1.0)
    chosen = min(plan.notes["finalists"], key=lambda f: f["full"])
    assert chosen["screened"] == max(f["screened"] for f in plan.notes["finalists"])


def test_a_plan_that_breaks_the_model_does_not_end_the_search(context):
    full, calls = context.objective, []

    def objective(plan):
        calls.append(plan)
        if len(calls) == 1:
            raise NumericsError("The perplexity is not finite")
        return full(plan)

    context.objective = objective
    plan = Search(space="block", trials=20, finalists=4).allocate(TABLE, 0.5, context)
    assert [f["full"] is None for f in plan.notes["finalists"]] == [True, False, False, False]
    json.dumps(plan.notes, allow_nan=False)


def test_a_ranking_of_equals_correlates_with_nothing(context):
    context.objective = lambda plan: 3.0
    plan = Search(space="block", trials=20, finalists=4).allocate(TABLE, 0.5, context)
    assert plan.notes["rank_correlation"] is None
    context.screened.loss = lambda tokens: math.inf
    plan = Blend(trials=8, parts={"depth": RelativeProgression()}).allocate(TABLE, 0.5, context)
    assert {f["screened"] for f in plan.notes["finalists"]} == {None}
    json.dumps([plan.notes, plan.trials], allow_nan=False)


@pytest.mark.parametrize("algorithm", ["grid", "golden", "random", "evolution"])
def test_a_model_of_one_block_has_one_beta(context, algorithm):
    one = LayerTable(TABLE.layers[:2])
    context.screened.best = {layer.name: 0.5 for layer in one}
    plan = Search(space="beta", algorithm=algorithm, trials=4, finalists=2).allocate(one, 0.5, context)
    assert set(plan.sparsities().values()) == {0.5}


def test_a_grid_is_never_cut_short(context):
    with pytest.raises(UsageError, match="more points"):
        Search(space="beta", algorithm="grid", step=0.01, trials=5).allocate(TABLE, 0.5, context)


def test_dense_statistics_settle_once_and_propagated_ones_every_trial(context):
    Search(space="block", trials=12, finalists=2).allocate(TABLE, 0.5, context)
    assert context.screened.settled == 1
    Search(space="block", trials=12, finalists=2, statistics="propagated").allocate(TABLE, 0.5, context)
    assert context.screened.settled == 13


def test_a_beta_search_tries_the_grid(context):
    plan = Search(space="beta", algorithm="grid", step=0.05, trials=99, finalists=2).allocate(TABLE, 0.5, context)
    assert len(plan.trials) == 5
    assert mean(plan) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        (Search, {"trials": 1}),
        (Search, {"windows": 0}),
        (Search, {"heldout": 0}),
        (Search, {"algorithm": "golden"}),
        (Search, {"reach": 0.0}),
        (Search, {"space": "beta", "algorithm": "grid", "step": 0.0}),
        (Blend, {"algorithm": "grid"}),
        (Equimarginal, {"windows": -2}),
        (Search, {"rules": {}}),
        (Blend, {"parts": {}}),
        (Blend, {"weights": {"owl": 1.0}}),
        (Equimarginal, {"steps": 0}),
        (Equimarginal, {"rate": 0.0}),
        (Equimarginal, {"momentum": 1.0}),
        (RelativeProgression, {"fraction": 1.5}),
    ],
)
def test_settings_out_of_range_are_refused(what, options):
    with pytest.raises(UsageError):
        what(**options)


@pytest.mark.parametrize("allocator", [Search(), Blend(), Equimarginal()])
def test_a_budget_beyond_the_bound_of_a_layer_is_refused_at_once(allocator):
    with pytest.raises(UsageError, match=r"<= 0\.99"):
        allocator.check(0.995, 6)


@pytest.mark.parametrize("groups", ["layer", "block"])
def test_the_descent_equalises_marginal_costs_at_a_constant_budget(context, groups):
    plan = Equimarginal(groups=groups, steps=60, settle_every=10).allocate(TABLE, 0.5, context)
    assert mean(plan) == pytest.approx(0.5)
    assert context.screened.settled == 7 == len(plan.trials)
    start = distance(Uniform().allocate(TABLE, 0.5, context), context)
    assert distance(plan, context) < (0.01 if groups == "layer" else 0.9) * start


def test_a_step_moves_against_the_costs_and_no_layer_far():
    plan = fit_plan(TABLE, {x.name: 0.5 for x in TABLE}, 0.5)
    costs = np.array([100.0] + [0.0] * 5 + [-1.0] * 6)
    after = moved(plan, costs - costs.mean(), 0.01, TABLE, 0.5).sparsities()
    values = list(after.values())
    assert values[0] == min(values)
    assert max(values) - min(values) < 0.09
    assert weighted_mean(values, [x.numel for x in TABLE]) == pytest.approx(0.5)


@pytest.fixture
def screen(make_model, tokens):
    view = BlockView(make_model())
    return Screen(view, view.snapshot(), tokens)


def profile(screen):
    return {x.name: 0.3 + 0.3 * i / len(screen.view.table) for i, x in enumerate(screen.view.table)}


@pytest.mark.parametrize("regime", ["propagated", "dense"])
def test_a_screen_has_the_masks_of_wanda(screen, tokens, regime):
    wanted = profile(screen)
    screen.settle(wanted if regime == "propagated" else dict.fromkeys(wanted, 0.0))
    screen.apply(wanted)
    mine = screen.view.snapshot()
    screen.view.restore(screen.dense)
    plan = fit_plan(screen.view.table, wanted, weighted_mean([*wanted.values()], [x.numel for x in screen.view.table]))
    OneShot(regime=regime).apply(
        screen.view, tokens, registry.build("pruner", "wanda"), plan, batch_size=screen.batch_size
    )
    for name, weight in screen.view.snapshot().items():
        assert torch.equal(mine[name], weight)


def test_a_screen_leaves_the_model_dense(screen):
    def interrupted():
        with screen.closing():
            screen.settle(profile(screen))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(torch.equal(screen.dense[x.spec.name], x.weight) for x in screen.view.layers)


def test_ranks_are_positions_leftmost_first():
    assert row_ranks(torch.tensor([[3.0, 1.0, 1.0, 2.0]])).tolist() == [[3, 0, 1, 2]]


def test_marginal_costs_are_derivatives_by_the_number_of_zeros(screen, tokens):
    flags = [p.requires_grad for p in screen.view.model.parameters()]
    wanted = dict.fromkeys(profile(screen), 0.5)
    screen.settle(wanted)
    costs = screen.marginal_costs(tokens, band=1e-9)
    assert [p.requires_grad for p in screen.view.model.parameters()] == flags
    slopes = {}
    for x in screen.view.table:
        around = []
        for shift in (1, -1):
            screen.apply(wanted | {x.name: 0.5 + shift / x.in_features})
            around.append(screen.loss(tokens))
        slopes[x.name] = (around[0] - around[1]) / (2 * x.out_features)
    both = np.array([[costs[name], slopes[name]] for name in costs])
    assert np.corrcoef(both.T)[0, 1] > 0.95
    assert np.polyfit(both[:, 0], both[:, 1], 1)[0] == pytest.approx(1, abs=0.4)
