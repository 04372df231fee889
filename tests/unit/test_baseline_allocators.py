"""Allocation baselines against their formulas in plain loops, on matrices small enough to follow by hand."""

import itertools
import math

import pytest
import torch
from fakes import FakeContext
from hypothesis import given
from hypothesis import strategies as st

from sparsify.allocators import neuronal
from sparsify.allocators.als import ALS, independence, redundancy, solve_program
from sparsify.allocators.base import allocate, outlier_mapping
from sparsify.allocators.context import Context
from sparsify.allocators.dlp import DLP
from sparsify.allocators.dsa import DSA, log_variance, searched_signal
from sparsify.allocators.erdos_renyi import ErdosRenyi, ErdosRenyiPlus, er_densities
from sparsify.allocators.lsa import LSA, minimal_error, released_beta
from sparsify.allocators.neuronal import GRID, NeuronAL, activation_shift, legal_grid, schedule
from sparsify.allocators.pooled import LAMP, Global, lamp_scores, shares_below
from sparsify.data.inputs import as_inputs
from sparsify.errors import BudgetError, NumericsError, UsageError
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import GRAM, NORM
from sparsify.model.walk import Walk
from sparsify.pruners.wanda import Wanda


def scores_of(context, name):
    """|W_ij| ||X_j|| in plain numbers."""
    norms = context.inputs[name].double().square().sum(0).sqrt().tolist()
    return [abs(w) * norms[j] for row in context.tensors[name].double().tolist() for j, w in enumerate(row)]


def block_scores(context):
    table = context.table
    return [
        [s for x in table if x.block == block for s in scores_of(context, x.name)] for block in range(table.num_blocks)
    ]


def spread(amount):
    return lambda x: torch.randn(x.out_features, x.in_features) * (1 + amount * x.block)


def by_block(plan, table):
    return [plan.targets[next(x.name for x in table if x.block == b)].sparsity for b in range(table.num_blocks)]


def mean_of(plan, table):
    return sum(plan.targets[x.name].sparsity * x.numel for x in table) / table.numel


def mapped(keep, width, wanted):
    """OWL's mapping, written out: keep ratios min-max scaled to a width and shifted to a mean."""
    low, high = min(keep), max(keep)
    scaled = [(k - low) / (high - low) * width for k in keep]
    return [1 - (k - sum(scaled) / len(scaled) + 1 - wanted) for k in scaled]


# Global and LAMP


def naive_shares(scores, wanted):
    """Sort all scores of all layers together and count each layer's among the lowest."""
    pool = sorted((s, name) for name, values in scores.items() for s in values)
    gone = [name for _, name in pool[: round(wanted * len(pool))]]
    return {name: gone.count(name) / len(values) for name, values in scores.items()}


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.5, 0.7, 0.95])
def test_global_takes_each_layers_share_of_the_lowest_wanda_scores(wanted, unequal):
    context = FakeContext(unequal)
    plan = allocate(Global(), unequal, wanted, context)
    expected = naive_shares({x.name: scores_of(context, x.name) for x in unequal}, wanted)
    # The counts are whole and the budget is not: the plan differs by less than a weight.
    assert plan.sparsities() == pytest.approx(expected, abs=1 / 48)
    assert mean_of(plan, unequal) == pytest.approx(wanted, abs=1e-12)


def test_global_by_magnitude_reads_no_text(unequal):
    context = FakeContext(unequal)
    context.stats_by_block = None
    plan = allocate(Global(score="magnitude"), unequal, 0.5, context)
    expected = naive_shares({n: w.abs().flatten().tolist() for n, w in context.tensors.items()}, 0.5)
    assert plan.sparsities() == pytest.approx(expected, abs=1 / 48)


def test_global_may_empty_a_layer(blocks):
    table = blocks(2)
    context = FakeContext(table, weight=spread(1e4))
    assert by_block(allocate(Global(), table, 0.5, context), table) == pytest.approx([1.0, 0.0])


