"""MSP and EvoPress as allocators: seeds, bounds, what is refused beforehand, and a kill."""

import json
import math

import pytest
import torch
from fakes import FakeContext
from omegaconf import OmegaConf

from sparsify.allocators.arithmetic import RelativeProgression
from sparsify.allocators.base import allocate
from sparsify.allocators.context import Context
from sparsify.allocators.equimarginal import Equimarginal
from sparsify.allocators.evolving import level_bounds, levels_of
from sparsify.allocators.evopress import EvoPress
from sparsify.allocators.fisher import sensitivities, thirds
from sparsify.allocators.msp import MSP
from sparsify.allocators.search import Search
from sparsify.data.inputs import as_inputs
from sparsify.errors import BudgetError, PatternError, UsageError
from sparsify.methods.checkpoint import Checkpoint
from sparsify.methods.oneshot import OneShot
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken, mean_loss
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.ria import RIA
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.pruners.wanda import Wanda
from sparsify.recipe import Recipe, prune_model
from sparsify.runs import registry
from sparsify.search.fitness import Fitness, stages
from sparsify.search.ranks import RankProxy
from sparsify.types import Pattern, Target

MIXED = Pattern.parse("mixed:8")
SMALL = {"population": 8, "generations": 5, "elites": 3, "tokens": [24, 60], "survivors": [3]}


@pytest.fixture
def view(make_model):
    return BlockView(make_model(num_hidden_layers=6))


@pytest.fixture
def context(view, tokens):
    return context_of(view, tokens)


def context_of(view, tokens, **options):
    text = as_inputs(tokens)
    return Context(view, text, text, pruner=options.pop("pruner", Wanda()), pattern=MIXED, **options)


def kept_by_block(plan, view):
    return [plan.targets[view.layers_of(block)[0].spec.name].kept for block in range(len(view.blocks))]


def losses(plan):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in plan.trials]


@pytest.mark.parametrize(
    ("start", "sparsity"), [("fisher", 0.75), ("uniform", 0.625), ("random", 0.5), ("rule", 0.75), ("fisher", 0.5)]
)
def test_msp_is_exactly_on_budget_from_every_start(view, context, start, sparsity):
    rule = RelativeProgression(0.4)
    plan = allocate(MSP(**SMALL, start=start, rule=rule), view.table, sparsity, context, MIXED)
    counts = kept_by_block(plan, view)
    assert sum(counts) == 6 * 8 * (1 - sparsity)
    assert plan.ledger.rounded == pytest.approx(sparsity, abs=1e-12)
    assert plan.notes["levels"] == counts
    best = [row["loss"] for row in plan.trials]
    assert best == sorted(best, reverse=True)
    json.dumps([plan.notes, plan.trials], allow_nan=False)


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), RIA(), SparseGPT()], ids=lambda p: type(p).__name__)
def test_the_winners_loss_is_that_of_the_dense_regime(make_model, view, tokens, pruner):
    """What the search says of its winner is found again by pruning anew."""
    from sparsify.methods.blockwise import BlockwisePruning

    plan = allocate(MSP(**SMALL), view.table, 0.75, context_of(view, tokens, pruner=pruner), MIXED)
    assert view.sparsity() == 0
    BlockwisePruning(pruner, "dense", len(tokens)).apply(view, tokens, plan)
    assert plan.notes["heldout_loss"] == pytest.approx(mean_loss(view.model, as_inputs(tokens)), rel=1e-6)
    assert plan.trials[-1]["heldout_perplexity"] == pytest.approx(math.exp(plan.notes["heldout_loss"]))


def test_a_level_for_every_matrix_is_exactly_on_budget(view, context):
    plan = allocate(MSP(**SMALL, groups="layer"), view.table, 0.5, context, MIXED)
    assert sum(x.numel * plan.targets[x.name].kept for x in view.table) == view.table.numel * 4
    assert len({target.kept for target in plan.targets.values()}) > 1


