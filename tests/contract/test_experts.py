"""Mixtures of experts: each expert is a matrix with the statistics of the tokens that are routed to it."""

import pytest
import torch
from families import MIXTURES
from torch import nn

import sparsify
from sparsify.errors import UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import NORM
from sparsify.model.walk import Walk

TOKENS = torch.randint(3, 90, (5, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MIXTURES)
def model(request):
    return MIXTURES[request.param].build()


def experts_of(view):
    return [layer for layer in view.layers if layer.expert is not None]


def test_every_expert_is_a_layer_and_no_router_is(model):
    view = BlockView(model)
    assert len(experts_of(view)) == len(view.blocks) * 4 * 2
    assert {matrix.reason for matrix in view.skipped} == {"router"}
    assert len(view.skipped) == len(view.blocks)
    pruned = sum(layer.spec.numel for layer in view.layers) + sum(matrix.numel for matrix in view.skipped)
    assert pruned == sum(p.numel() for block in view.blocks for p in block.parameters() if p.ndim > 1)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_expert_has_the_norm_of_the_tokens_that_are_routed_to_it(model, batch_size):
    view = BlockView(model)
    block = view.blocks[0]
    router, experts = block.mlp.gate, block.mlp.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    model(TOKENS, use_cache=False)
    handle.remove()
    hidden, chosen, _ = seen[0]
    stats = Walk(view, TOKENS, batch_size).observe(0, frozenset({NORM}))
    for layer in experts_of(view):
        if layer.spec.block == 0 and layer.parameter == "gate_up_proj":
            routed = hidden[(chosen == layer.expert).any(-1)]
            norm = stats[layer.spec.name].norm
            cosine = torch.nn.functional.cosine_similarity(norm, routed.norm(dim=0), dim=0)
            assert cosine > 0.9999  # up to the number of batches that the mean is over
    assert router.weight.ndim == 2


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocator", ["uniform", "owl", ("equimarginal", {"steps": 2, "settle_every": 1})])
def test_the_budget_is_met_over_all_matrices(model, pruner, allocator):
    view = BlockView(model)
    routers = [block.mlp.gate.weight.clone() for block in view.blocks]
    result = sparsify.prune(model, TOKENS, pruner=pruner, allocator=allocator, sparsity=0.5, heldout=TOKENS[:2])
    zeros = sum(int((layer.weight == 0).sum()) for layer in view.layers)
    assert result.sparsity == pytest.approx(zeros / view.table.numel)
    assert result.sparsity == pytest.approx(0.5, abs=0.04)  # rows of 16 to 48 weights, rounded
    assert all(torch.equal(a, b.mlp.gate.weight) for a, b in zip(routers, view.blocks, strict=True))
    assert {matrix.reason for matrix in result.skipped} == {"router"}


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named():
    model = MIXTURES["mixtral"].build()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[0] = 0  # its logit is zero: below two of the three others, for most tokens
            block.mlp.gate.weight[1:] = block.mlp.gate.weight[1:].abs() * 50
    tokens = TOKENS[:1, :2]
    result = sparsify.prune(model, tokens, pruner="wanda", sparsity=0.5)
    unseen = [row.name for row in result.layers if "unseen" in row.notes]
    assert unseen
    assert all(".experts." in name for name in unseen)
    assert all(row.achieved == pytest.approx(0.5, abs=0.02) for row in result.layers if row.name in unseen)


def test_a_linear_that_is_never_called_is_refused_by_name(make_model):
    model = make_model()

    class Direct(nn.Linear):
        """Handed to a kernel as it is."""

    mlp = model.model.layers[1].mlp
    mlp.spare = Direct(32, 32, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"read without the layer being called.*layers\.1\.mlp\.spare"):
        sparsify.prune(model, TOKENS, sparsity=0.5)


def test_other_layouts_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "dbrx",
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    )
    with pytest.raises(UnsupportedModelError, match="layout"):
        BlockView(AutoModelForCausalLM.from_config(config))
