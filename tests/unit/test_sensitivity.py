"""Damage of pruning one unit alone, against pruning it by hand; and what a table makes of it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import state_of
from families import FAMILIES, MIXTURES
from scipy import stats

import sparsify
from sparsify.allocators.base import allocate
from sparsify.allocators.context import Context
from sparsify.allocators.fisher import FisherRanks, thirds
from sparsify.analysis.fisher import fisher_traces
from sparsify.analysis.sensitivity import pruning_damage
from sparsify.analysis.units import aggregated, check_groups, check_measure, units
from sparsify.data.corpora import Corpus
from sparsify.data.inputs import TokenInputs
from sparsify.data.windows import Windows
from sparsify.errors import NumericsError, PatternError, UsageError
from sparsify.evaluation.absorption import AbsorptionCurves
from sparsify.evaluation.base import Evaluator, Subject
from sparsify.evaluation.sensitivity import FisherTraces, MarginalCosts, PruningDamage
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken
from sparsify.model.statistics import NORM
from sparsify.model.walk import Walk
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.wanda import Wanda, wanda_scores
from sparsify.report import frame, layouts
from sparsify.report.correlation import RankCorrelation, spearman
from sparsify.report.layouts import sensitivity as report
from sparsify.types import Pattern, Target

HALF = Target(0.5)


@pytest.fixture
def text():
    return TokenInputs(torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(7)))


def losses(model, text):
    with torch.no_grad():
        return torch.tensor([float(model(w[None], labels=w[None]).loss) for w in text.tokens], dtype=torch.float64)


def everywhere(view, target=HALF):
    return {layer.spec.name: target for layer in view.layers}


@pytest.mark.parametrize("groups", ["block", "layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_damage_is_the_rise_of_the_loss_with_that_unit_zeroed_by_hand(family, groups, tokens, text):
    model = (FAMILIES | MIXTURES)[family].build()
    view = BlockView(model)
    dense, before = view.snapshot(), state_of(model)
    found = pruning_damage(view, TokenInputs(tokens), text, Magnitude("row"), everywhere(view), groups=groups)
    assert not dense.changed()
    assert state_of(model) == before
    clean = losses(model, text)
    every = units(view.table, groups)
    assert found.shape == (len(every), 2)
    for unit, damage in zip(every, found, strict=True):
        for layer in view.layers:
            if layer.spec.name in unit:
                w = layer.weight
                least = w.abs().argsort(dim=1, stable=True)[:, : w.shape[1] // 2]
                layer.write(w.scatter(1, least, 0.0))
        torch.testing.assert_close(damage, losses(model, text) - clean, rtol=1e-3, atol=1e-4)
        view.restore(dense)


def test_statistics_are_those_of_the_dense_model(make_model, tokens, text):
    model = make_model(num_hidden_layers=3)
    view = BlockView(model)
    found = pruning_damage(view, TokenInputs(tokens), text, Wanda(), everywhere(view), batch_size=2)
    assert torch.equal(found, pruning_damage(view, TokenInputs(tokens), text, Wanda(), everywhere(view), batch_size=2))
    walk, clean = Walk(view, tokens, 5), losses(model, text)
    observed = [walk.observe(block, frozenset({NORM}), advance=True) for block in range(3)]
    dense = view.snapshot()
    for block in range(3):
        for layer in view.layers_of(block):
            scores = wanda_scores(layer.weight, observed[block][layer.spec.name].norm)
            least = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
            layer.write(layer.weight.scatter(1, least, 0.0))
        torch.testing.assert_close(found[block], losses(model, text) - clean, rtol=1e-3, atol=1e-4)
        view.restore(dense)


def test_a_pattern_is_pruned_as_a_pattern(make_model, tokens, text):
    view = BlockView(make_model())
    spy = []

    class Spy(Magnitude):
        def prune(self, weight, stats, target):
            pruned = super().prune(weight, stats, target)
            spy.append((pruned.weight.reshape(-1, 8) != 0).sum(1))
            return pruned

    pruning_damage(view, TokenInputs(tokens), text, Spy(), everywhere(view, Target(0.75, 2, 8)))
    assert len(spy) == len(view.layers)
    assert all(bool((kept == 2).all()) for kept in spy)


def test_a_unit_that_breaks_the_loss_is_named(make_model, tokens, text):
    view = BlockView(make_model())

    class Breaks(Magnitude):
        def prune(
            self, weight, stats, target
        ):  # attention on some CPUs makes zeros of queries and keys that are no numbers
            pruned = super().prune(weight, stats, target)
            return type(pruned)(pruned.weight * float("nan"), pruned.keep)

    before = state_of(view.model)
    with pytest.raises(NumericsError, match=r"only model\.layers\.0\.self_attn\.[qkv]_proj pruned is not finite"):
        pruning_damage(view, TokenInputs(tokens), text, Breaks(), everywhere(view), groups="layer")
    assert state_of(view.model) == before
    assert all(bool(torch.isfinite(layer.weight).all()) for layer in view.layers)


def test_units_add_up(unequal):
    sums = {layer.name: float(i + 1) for i, layer in enumerate(unequal)}
    assert units(unequal) == [["blocks.0.layer0"], ["blocks.1.layer0", "blocks.1.layer1"], ["blocks.2.layer0"]]
    assert aggregated(sums, unequal) == [1.0, 5.0, 4.0]
    assert aggregated(sums, unequal, "block", "mean") == pytest.approx([1 / 72, 5 / 58, 4 / 80])
    assert aggregated(sums, unequal, "layer", "mean") == pytest.approx([1 / 72, 2 / 18, 3 / 40, 4 / 80])


# The allocator.


def test_the_most_and_the_least_sensitive_third_move_by_a_level(make_model, tokens):
    view = BlockView(make_model(num_hidden_layers=6))
    context = Context(view, TokenInputs(tokens), pattern=Pattern.parse("mixed:8"))
    plan = allocate(FisherRanks(), view.table, 0.5, context, context.pattern)
    traces = aggregated(fisher_traces(view, TokenInputs(tokens), NextToken()), view.table)
    assert plan.notes["fisher_trace"] == traces
    order = np.argsort(traces).tolist()
    kept = [plan.targets[view.layers_of(block)[0].spec.name].kept for block in order]
    assert kept == [3, 3, 4, 4, 5, 5]
    loose = allocate(FisherRanks(step=0.1), view.table, 0.5, Context(view, TokenInputs(tokens)))
    sparsity = [loose.targets[view.layers_of(block)[0].spec.name].sparsity for block in order]
    assert sparsity == pytest.approx([0.6, 0.6, 0.5, 0.5, 0.4, 0.4])


def test_matrices_rank_by_trace_or_by_trace_per_weight(make_model, tokens):
    view, inputs = BlockView(make_model()), TokenInputs(tokens)
    traces = fisher_traces(view, inputs.take(slice(0, 2)), NextToken())
    for measure in ("sum", "mean"):
        rule = FisherRanks(groups="layer", measure=measure, windows=2)
        profile = rule.profile(view.table, 0.5, Context(view, inputs))
        value = {x.name: traces[x.name] / (x.numel if measure == "mean" else 1) for x in view.table}
        order = sorted(value, key=lambda name: value[name])
        moved = [round(profile.values[name] - 0.5, 6) for name in order]
        assert moved == [0.05] * 5 + [0.0] * 4 + [-0.05] * 5


def test_traces_are_taken_once_for_all_budgets(make_model, tokens, monkeypatch):
    view, taken = BlockView(make_model()), []
    real = fisher_traces
    monkeypatch.setattr("sparsify.allocators.fisher.fisher_traces", lambda *a: taken.append(len(a[1])) or real(*a))
    context = Context(view, TokenInputs(tokens))
    for sparsity in (0.3, 0.6):
        allocate(FisherRanks(), view.table, sparsity, context)
    allocate(FisherRanks(windows=3), view.table, 0.6, context)
    assert taken == [5, 3]


def test_thirds_are_rounded_and_ties_go_by_place():
    assert thirds([5.0, 1.0, 3.0]) == [1, -1, 0]
    assert thirds([1.0, 2.0]) == [-1, 1]
    assert thirds([1.0]) == [0]
    assert thirds([2.0, 2.0, 2.0, 2.0, 2.0]) == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": 0.5}, {"windows": 0}], ids=str)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        FisherRanks(**options)


def test_unknown_words_are_refused_with_those_there_are():
    with pytest.raises(UsageError, match="block, layer"):
        check_groups("rows")
    with pytest.raises(UsageError, match=r"sum .*, mean"):
        check_measure("max")


# The evaluations and the table.

CORPUS = Corpus("noise", path=".")
WINDOWS = Windows(CORPUS, "train", 12, 5)
HELDOUT = Windows(CORPUS, "heldout", 12, 2)


@pytest.fixture
def subject(make_model, tokens, text):
    view = BlockView(make_model(num_hidden_layers=4))
    given = {"train": TokenInputs(tokens), "heldout": text}
    return Subject(view, None, lambda spec: given[spec.split], view.snapshot())


def test_an_evaluation_holds_the_traces(subject, tokens):
    result = FisherTraces(WINDOWS, 3).evaluate(subject)
    view = subject.view
    traces = fisher_traces(view, TokenInputs(tokens[:3]), NextToken())
    more = {item.metric: item.curve for item in result.more}
    assert result.value == pytest.approx(sum(traces.values()))
    assert more["sum"] == pytest.approx(aggregated(traces, view.table))
    assert more["mean.mlp.up_proj"] == pytest.approx(
        [traces[x.name] / x.numel for x in view.table if x.kind == "mlp.up_proj"]
    )


def test_an_evaluation_holds_the_costs_of_equimarginal(subject, tokens):
    result = MarginalCosts(WINDOWS, 0.5).evaluate(subject)
    view, inputs = subject.view, TokenInputs(tokens)
    with Context(view, inputs).proxy(None) as proxy:
        proxy.settle({layer.name: Target(0.5) for layer in view.table})
        costs = proxy.marginal_costs(inputs, 0.04)
    more = {item.metric: item.curve for item in result.more}
    assert more["mean.self_attn.k_proj"] == pytest.approx(
        [costs[x.name] for x in view.table if x.kind == "self_attn.k_proj"]
    )
    assert more["sum"] == pytest.approx(aggregated({x.name: costs[x.name] * x.numel for x in view.table}, view.table))


def test_an_evaluation_holds_the_damage_with_errors_over_windows(subject, tokens, text):
    view = subject.view
    blocks = PruningDamage(WINDOWS, HELDOUT, 0.5).evaluate(subject)
    by_hand = pruning_damage(view, TokenInputs(tokens), text, Wanda(), everywhere(view))
    assert blocks.curve == by_hand.mean(1).tolist()
    assert blocks.curve_stderr == (by_hand.std(1) / 2**0.5).tolist()
    assert blocks.value == pytest.approx(float(by_hand.mean()))
    layers = PruningDamage(WINDOWS, HELDOUT, 0.75, "2:8", groups="layer", limit=1).evaluate(subject)
    assert {item.metric for item in layers.more} == {layer.kind for layer in view.table}
    assert all(len(item.curve) == 4 and item.curve_stderr is None for item in layers.more)


def test_a_pattern_that_does_not_fit_is_refused(subject):
    with pytest.raises(PatternError, match="M does not divide"):
        PruningDamage(WINDOWS, HELDOUT, 0.5, "16:32").evaluate(subject)
    for options in (
        {"sparsity": 0.5, "pattern": "2:8"},
        {"sparsity": 0.5, "pattern": "mixed:8"},
        {"sparsity": 0.0},
        {"sparsity": 0.5, "limit": 0},
    ):
        with pytest.raises(UsageError):
            PruningDamage(WINDOWS, HELDOUT, **options)


def test_rank_correlation_is_scipys_and_its_interval_holds_it():
    rng = np.random.default_rng(3)
    x = rng.normal(size=25)
    y = np.round(x + rng.normal(size=25))  # with ties
    found = RankCorrelation.of(x.tolist(), y.tolist())
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 <= found.low < found.rho < found.high <= 1
    assert found == RankCorrelation.of(x.tolist(), y.tolist())
    narrow = RankCorrelation.of(np.tile(x, 20).tolist(), np.tile(y, 20).tolist())
    assert narrow.high - narrow.low < (found.high - found.low) / 2
    assert str(RankCorrelation.of([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])) == ""
    assert spearman(np.array([[1.0, 2.0, 3.0]]), np.array([[9.0, 4.0, 1.0]]))[0] == pytest.approx(-1.0)


@pytest.fixture
def cells(subject):
    """What a record of one dense cell becomes."""
    pruned = AbsorptionCurves(WINDOWS, _pruned_block(), limit=2, seeds=1)
    evaluators: dict[str, Evaluator] = {
        "fisher": FisherTraces(WINDOWS),
        "marginal_70": MarginalCosts(WINDOWS, 0.7),
        "pruned_70": pruned,
        "damage_70": PruningDamage(WINDOWS, HELDOUT, 0.7),
        "damage_layers_70": PruningDamage(WINDOWS, HELDOUT, 0.7, groups="layer"),
    }
    wide: dict[str, object] = {"key": "a", "test": 9.0}
    for name, evaluator in evaluators.items():
        result = evaluator.evaluate(subject)
        json.dumps(result.to_json(), allow_nan=False)
        for item in (result, *result.more):
            column = name if item is result else f"{name}.{item.metric}"
            row = frame._measurement(item)
            wide |= {f"{column}.{key}" if key != "value" else column: value for key, value in row.items()}
    return pd.DataFrame([wide])


def _pruned_block():
    from sparsify.analysis.perturbation import PrunedBlock

    return PrunedBlock(Wanda(), 0.7)


def test_the_table_has_the_rank_correlation_of_each_predictor(cells):
    layout = layouts.load("sensitivity")
    measured = report.damages(layout, cells)
    assert [damage.row.damage for damage in measured] == ["damage_70", "damage_layers_70"]
    shown = report.summary(measured, layout.predictors)
    damage, trace = ([float(v) for v in cells.iloc[0][c].split("|")] for c in ("damage_70.curve", "fisher.sum.curve"))
    rho = stats.spearmanr(trace, damage).statistic
    assert shown.loc[("", "block, Wanda 70%"), ("Fisher trace", "")].split()[0] == f"{rho:.2f}"
    assert shown["units", ""].tolist() == ["4", "28"]
    assert shown.loc[("", "matrix, Wanda 70%"), ("absorption r", "")] == ""
    depth = stats.spearmanr(range(4), damage).statistic
    assert shown.loc[("", "block, Wanda 70%"), ("depth", "")].startswith(f"{depth:.2f}")
    ((title, within),) = report.within_kinds(measured, layout.predictors)
    assert "within a kind" in title
    assert len(within) == 7


def test_figures_are_drawn_and_the_same_twice(cells, tmp_path):
    from sparsify.report.layouts.base import Page

    layout = layouts.load("sensitivity")
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        page = Page(cells, cells, "sensitivity", "m_s", layout.title, layout.notes, folder, folder)
        files.append(layout.write(page))
    assert {file.name for file in files[0]} >= {"sensitivity_m_s.md", "scatter_m_s.png", "depth_m_s.pdf"}
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_table_without_damage_says_which_evaluation_to_run(cells):
    with pytest.raises(UsageError, match="eval=sensitivity"):
        report.damages(layouts.load("sensitivity"), cells[["key", "test"]])


def test_the_allocator_prunes_by_name(make_model, tokens):
    result = sparsify.prune(make_model(), tokens, allocator=("fisher", {"windows": 2}), sparsity=0.5)
    assert result.sparsity == pytest.approx(0.5, abs=0.03)
    assert len(result.plan.notes["fisher_trace"]) == 2