def test_the_seed_genome_has_more_where_fisher_is_large(view, context, monkeypatch):
    sizes = [5.0, 1.0, 3.0, 2.0, 9.0, 4.0]
    traces = {x.name: sizes[x.block] for x in view.table}
    monkeypatch.setattr("sparsify.allocators.fisher.fisher_traces", lambda *given: traces)
    plan = allocate(MSP(**SMALL | {"generations": 0, "population": 2, "elites": 1}), view.table, 0.75, context, MIXED)
    levels = levels_of(view.table, 0.75, MIXED, "block", 0.0)
    assert MSP()._seed(levels, view.table, context) == [3, 1, 2, 1, 3, 2]
    assert sum(kept_by_block(plan, view)) == 12
    assert thirds([1.0, 1.0, 1.0, 1.0]) == [-1, 0, 0, 1]


def test_a_mean_trace_divides_by_the_weights(context, view, monkeypatch):
    traces = {x.name: float(x.numel) for x in view.table}
    monkeypatch.setattr("sparsify.allocators.fisher.fisher_traces", lambda *given: traces)
    assert set(sensitivities(context, view.table, None, "layer", "mean")) == {1.0}
    assert sensitivities(context, view.table, None, "layer", "sum") == [float(x.numel) for x in view.table]


def test_a_killed_search_goes_on_to_the_same_plan(make_model, tokens, tmp_path, monkeypatch):
    recipe = Recipe(Wanda(), MSP(**SMALL), OneShot(), MIXED, 0.75, NextToken())

    def run(folder):
        model = BlockView(make_model(num_hidden_layers=6))
        text = as_inputs(tokens)
        return prune_model(model, text, recipe, heldout=text, checkpoint=Checkpoint(folder)), model

    whole, first = run(tmp_path / "whole")
    calls, save = [], Checkpoint.save

    def deadly(self, state):
        save(self, state)
        calls.append(state)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", deadly)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(Checkpoint, "save", save)
    measured, measure = [], Fitness.__call__
    monkeypatch.setattr(Fitness, "__call__", lambda self, stage: measured.append(stage) or measure(self, stage))
    again, second = run(tmp_path / "killed")
    assert again.plan.targets == whole.plan.targets
    assert losses(again.plan) == losses(whole.plan)
    assert 0 < len(measured) < whole.plan.notes["evaluations"]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first.layers, second.layers, strict=True))
    Checkpoint(tmp_path / "killed").clear()
    assert not list((tmp_path / "killed").iterdir())


def test_a_checkpoint_of_another_question_is_not_gone_on_with(view, tokens, tmp_path):
    kept = Checkpoint(tmp_path, "allocator")
    for seed in (0, 1):
        with_file = allocate(
            MSP(**SMALL), view.table, 0.75, context_of(view, tokens, checkpoint=kept, seed=seed), MIXED
        )
        without = allocate(MSP(**SMALL), view.table, 0.75, context_of(view, tokens, seed=seed), MIXED)
        assert (with_file.targets, losses(with_file)) == (without.targets, losses(without))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "bounds"),
    [
        ("mixed:8", 0.75, (1, 4)),
        ("mixed:8", 0.625, (1, 5)),
        ("mixed:8", 0.5, (2, 6)),
        ("mixed:16", 0.75, (1, 8)),
        ("mixed:4", 0.5, (1, 3)),
        ("mixed:8", 0.7, (1, 5)),
        ("unstructured", 0.7, (-5, 14)),
    ],
)
def test_the_default_bounds(pattern, sparsity, bounds):
    assert level_bounds(sparsity, Pattern.parse(pattern), 0.05, None, None) == bounds