@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=6, max_size=6), min_size=3, max_size=3), st.data())
def test_a_shared_threshold_counts_exactly_whatever_the_scores(make_table, rows, data):
    table = make_table([(2, 3)], [(2, 3), (2, 3)])
    rank = data.draw(st.integers(0, 18))
    scores = {x.name: torch.tensor(row) for x, row in zip(table, rows, strict=True)}
    shares = shares_below(table, lambda: scores.items(), rank / 18)
    assert sum(share * 6 for share in shares.values()) == pytest.approx(rank, abs=1e-9)
    kth = sorted(itertools.chain(*rows))[max(rank - 1, 0)]
    for name, values in scores.items():
        below, upto = int((values < kth).sum()), int((values <= kth).sum())
        assert (below if rank else 0) - 1e-9 <= shares[name] * 6 <= upto + 1e-9


def test_lamp_divides_by_what_is_left_of_the_layer():
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [2.0, -4.0]]))
    assert scores.tolist() == pytest.approx([1 / 30, 4 / 29, 9 / 25, 1.0])
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [0.0] * 4


@pytest.mark.parametrize("wanted", [0.2, 0.6, 0.9])
def test_lamp_is_one_threshold_over_lamp_scores(wanted, unequal):
    context = FakeContext(unequal)
    scores = {}
    for name, weight in context.tensors.items():
        squares = sorted(w * w for w in weight.flatten().double().tolist())
        scores[name] = [s / sum(squares[i:]) for i, s in enumerate(squares)]
    plan = allocate(LAMP(), unequal, wanted, context)
    assert plan.sparsities() == pytest.approx(naive_shares(scores, wanted), abs=1 / 48)
    assert mean_of(plan, unequal) == pytest.approx(wanted, abs=1e-12)
    assert max(plan.sparsities().values()) < 1


# Erdos-Renyi


def test_erdos_renyi_densities_by_hand(make_table):
    table = make_table([(10, 10)], [(5, 20)])
    # Kept 90 of 200 = eps (20 + 25), so eps = 2: densities 2 * 20 / 100 and 2 * 25 / 100.
    assert list(er_densities(table, 0.55, set()).values()) == pytest.approx([0.4, 0.5])


def test_a_layer_that_would_be_denser_than_dense_is_held_and_the_rest_solved_again(make_table):
    table = make_table([(20, 20)], [(2, 2)])
    # Unbounded, the small one would keep eps * 4 = 200 / 44 * 4 > 4 weights; then 400 d = 198.
    densities = er_densities(table, 1 - 202 / 404, set())
    assert list(densities.values()) == pytest.approx([198 / 400, 1.0])


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=2, max_size=6), st.floats(0.0, 0.99))
def test_erdos_renyi_keeps_the_budget_and_its_proportions(make_table, shapes, wanted):
    table = make_table(shapes)
    densities = er_densities(table, wanted, set())
    assert sum(densities[x.name] * x.numel for x in table) == pytest.approx((1 - wanted) * table.numel)
    ratios = [
        densities[x.name] * x.numel / (x.in_features + x.out_features) for x in table if densities[x.name] < 1 - 1e-9
    ]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else wanted < 1e-6
    assert all(0 <= d <= 1 + 1e-9 for d in densities.values())


def test_erdos_renyi_plus_keeps_the_last_layer_dense_at_the_same_budget(blocks):
    table = blocks(6)
    plain, plus = (allocate(kind(), table, 0.6, FakeContext(table)) for kind in (ErdosRenyi, ErdosRenyiPlus))
    last = table.layers[-1].name
    assert plus.targets[last].sparsity == pytest.approx(0, abs=1e-12)
    assert mean_of(plus, table) == pytest.approx(mean_of(plain, table), abs=1e-12) == pytest.approx(0.6)
    assert all(plus.targets[x.name].sparsity > plain.targets[x.name].sparsity for x in table if x.name != last)


def test_a_dense_last_layer_that_exceeds_the_budget_is_refused(make_table):
    table = make_table([(4, 4)], [(8, 8)])
    with pytest.raises(BudgetError, match=r"blocks\.1\.layer0.*sparsity <= 0\.2"):
        allocate(ErdosRenyiPlus(), table, 0.5, FakeContext(table))


