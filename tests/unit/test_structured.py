"""The method that removes heads and channels: which go, how many, what is said of it, and what it is refused with."""

import copy
import json

import pytest
import torch
from families import FAMILIES, VOCABULARY

import sparsify
from sparsify.data.inputs import as_inputs
from sparsify.errors import BudgetError, NumericsError, PatternError, UnsupportedModelError, UsageError
from sparsify.methods.structured import Structured
from sparsify.methods.tuning import FullFineTuning, LoRA, MaskedLoRA
from sparsify.model.blocks import BlockView
from sparsify.model.coupled import coupled_of
from sparsify.model.objective import NextToken
from sparsify.model.removal import silence
from sparsify.pruners.taylor import importances, most_important
from sparsify.recovery.schedule import Schedule

TOKENS = torch.randint(3, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(2))


def prune(model, sparsity=0.4, method="structured", **options):
    return sparsify.prune(model, TOKENS, method=method, sparsity=sparsity, batch_size=2, **options)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def uneven(make_model, **options):
    """Blocks that differ in what their weights are worth."""
    model = make_model(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, **options)
    for i, block in enumerate(model.model.layers):
        for weight in block.parameters():
            weight.data *= 1 + i / 4 if weight.ndim == 2 else 1
    return model


@pytest.mark.parametrize("allocator", ["uniform", ("owl", {"M": 2.0}), ("atp", {"beta": 0.1}), "lamp", "er"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_the_least_important_units_go_and_the_rest_computes_as_before(family, allocator):
    model = FAMILIES[family].build()
    dense = copy.deepcopy(model)
    result = prune(model, allocator=allocator)
    view = BlockView(dense)
    groups = coupled_of(view)
    values = importances(view, groups, as_inputs(TOKENS), NextToken(), batch_size=2)
    left = [n for pair in zip(result.notes["heads"], result.notes["channels"], strict=True) for n in pair]
    for group, importance, count in zip(groups, values, left, strict=True):
        kept = set(most_important(importance, count))
        silence(group, [i for i in range(group.count) if i not in kept])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.65])
@pytest.mark.parametrize("allocator", ["uniform", ("owl", {"M": 2.0}), ("atp", {"beta": 0.03}), "lamp", "er", "als"])
def test_the_budget_is_met_to_within_half_a_channel(make_model, allocator, sparsity):
    model = uneven(make_model)
    numel = BlockView(model).numel
    result = prune(model, sparsity, allocator=allocator)
    gone = numel - BlockView(model).numel
    assert result.sparsity == gone / numel
    assert abs(gone - sparsity * numel) <= 3 * 32 / 2
    assert result.plan.ledger.wanted == sparsity
    assert result.plan.ledger.rounded == pytest.approx(result.sparsity, abs=1e-12)
    assert min(result.notes["heads"]) >= 1
    assert min(result.notes["channels"]) >= 1


def test_a_row_says_of_every_matrix_what_it_lost(make_model):
    model = uneven(make_model)
    dense = {layer.spec.name: layer.weight.clone() for layer in BlockView(model).layers}
    result = prune(model, allocator=("atp", {"beta": 0.1}))
    assert sum(row.zeros for row in result.layers) / sum(row.numel for row in result.layers) == result.sparsity
    for row, layer in zip(result.layers, BlockView(model).layers, strict=True):
        before, after = dense[row.name], layer.weight
        assert (row.name, row.numel) == (layer.spec.name, before.numel())
        assert row.zeros == before.numel() - after.numel()
        assert row.notes["shape"] == list(after.shape)
        assert row.achieved == pytest.approx(row.target) == pytest.approx(result.plan.targets[row.name].sparsity)
        assert row.error**2 == pytest.approx(1 - float(after.square().sum() / before.square().sum()), abs=1e-5)