@pytest.mark.parametrize(
    ("pattern", "sparsity", "options", "error", "says"),
    [
        ("unstructured", 0.75, {}, PatternError, "pattern=mixed:8"),
        ("mixed:4", 0.75, {}, BudgetError, "sparsity < 0.75"),
        ("mixed:8", 0.9, {}, BudgetError, r"sparsity < 0\.875"),
        ("mixed:8", 0.75, {"low": 3}, BudgetError, r"sparsity < 0\.625"),
        ("mixed:8", 0.5, {"high": 3}, BudgetError, r"0\.625 < sparsity"),
        ("mixed:8", 0.5, {"low": 0}, BudgetError, "1 <= low"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(pattern, sparsity, options, error, says, view, context):
    node = OmegaConf.to_container(registry.composed("allocator", "msp"), resolve=True) | options
    with pytest.raises(error, match=says):
        registry.check(node, sparsity, 6, Pattern.parse(pattern))
    context.pattern = Pattern.parse(pattern)
    with pytest.raises(error, match=says):
        allocate(MSP(**SMALL, **options), view.table, sparsity, context, context.pattern)


@pytest.mark.parametrize("allocator", [MSP(**SMALL), EvoPress(offspring=3, generations=1)])
def test_an_m_that_does_not_divide_the_width_is_refused_at_once(make_table, allocator):
    table = make_table([(4, 16)], [(4, 12)])
    context = FakeContext(table)
    context.pattern = MIXED
    with pytest.raises(PatternError, match="inputs = 12"):
        allocate(allocator, table, 0.5, context, MIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": [16, 8], "survivors": [2]},
        {"tokens": [8, 16], "survivors": []},
        {"tokens": [0], "survivors": []},
        {"elites": 50},
        {"windows": 0},
        {"exchanges": [3, 1]},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        MSP(**options)


def test_evopress_keeps_the_budget_on_its_grid_and_lowers_the_divergence(view, tokens):
    context = context_of(view, tokens)
    context.pattern = Pattern()
    search = EvoPress(offspring=6, generations=8, tokens=[24, 60], survivors=[2])
    plan = allocate(search, view.table, 0.6, context)
    zeros = sum(x.numel * plan.targets[x.name].sparsity for x in view.table)
    assert zeros == pytest.approx(0.6 * view.table.numel, rel=1e-12)
    steps = [(0.6 - target.sparsity) / 0.05 for target in plan.targets.values()]
    assert steps == pytest.approx([round(step) for step in steps], abs=1e-6)
    assert any(round(step) for step in steps)
    assert plan.trials[-1]["loss"] < plan.trials[0]["loss"]
    assert plan.trials[-1]["heldout_perplexity"] is None


@pytest.mark.parametrize("kind", ["loss", "kl"])
@torch.no_grad()
def test_fitness_is_what_it_says(view, tokens, kind):
    text = as_inputs(tokens)
    fitness = Fitness(view.model, text, [2, 5], NextToken(), kind, 2)
    dense = view.model(tokens).logits[:, :-1].double().log_softmax(-1)
    for layer in view.layers:
        layer.write(layer.weight * (layer.weight.abs() > 0.1))
    own = view.model(tokens).logits[:, :-1].double().log_softmax(-1)
    by_token = (
        (dense.exp() * (dense - own)).sum(-1) if kind == "kl" else -own.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    )
    for stage, count in enumerate([2, 5]):
        assert fitness(stage) == pytest.approx(float(by_token[:count].mean()), rel=1e-4)
    view.layers[-1].write(torch.full_like(view.layers[-1].weight, math.nan))
    assert fitness(0) == math.inf


def test_a_divergence_of_the_dense_model_is_zero(view, tokens):
    assert Fitness(view.model, as_inputs(tokens), [5], NextToken(), "kl", 5)(0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "survivors", "samples", "expected"),
    [
        ([2048, 8192, 16384], [16, 8], 32, ([4, 16, 32], [16, 8])),
        ([2048, 8192, 16384], [16, 8], 4, ([4], [])),
        ([100, 8192, 16384], [16, 8], 16, ([1, 16], [16])),
    ],
)
def test_stages_end_where_the_text_does(tokens, survivors, samples, expected):
    assert stages(tokens, survivors, 512, samples) == expected


def test_targets_of_a_genome(view):
    levels = levels_of(view.table, 0.75, MIXED, "block", 0.0)
    targets = levels.targets((1, 2, 3, 2, 1, 3))
    assert targets[view.layers_of(2)[0].spec.name] == Target(1 - 3 / 8, 3, 8)
    grid = levels_of(view.table, 0.7, Pattern(), "layer", 0.05)
    assert grid.target(-2).sparsity == pytest.approx(0.8)
    assert grid.nearest({x.name: 0.8 for x in view.table}) == [-2] * len(view.table)


def test_marginal_costs_of_a_level_are_those_of_the_next_weight_of_every_group(view, context, tokens):
    with context.proxy(None, MIXED) as proxy:
        middle = {x.name: Target(0.5, 4, 8) for x in view.table}
        proxy.settle(middle)
        costs = proxy.marginal_costs(as_inputs(tokens), band=0.04)
        slopes = {}
        for x in view.table:
            ends = []
            for kept in (3, 5):
                proxy.apply(middle | {x.name: Target(1 - kept / 8, kept, 8)})
                ends.append(proxy.loss(as_inputs(tokens)))
            slopes[x.name] = (ends[0] - ends[1]) / (2 * x.numel / 8)
    both = torch.tensor([[costs[name], slopes[name]] for name in costs])
    assert torch.corrcoef(both.T)[0, 1] > 0.8


def test_a_native_descent_lowers_the_loss_of_the_pattern_and_stays_on_budget(view, context):
    descent = Equimarginal(native=True, steps=12, settle_every=4, rate=0.04, windows=None)
    plan = allocate(descent, view.table, 0.5, context, MIXED)
    assert sum(x.numel * plan.targets[x.name].kept for x in view.table) == view.table.numel * 4
    assert len({target.kept for target in plan.targets.values()}) > 1
    losses = [row["heldout_perplexity"] for row in plan.trials]
    assert min(losses) < losses[0]


def test_a_native_descent_tries_what_the_cell_prunes(view, context, tokens, monkeypatch):
    tried, settle = [], RankProxy.settle
    monkeypatch.setattr(RankProxy, "settle", lambda self, targets: tried.append(dict(targets)) or settle(self, targets))
    plan = allocate(Equimarginal(native=True, steps=2, settle_every=1, windows=None), view.table, 0.5, context, MIXED)
    assert all(target.group == 8 for targets in tried for target in targets.values())
    assert dict(plan.targets) in tried


@pytest.mark.parametrize("statistics", ["dense", "propagated"])
def test_a_native_search_tries_plans_of_the_pattern_and_stays_on_budget(view, context, monkeypatch, statistics):
    tried, apply, settle = [], RankProxy.apply, RankProxy.settle

    def watched(does):
        return lambda self, targets: tried.append(dict(targets)) or does(self, targets)

    monkeypatch.setattr(RankProxy, "apply", watched(apply))
    monkeypatch.setattr(RankProxy, "settle", watched(settle))
    context.try_plan = lambda plan: 10.0
    search = Search(native=True, trials=12, windows=None, heldout=None, statistics=statistics, finalists=2)
    plan = allocate(search, view.table, 0.5, context, MIXED)
    assert sum(x.numel * plan.targets[x.name].kept for x in view.table) == view.table.numel * 4
    pruning = [targets for targets in tried if any(target.sparsity for target in targets.values())]
    assert len(pruning) == 12
    assert all(target.group == 8 for targets in pruning for target in targets.values())
    assert dict(plan.targets) in pruning


def test_an_unstructured_descent_does_not_know_native(view, tokens):
    plans = []
    for native in (False, True):
        context = context_of(view, tokens)
        context.pattern = Pattern()
        plans.append(allocate(Equimarginal(native=native, steps=3, windows=None), view.table, 0.5, context))
    assert plans[0].targets == plans[1].targets