# DLP


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_dlp_prunes_blocks_with_large_scores_more(statistic, blocks):
    table = blocks(5)
    context = FakeContext(table)
    pooled = [sorted(scores) for scores in block_scores(context)]
    signal = [sum(s) / len(s) if statistic == "mean" else s[(len(s) - 1) // 2] for s in pooled]
    plan = allocate(DLP(alpha=0.15, statistic=statistic), table, 0.7, context)
    assert plan.notes["block_score"] == pytest.approx(signal, rel=1e-5)
    assert by_block(plan, table) == pytest.approx(mapped([1 - s / sum(signal) for s in signal], 0.3, 0.7), abs=1e-6)
    largest = max(range(5), key=signal.__getitem__)
    assert by_block(plan, table)[largest] == max(by_block(plan, table))


# DSA


def test_dsas_signal_by_hand():
    assert searched_signal(1.0) == pytest.approx(math.asin(math.pi / 4))
    assert searched_signal(1.557) > 1.5
    assert searched_signal(1.558) == 0.0


def test_dsas_variance_is_that_of_the_logarithms_with_zeros_as_ones():
    scores = [torch.tensor([[1.0, math.e]]), torch.tensor([[0.0, math.e**3]])]
    # Logs 0, 1, 0, 3: mean 1, sum of squares 1 + 0 + 1 + 4, over 3.
    assert float(log_variance(scores)) == pytest.approx(2.0, rel=1e-5)


def test_dsa_prunes_varied_blocks_more_and_treats_those_out_of_range_as_the_least_varied(blocks, monkeypatch):
    table = blocks(4)
    variances = [0.5, 1.2, 1.0, 1.9]
    monkeypatch.setattr("sparsify.allocators.dsa.wanda_by_block", lambda *_: variances)
    plan = allocate(DSA(lam=0.1), table, 0.6, FakeContext(table))
    signal = [math.asin(math.atan(v)) if v < math.tan(1) else 0.0 for v in variances]
    assert by_block(plan, table) == pytest.approx(mapped([-s for s in signal], 0.2, 0.6))
    assert min(by_block(plan, table)) == by_block(plan, table)[3]


def test_dsa_refuses_a_model_on_which_its_function_says_nothing(blocks, monkeypatch):
    monkeypatch.setattr("sparsify.allocators.dsa.wanda_by_block", lambda *_: [1.6, 2.5, 1.9])
    with pytest.raises(NumericsError, match=r"1\.6 to 2\.5.*1\.557"):
        allocate(DSA(), blocks(3), 0.6, FakeContext(blocks(3)))


# ALS


def test_redundancy_is_one_for_equal_features_and_zero_for_orthogonal_ones():
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    away = y - x @ torch.linalg.lstsq(x, y).solution
    found = redundancy([x, 3 * x, away])
    assert found.tolist()[0] == pytest.approx([1, 1, 0], abs=1e-5)
    by_hand = float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
    assert float(redundancy([x, y])[1, 0]) == pytest.approx(by_hand, rel=1e-5)


def test_independence_by_hand():
    matrix = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]]
    weights = [math.exp(-(sum(row) - 1) / (sum(row) / 3)) for row in matrix]
    means = [sum(weights) / 3, (weights[1] + weights[2]) / 2, weights[2]]
    assert independence(matrix) == pytest.approx([m / max(means) for m in means])


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.72])
def test_the_program_keeps_the_most_weighted_share(wanted):
    weights, numels, low, high = [0.2, 1.0, 0.5, 0.7], [10, 20, 10, 20], wanted - 0.2, wanted + 0.2
    found = solve_program(weights, numels, wanted, low, high)

    def kept(sparsities):
        return sum(w * (1 - s) for w, s in zip(weights, sparsities, strict=True))

    best = 0.0
    for free in range(4):  # every vertex of the feasible set has at most one value off its bounds
        for ends in itertools.product((low, high), repeat=3):
            rest = iter(ends)
            others = [next(rest) if i != free else 0.0 for i in range(4)]
            value = (wanted * 60 - sum(s * n for s, n in zip(others, numels, strict=True))) / numels[free]
            if low - 1e-9 <= value <= high + 1e-9:
                best = max(best, kept([value if i == free else s for i, s in enumerate(others)]))
    assert kept(found) == pytest.approx(best)
    assert sum(s * n for s, n in zip(found, numels, strict=True)) / 60 == pytest.approx(wanted)


