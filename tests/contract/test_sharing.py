"""Blocks that hand each other more than hidden states: keys and values that late blocks share (Gemma 4)."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparsify
from sparsify.analysis.drift import drift
from sparsify.analysis.error_growth import error_growth
from sparsify.analysis.perturbation import Noise
from sparsify.errors import UnsupportedModelError
from sparsify.model.blocks import BlockView
from sparsify.model.walk import Walk

TOKENS = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(0, 0.15)
    return model


@torch.no_grad()
def outputs(model):
    seen = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for block in BlockView(model).blocks
    ]
    model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_every_batch_has_keys_and_values_of_its_own(model, batch_size):
    walk = Walk(BlockView(model), TOKENS, batch_size)
    assert walk.stateful
    for block, there in enumerate(outputs(model)):
        walk.advance(block)
        torch.testing.assert_close(walk.hidden, there, rtol=1e-4, atol=1e-4)


def test_walks_side_by_side_do_not_read_each_others(model):
    dense, pruned = BlockView(model).snapshot(), model
    clean = outputs(model)
    sparsify.prune(pruned, TOKENS, pruner="magnitude", sparsity=0.5)
    by_hooks = [float((a - b).square().sum(-1).mean()) for a, b in zip(clean, outputs(pruned), strict=True)]
    growth = error_growth(BlockView(pruned), dense, TOKENS, batch_size=2)
    assert growth.absolute.mean(1).tolist() == pytest.approx(by_hooks, rel=1e-4)


def test_what_cannot_be_followed_is_refused_in_a_sentence(model):
    with pytest.raises(UnsupportedModelError, match="hand each other keys and values"):
        drift(BlockView(model), TOKENS, Noise(0.1))


def test_a_block_that_reads_what_no_argument_shows_is_refused(make_model):
    model = copy.deepcopy(make_model())
    inner = model.model
    before = inner.forward

    def forward(*args, **kwargs):
        for block in inner.layers:
            block.scale = 2.0
        try:
            return before(*args, **kwargs)
        finally:
            for block in inner.layers:
                block.scale = 1.0

    for block in inner.layers:
        block.scale = 1.0
        block.register_forward_hook(lambda module, _args, out: out * module.scale)
    inner.forward = forward
    with pytest.raises(UnsupportedModelError, match="called one by one, do not give what the model gives"):
        sparsify.prune(model, TOKENS, sparsity=0.5)