def test_the_notes_have_units_by_block_and_parameters_before_and_after(make_model):
    model = make_model()
    before = sum(p.numel() for p in model.parameters())
    result = prune(model, 0.5)
    notes = result.notes
    assert (notes["heads_before"], notes["channels_before"]) == ([2, 2], [48, 48])
    assert (notes["heads"], notes["channels"]) == ([1, 1], [24, 24])
    assert notes["parameters_before"] == before
    assert notes["parameters_after"] == sum(p.numel() for p in model.parameters()) < before
    assert "own_format" not in notes
    assert not result.masks
    json.dumps(dict(notes), allow_nan=False)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 24)
    assert config.head_dim == 8


def test_zeros_that_a_model_had_before_are_not_counted_as_removed(make_model):
    model = make_model()
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[::2, ::2] = 0
    result = prune(model, 0.5)
    assert result.sparsity == 0.5
    assert sum(row.zeros for row in result.layers) == BlockView(make_model()).numel / 2


def test_blocks_that_differ_say_so_and_keep_the_sizes_of_the_dense_model_in_the_config(make_model):
    model = make_model()
    notes = prune(model, 0.5, allocator=("atp", {"beta": 0.2})).notes
    assert notes["own_format"] == "its blocks differ in size"
    assert model.config.intermediate_size == 48
    sizes = model.config.block_sizes
    assert [sizes[str(i)]["intermediate_size"] for i in range(2)] == notes["channels"]
    assert [sizes[str(i)]["num_key_value_heads"] for i in range(2)] == notes["heads"]


def test_alike_blocks_can_be_asked_for(make_model):
    exact, alike = prune(make_model(), 0.37), prune(make_model(), 0.37, ("structured", {"alike": True}))
    assert len(set(exact.notes["channels"])) == 2
    assert len(set(alike.notes["channels"])) == 1
    assert alike.sparsity == pytest.approx(0.37, abs=2 * 48 / BlockView(make_model()).numel)


def test_blocks_at_both_ends_are_spared_and_the_others_lose_more(make_model):
    model = make_model(num_hidden_layers=5)
    method = ("structured", {"spare_first": 2, "spare_last": 1})
    result = prune(model, 0.3, method)
    assert result.sparsity == pytest.approx(0.3, abs=1e-2)
    assert [n < 48 for n in result.notes["channels"]] == [False, False, True, True, False]
    assert result.plan.ledger.wanted == 0.3


def test_a_search_tries_plans_by_removing_units(make_model):
    model, best = uneven(make_model), uneven(make_model)
    heldout = TOKENS[:2]
    result = prune(model, allocator=("atp", {"step": 0.1}), heldout=heldout)
    scores = {trial["beta"]: trial["heldout_perplexity"] for trial in result.plan.trials}
    finite = {beta: score for beta, score in scores.items() if score is not None}
    assert len(finite) > 1
    assert result.plan.notes["beta"] == min(finite, key=finite.get)
    prune(best, allocator=("atp", {"beta": result.plan.notes["beta"]}))
    assert sparsify.perplexity(best, heldout) == pytest.approx(min(finite.values()))
    assert torch.equal(logits(best), logits(model))


def test_a_plan_that_a_search_cannot_have_is_a_trial_without_a_score(make_model):
    result = prune(uneven(make_model), 0.6, allocator=("atp", {"step": 0.26}), heldout=TOKENS[:2])
    assert [trial["heldout_perplexity"] is None for trial in result.plan.trials] == [False, True]


def test_sparsity_zero_changes_nothing(make_model):
    model, dense = make_model(), make_model()
    assert prune(model, 0.0).sparsity == 0
    assert str(model.config) == str(dense.config)
    assert torch.equal(logits(model), logits(dense))


def test_dtype_flags_and_mode_stay(make_model):
    model = make_model().to(torch.bfloat16).train().requires_grad_(False)
    prune(model)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_half_precision_scales_its_loss(make_model):
    model = make_model().to(torch.float16)
    assert prune(model).sparsity == pytest.approx(0.4, abs=1e-2)