def test_als_keeps_blocks_that_say_something_of_their_own(blocks):
    table = blocks(4)
    context = FakeContext(table)
    shared = torch.randn(2, 9, 6)
    context.features = [torch.randn(2, 9, 6), shared, 5 * shared, shared]
    plan = allocate(ALS(), table, 0.5, context)
    assert by_block(plan, table)[0] == pytest.approx(0.3)
    assert sorted(by_block(plan, table)) == pytest.approx([0.3, 0.3, 0.7, 0.7])
    assert mean_of(plan, table) == pytest.approx(0.5, abs=1e-12)


# NeuronAL


def test_the_schedule_is_linear_over_depth(blocks):
    table = blocks(5)
    assert by_block(schedule(table, 0.1, 0.7).fitted(table, 0.7), table) == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8])


def test_the_grid_is_the_releases_and_stays_legal():
    assert legal_grid(0.7) == list(GRID)
    assert legal_grid(0.8) == list(GRID[:-1])
    assert legal_grid(0.0) == [0.0]


@pytest.fixture
def moving(monkeypatch):
    """Say what pruning by a plan does to the input norms."""
    return lambda moved: monkeypatch.setattr(neuronal, "input_norms", lambda context, plan, windows: moved(plan))


def test_the_activation_shift_by_hand(blocks, moving):
    table = blocks(1)
    before, after = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])
    moving(lambda plan: [(before, after), (before, 2 * before)])
    # (1/4, 3/4) - (1/2, 1/2) has norm sqrt(2) / 4, over two entries; a mere change of scale costs nothing.
    plan = schedule(table, 0.0, 0.5).fitted(table, 0.5)
    assert activation_shift(FakeContext(table), plan, 8) == pytest.approx(math.sqrt(2) / 8)


def test_neuronal_picks_the_schedule_that_moves_the_activations_least(blocks, moving):
    table = blocks(4)
    context = FakeContext(table)

    def moved(plan):
        values = by_block(plan, table)
        gap = abs((values[-1] - values[0]) / 2 - 0.12)
        yield torch.tensor([1.0, 1.0]), torch.tensor([1.0 + gap, 1.0])

    moving(moved)
    plan = allocate(NeuronAL(), table, 0.6, context)
    assert plan.notes["lam"] == 0.12
    assert [t["lam"] for t in plan.trials] == list(GRID)
    assert by_block(plan, table) == pytest.approx([0.48, 0.56, 0.64, 0.72])
    assert by_block(allocate(NeuronAL(lam=0.12), table, 0.6, context), table) == by_block(plan, table)


def test_the_input_norms_are_those_around_pruning_and_the_model_is_dense_again(make_model, tokens):
    view = BlockView(make_model())
    dense = view.snapshot()
    plan = schedule(view.table, 0.2, 0.5).fitted(view.table, 0.5)
    context = Context(view, as_inputs(tokens), pruner=Wanda())
    norms = dict(zip((x.name for x in view.table), neuronal.input_norms(context, plan, 3), strict=True))
    assert all(torch.equal(layer.weight, dense[layer.spec.name]) for layer in view.layers)
    walk = Walk(view, tokens[:3])
    for block in range(2):
        before = walk.observe(block, frozenset({NORM}))
        for layer in view.layers_of(block):
            name = layer.spec.name
            layer.write(Wanda().prune(layer.weight, before[name], plan.targets[name]).weight)
        after = walk.observe(block, frozenset({NORM}), advance=True)
        for layer in view.layers_of(block):
            torch.testing.assert_close(norms[layer.spec.name][0], before[layer.spec.name].norm)
            torch.testing.assert_close(norms[layer.spec.name][1], after[layer.spec.name].norm)
    moved = [name for name, (a, b) in norms.items() if not torch.equal(a, b)]
    assert {name.rsplit(".", 1)[-1] for name in moved} >= {"o_proj", "down_proj"}
    view.restore(dense)


