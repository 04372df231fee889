"""What only an accelerator can show."""

import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES

import sparsify
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import GRAM, NORM
from sparsify.model.walk import Walk
from sparsify.pruners.sparsegpt import _captured_walk, eliminate, eliminate_replayed, inverse_factor
from sparsify.types import Target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NEEDS = frozenset({NORM, GRAM})


def walked(model, tokens, monkeypatch, graphs):
    monkeypatch.setattr(Walk, "_repeats", (lambda self, block: True) if graphs else (lambda self, block: False))
    walk, stats = Walk(BlockView(model), tokens, 1), {}
    for block in range(len(walk.view.blocks)):
        stats |= walk.observe(block, NEEDS)
        walk.advance(block)
    return walk.hidden, stats


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_graphs_give_what_eager_calls_give(family, monkeypatch):
    model = FAMILIES[family].build(torch.bfloat16).cuda()
    tokens = torch.randint(3, 90, (9, 11))
    eager, stats = walked(model, tokens, monkeypatch, graphs=False)
    replayed, again = walked(model, tokens, monkeypatch, graphs=True)
    torch.testing.assert_close(replayed, eager)
    for name in stats:
        torch.testing.assert_close(again[name].square, stats[name].square)
        torch.testing.assert_close(again[name].gram, stats[name].gram)


@pytest.mark.parametrize("target", [None, Target(0.5, 2, 4)])
def test_the_replayed_column_loop_equals_the_eager_one(target):
    x = torch.randn(500, 128, device="cuda")
    upper = inverse_factor(x.T @ x, 0.01).upper
    for _ in range(2):  # the second call replays what the first captured
        one = torch.randn(300, 128, device="cuda")
        two, mask = one.clone(), torch.rand_like(one) > 0.7
        again = mask.clone()
        assert torch.equal(eliminate(one, upper, mask, target), eliminate_replayed(two, upper, again, target))
        assert torch.equal(one, two)
        assert torch.equal(mask, again)
    assert _captured_walk(one.shape, one.device, target and (target.kept, target.group)) is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("allocator", ["owl", ("equimarginal", {"steps": 3, "settle_every": 2})])
def test_a_model_over_two_devices_is_pruned_as_on_one(pruner, allocator):
    tokens, heldout = torch.randint(3, 90, (9, 11)), torch.randint(3, 90, (4, 11))
    whole = FAMILIES["llama"].build().cuda()
    spread = FAMILIES["llama"].build()
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
    places |= {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    spread = dispatch_model(spread, places)
    results = [
        sparsify.prune(model, tokens, pruner=pruner, allocator=allocator, sparsity=0.6, heldout=heldout)
        for model in (whole, spread)
    ]
    assert len({layer.weight.device for layer in BlockView(spread).layers}) == 2
    assert results[0].sparsity == results[1].sparsity
    assert [row.zeros for row in results[0].layers] == [row.zeros for row in results[1].layers]
    assert sparsify.perplexity(spread, heldout) == pytest.approx(sparsify.perplexity(whole, heldout), rel=1e-4)
