import json
import math

import numpy as np
import pytest
import torch
from fakes import FakeContext, FakeProxy
from omegaconf import OmegaConf

from sparsify.allocators.arithmetic import RelativeProgression, legal_maximum
from sparsify.allocators.base import allocate
from sparsify.allocators.blend import Blend
from sparsify.allocators.budget import fit_plan, weighted_mean
from sparsify.allocators.equimarginal import Equimarginal, moved
from sparsify.allocators.search import Search
from sparsify.allocators.uniform import Uniform
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError, UsageError
from sparsify.methods.blockwise import BlockwisePruning
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken
from sparsify.runs import registry
from sparsify.search import spaces
from sparsify.search.algorithms import ALGORITHMS
from sparsify.search.ranks import RankProxy, row_ranks
from sparsify.types import LayerSpec, LayerTable, Target

TABLE = LayerTable(tuple(LayerSpec(f"b{b}.{k}", b, k, 4 * (i + 1), 8) for b in range(6) for i, k in enumerate("qd")))


@pytest.fixture
def context():
    best = {x.name: 0.5 + 0.06 * (x.block - 2.5) + (0.1 if x.kind == "q" else -0.05) for x in TABLE}
    proxy = FakeProxy(fit_plan(TABLE, best, 0.5).sparsities())

    def score(plan):
        proxy.apply(plan.targets)
        return math.exp(proxy.loss(None))

    return FakeContext(TABLE, proxy=proxy, score=score)


def distance(plan, context):
    return sum((plan.sparsities()[name] - value) ** 2 for name, value in context._proxy.best.items())


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
    assert allocate(plan, TABLE, 0.5, context).sparsities() == pytest.approx(expected)


@pytest.mark.parametrize("algorithm", ["random", "tpe", "evolution"])
def test_a_search_keeps_the_budget_and_beats_its_start(context, algorithm):
    search = Search(algorithm=algorithm, space="block", trials=60, finalists=4)
    plan = allocate(search, TABLE, 0.5, context)
    uniform = allocate(Uniform(), TABLE, 0.5, context)
    assert mean(plan) == pytest.approx(0.5)
    assert distance(plan, context) < distance(uniform, context)
    assert len(plan.trials) == 60
    assert len(context.scored) == len(plan.notes["finalists"]) == 4
    assert plan.notes["rank_correlation"] == pytest.approx(1.0)


def test_the_winner_is_the_best_finalist_in_full_not_the_best_trial(context):
    full = context._score
    context._score = lambda plan: 1 / full(plan)  # the proxy ranks them the wrong way round
    plan = allocate(Search(space="block", trials=30, finalists=6), TABLE, 0.5, context)
    assert plan.notes["rank_correlation"] == pytest.approx(-1.0)
    chosen = min(plan.notes["finalists"], key=lambda f: f["full"])
    assert chosen["screened"] == max(f["screened"] for f in plan.notes["finalists"])


def test_a_plan_that_breaks_the_model_does_not_end_the_search(context):
    full, calls = context._score, []

    def objective(plan):
        calls.append(plan)
        if len(calls) == 1:
            raise NumericsError("The perplexity is not finite")
        return full(plan)

    context._score = objective
    plan = allocate(Search(space="block", trials=20, finalists=4), TABLE, 0.5, context)
    assert [f["full"] is None for f in plan.notes["finalists"]] == [True, False, False, False]
    json.dumps(plan.notes, allow_nan=False)


def test_a_ranking_of_equals_correlates_with_nothing(context):
    context._score = lambda plan: 3.0
    plan = allocate(Search(space="block", trials=20, finalists=4), TABLE, 0.5, context)
    assert plan.notes["rank_correlation"] is None
    context._proxy.loss = lambda tokens: math.inf
    plan = allocate(Blend(trials=8, parts={"depth": RelativeProgression()}), TABLE, 0.5, context)
    assert {f["screened"] for f in plan.notes["finalists"]} == {None}
    json.dumps([plan.notes, plan.trials], allow_nan=False)


@pytest.mark.parametrize("algorithm", ["grid", "golden", "random", "evolution"])
def test_a_model_of_one_block_has_one_beta(context, algorithm):
    one = LayerTable(TABLE.layers[:2])
    context._proxy.best = {layer.name: 0.5 for layer in one}
    plan = allocate(Search(space="beta", algorithm=algorithm, trials=4, finalists=2), one, 0.5, context)
    assert set(plan.sparsities().values()) == {0.5}


def test_a_grid_is_never_cut_short(context):
    with pytest.raises(UsageError, match="more points"):
        allocate(Search(space="beta", algorithm="grid", step=0.01, trials=5), TABLE, 0.5, context)