def test_trials_need_a_pruner(make_model, tokens):
    view = BlockView(make_model())
    plan = schedule(view.table, 0.1, 0.5).fitted(view.table, 0.5)
    with pytest.raises(UsageError, match="pruner"):
        list(neuronal.input_norms(Context(view, as_inputs(tokens)), plan, 2))


# LSA


def naive_error(row, gram, share, group):
    """Remove inputs one by one, each time the one after which ||(w - w') X||^2 is smallest."""
    gone, width = [], len(row)
    for start in range(0, width, group):
        here = range(start, min(start + group, width))
        for _ in range(int(len(here) * share)):
            options = [j for j in here if j not in gone]
            gone.append(min(options, key=lambda j: removal_error(row, gram, [*gone, j])))
    return removal_error(row, gram, gone)


def removal_error(row, gram, gone):
    return sum(row[i] * row[j] * gram[i][j] for i in gone for j in gone)


@pytest.mark.parametrize("group", [4, 6, 11, 64])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_error_is_that_of_greedy_removal(share, group):
    weight, x = torch.randn(5, 11), torch.randn(30, 11)
    gram = x.T @ x
    rows = [naive_error(row, gram.double().tolist(), share, group) for row in weight.double().tolist()]
    assert float(minimal_error(weight, gram, share, group)) == pytest.approx(sum(rows), rel=1e-4)


def test_greedy_removal_loses_less_than_removal_by_wanda_score():
    weight, x = torch.randn(20, 16), torch.randn(50, 16) @ torch.randn(16, 16)
    order = (weight.abs() * x.norm(dim=0)).argsort(dim=1)
    pruned = weight.scatter(1, order[:, :8], 0.0)
    by_wanda = float(((weight - pruned) @ x.T).square().sum())
    assert float(minimal_error(weight, x.T @ x, 0.5, 16)) < by_wanda


def test_lsa_prunes_blocks_with_a_large_error_more(blocks):
    table = blocks(4)
    context = FakeContext(table)
    stats = context.stats(frozenset({GRAM}))
    errors = [
        sum(
            naive_error(row, stats[x.name].gram.double().tolist(), 0.5, 4)
            for x in table
            if x.block == block
            for row in context.tensors[x.name].double().tolist()
        )
        / 2
        for block in range(4)
    ]
    plan = allocate(LSA(group=4), table, 0.7, context)
    assert plan.notes["reconstruction_error"] == pytest.approx(errors, rel=1e-4)
    expected = mapped([1 - e / sum(errors) for e in errors], 0.3, 0.7)
    assert by_block(plan, table) == pytest.approx(expected, abs=1e-4)


def test_layers_that_share_an_input_cost_what_they_cost_apart(make_table):
    table = make_table([(3, 6), (5, 6)])
    context = FakeContext(table)
    one = context.stats(frozenset({GRAM}))["blocks.0.layer0"]
    context.stats_by_block = lambda needs: iter([dict.fromkeys((x.name for x in table), one)])
    plan = allocate(LSA(group=4), table, 0.5, context)
    apart = [float(minimal_error(w, one.gram, 0.5, 4)) for w in context.tensors.values()]
    assert plan.notes["reconstruction_error"] == pytest.approx([sum(apart) / 2])


@pytest.mark.parametrize(
    ("wanted", "beta"), [(0.05, 0.06), (0.5, 0.04), (0.6, 0.1), (0.7, 0.15), (0.79, 0.15), (0.95, 0.12)]
)
def test_lsas_beta_is_the_releases_for_the_sparsity(wanted, beta):
    assert released_beta(wanted) == beta


# All of them