@pytest.mark.parametrize("stage", [LoRA, MaskedLoRA, FullFineTuning])
def test_a_recovery_trains_the_smaller_model(make_model, stage):
    model, untrained = make_model(), make_model()
    prune(untrained)
    recovery = stage(schedule=Schedule(batch=2, rate=1e-2, warmup=0.0), training=TOKENS)
    result = prune(model, recovery=recovery)
    assert result.sparsity == pytest.approx(0.4, abs=1e-2)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in untrained.named_parameters()}
    assert not torch.equal(logits(model), logits(untrained))
    assert result.notes["recovery.loss"]


@pytest.mark.parametrize("order", ["element", "vector"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_every_importance_is_a_choice(make_model, order, reduction):
    result = prune(make_model(), method=("structured", {"order": order, "reduction": reduction}))
    assert result.sparsity == pytest.approx(0.4, abs=1e-2)


def unchanged(model, dense):
    return str(model.config) == str(dense.config) and torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"pattern": "2:4", "sparsity": 0.5}, PatternError, r"whole heads and channels.*pattern=2:4.*method=oneshot"),
        ({"pattern": "mixed:8"}, PatternError, "pattern=mixed:8"),
        (
            {"sparsity": 0.9},
            BudgetError,
            r"One head and one channel stay.*sparsity=0\.9.*at most 0\.787500: 12,096 of 15,360.*=0\.787",
        ),
        ({"allocator": ("atp", {"beta": 0.8})}, BudgetError, r"block 1 .*sparsity 0\.8\d* of its.*47 of 48 channels"),
        ({"method": Structured(spare_first=1, spare_last=1)}, UsageError, "Every block is left whole.*2 blocks"),
        ({"method": Structured(spare_first=1), "allocator": "owl"}, UsageError, "spare_first=1.*with OWL.*uniform"),
        ({"method": ("structured", {"order": "vectr"})}, UsageError, "order.*Fix: .*=vector"),
        ({"method": ("structured", {"reduction": 3})}, UsageError, "reduction"),
        ({"method": ("structured", {"spare_first": -1})}, UsageError, "spare_first is a whole number"),
        ({"recovery": LoRA(schedule=Schedule(distill=0.5), training=TOKENS)}, UsageError, "cannot distil.*distill=0.5"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(make_model, options, kind, said):
    model = make_model()
    with pytest.raises(kind, match=said):
        prune(model, **options)
    assert unchanged(model, make_model())


def test_an_impossible_plan_is_refused_before_a_gradient_is_taken(make_model, monkeypatch):
    monkeypatch.setattr("sparsify.methods.structured.importances", None)
    with pytest.raises(BudgetError, match="leaves block 1 less than one head"):
        prune(make_model(), allocator=("atp", {"beta": 0.8}))


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_a_family_that_cannot_be_cut_is_refused_before_anything_is_done(family):
    model = FAMILIES[family].build()
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=r"queries, keys and values are one matrix.*method=oneshot"):
        prune(model)
    assert torch.equal(logits(model), before)


def test_a_gradient_that_is_not_finite_names_its_layer(make_model, monkeypatch):
    model = make_model()
    own = torch.Tensor.isfinite
    monkeypatch.setattr("torch.isfinite", lambda x: torch.zeros_like(own(x)) if x.shape == (32, 48) else own(x))
    view = BlockView(model)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj is not finite"):
        importances(view, coupled_of(view), as_inputs(TOKENS), NextToken())


def test_error_growth_of_a_smaller_model_is_refused(make_model):
    from sparsify.analysis.error_growth import error_growth

    view = BlockView(make_model())
    dense = view.snapshot()
    prune(view.model)
    view.refresh()
    with pytest.raises(UnsupportedModelError, match="dense weights do not fit"):
        error_growth(view, dense, TOKENS)