def test_dense_statistics_settle_once_and_propagated_ones_every_trial(context):
    allocate(Search(space="block", trials=12, finalists=2), TABLE, 0.5, context)
    assert context._proxy.settled == 1
    allocate(Search(space="block", trials=12, finalists=2, statistics="propagated"), TABLE, 0.5, context)
    assert context._proxy.settled == 13


def test_a_beta_search_tries_the_grid(context):
    plan = allocate(Search(space="beta", algorithm="grid", step=0.05, trials=99, finalists=2), TABLE, 0.5, context)
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
def test_a_budget_beyond_the_bound_of_a_layer_is_refused_at_once(allocator, context):
    name = {Search: "search", Blend: "blend", Equimarginal: "equimarginal"}[type(allocator)]
    with pytest.raises(UsageError, match=r"<= 0\.99"):
        registry.check(OmegaConf.to_container(registry.composed("allocator", name)), 0.995, 6)
    with pytest.raises(UsageError, match=r"<= 0\.99"):
        allocate(allocator, TABLE, 0.995, context)


@pytest.mark.parametrize("groups", ["layer", "block"])
def test_the_descent_equalises_marginal_costs_at_a_constant_budget(context, groups):
    plan = allocate(Equimarginal(groups=groups, steps=60, settle_every=10), TABLE, 0.5, context)
    assert mean(plan) == pytest.approx(0.5)
    assert context._proxy.settled == 7 == len(plan.trials)
    start = distance(allocate(Uniform(), TABLE, 0.5, context), context)
    assert distance(plan, context) < (0.01 if groups == "layer" else 0.9) * start


def test_a_step_moves_against_the_costs_and_no_layer_far():
    plan = fit_plan(TABLE, {x.name: 0.5 for x in TABLE}, 0.5)
    costs = np.array([100.0] + [0.0] * 5 + [-1.0] * 6)
    after = moved(plan, costs - costs.mean(), 0.01, TABLE).fitted(TABLE, 0.5).sparsities()
    values = list(after.values())
    assert values[0] == min(values)
    assert max(values) - min(values) < 0.09
    assert weighted_mean(values, [x.numel for x in TABLE]) == pytest.approx(0.5)


@pytest.fixture
def proxy(make_model, tokens):
    view = BlockView(make_model())
    return RankProxy(view, view.snapshot(), as_inputs(tokens), NextToken())


def targets(sparsities):
    return {name: Target(value) for name, value in sparsities.items()}


def profile(proxy):
    return {x.name: 0.3 + 0.3 * i / len(proxy.view.table) for i, x in enumerate(proxy.view.table)}


@pytest.mark.parametrize("regime", ["propagated", "dense"])
def test_a_proxy_has_the_masks_of_wanda(proxy, tokens, regime):
    sparsities = profile(proxy)
    proxy.settle(targets(sparsities if regime == "propagated" else dict.fromkeys(sparsities, 0.0)))
    proxy.apply(targets(sparsities))
    mine = proxy.view.snapshot()
    proxy.view.restore(proxy.dense)
    plan = fit_plan(
        proxy.view.table, sparsities, weighted_mean([*sparsities.values()], [x.numel for x in proxy.view.table])
    )
    BlockwisePruning(registry.build("pruner", "wanda"), regime, proxy.batch_size).apply(proxy.view, tokens, plan)
    for name, weight in proxy.view.snapshot().items():
        assert torch.equal(mine[name], weight)


def test_a_proxy_leaves_the_model_dense(proxy):
    def interrupted():
        with proxy.closing():
            proxy.settle(targets(profile(proxy)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(torch.equal(proxy.dense[x.spec.name], x.weight) for x in proxy.view.layers)


def test_ranks_are_positions_leftmost_first():
    assert row_ranks(torch.tensor([[3.0, 1.0, 1.0, 2.0]])).tolist() == [[3, 0, 1, 2]]


def test_marginal_costs_are_derivatives_by_the_number_of_zeros(proxy, tokens):
    flags = [p.requires_grad for p in proxy.view.model.parameters()]
    wanted = dict.fromkeys(profile(proxy), 0.5)
    proxy.settle(targets(wanted))
    costs = proxy.marginal_costs(as_inputs(tokens), band=1e-9)
    assert [p.requires_grad for p in proxy.view.model.parameters()] == flags
    slopes = {}
    for x in proxy.view.table:
        around = []
        for shift in (1, -1):
            proxy.apply(targets(wanted | {x.name: 0.5 + shift / x.in_features}))
            around.append(proxy.loss(as_inputs(tokens)))
        slopes[x.name] = (around[0] - around[1]) / (2 * x.out_features)
    both = np.array([[costs[name], slopes[name]] for name in costs])
    assert np.corrcoef(both.T)[0, 1] > 0.95
    assert np.polyfit(both[:, 0], both[:, 1], 1)[0] == pytest.approx(1, abs=0.4)