EVERY = [Global(), Global("magnitude"), LAMP(), ErdosRenyi(), ErdosRenyiPlus(), DLP(), DSA(), ALS(), NeuronAL(), LSA()]


@pytest.mark.parametrize("allocator", EVERY, ids=repr)
@pytest.mark.parametrize("wanted", [0.0, 0.02, 0.3, 0.7, 0.95])
def test_every_baseline_covers_every_layer_and_meets_the_budget(allocator, wanted, make_table, moving):
    table = make_table(*([[(12, 8), (6, 12)]] * 24), [(3, 8), (6, 3)])
    context = FakeContext(table, weight=spread(0.1))
    moving(lambda plan: [(torch.ones(3), torch.ones(3))])
    if isinstance(allocator, DSA):  # Gaussian weights are too varied for its function
        context.tensors = {name: w.sign() * (1 + torch.rand_like(w)) for name, w in context.tensors.items()}
    plan = allocate(allocator, table, wanted, context)
    assert list(plan.targets) == [x.name for x in table]
    assert mean_of(plan, table) == pytest.approx(wanted, abs=1e-9)
    assert plan.ledger.wanted == wanted
    assert all(0 <= s <= 1 for s in plan.sparsities().values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DLP, {"alpha": 0.5}),
        (DSA, {"lam": -0.1}),
        (ALS, {"reach": -0.1}),
        (ALS, {"windows": 0}),
        (NeuronAL, {"lam": 0.6}),
        (NeuronAL, {"lam": math.nan}),
        (NeuronAL, {"windows": 0}),
        (LSA, {"beta": 0.5}),
        (LSA, {"share": 0.0}),
        (LSA, {"group": 1}),
    ],
)
def test_baselines_refuse_bad_hyper_parameters(kind, options):
    with pytest.raises(UsageError):
        kind(**options)


def test_the_mapping_written_out_here_is_the_shared_one():
    assert outlier_mapping([1.0, 4.0, 2.0], 0.3, 0.7) == pytest.approx(mapped([1.0, 4.0, 2.0], 0.3, 0.7))


# Published hyper-parameters


def composed(*overrides):
    from hydra import compose, initialize_config_dir

    from sparsify import paths

    with initialize_config_dir(str(paths.configs()), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=llama-13b", "allocator=owl"], {"M": 7.0, "lam": 0.08}),
        (["model=opt-6.7b", "allocator=owl"], {"M": 10.0, "lam": 0.08}),
        (["model=smollm2-135m", "allocator=owl"], {"M": 5.0, "lam": 0.08}),
        (["model=llama-13b", "allocator=owl", "allocator.M=3.0"], {"M": 3.0, "lam": 0.08}),
        (["model=llama2-7b", "allocator=alphapruning", "pruner=magnitude"], {"tau": 0.5}),
        (["model=llama2-7b", "allocator=alphapruning", "pruner=sparsegpt"], {"tau": 0.2}),
        (["model=llama2-7b", "allocator=alphapruning", "pruner=ria"], {"tau": 0.3}),
        (["model=smollm2-135m", "allocator=alphapruning"], {"tau": 0.3}),
    ],
)
def test_owl_and_alphapruning_take_the_settings_published_for_a_model(overrides, expected):
    from sparsify.runs import registry

    config = composed(*overrides)
    assert {key: config.allocator[key] for key in expected} == expected
    built = registry.make(config.allocator)
    assert {key: getattr(built, key) for key in expected} == expected


def test_alone_an_allocator_has_its_own_defaults():
    from sparsify.runs import registry

    assert registry.build("allocator", "owl").M == 5.0
    assert registry.build("allocator", ("alphapruning", {"clip": False})).tau == 0.3


def test_what_is_published_moves_a_runs_identity_only_by_the_values_it_gives():
    from sparsify.runs import identity

    config = composed("model=llama2-7b", "allocator=owl", "calibration.text.path=README.md")
    tree = identity.science(identity.plain(config))
    assert "published" not in tree["model"]
    assert tree["allocator"]["M"] == 5.0
