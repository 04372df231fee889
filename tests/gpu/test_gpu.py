"""What only an accelerator can show."""

import pytest
import torch
from families import FAMILIES

from sparsify.blocks import BlockView
from sparsify.pruners.sparsegpt import eliminate, eliminate_at_once, inverse_factor
from sparsify.stream import Walk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NEEDS = frozenset({"norm", "gram"})


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


def test_eliminating_at_once_equals_the_column_loop():
    x = torch.randn(500, 128, device="cuda")
    upper = inverse_factor(x.T @ x, 0.01).upper
    slab = torch.randn(300, 128, device="cuda")
    mask = torch.rand_like(slab) > 0.7
    one, two = slab.clone(), slab.clone()
    torch.testing.assert_close(eliminate(one, upper, mask.clone()), eliminate_at_once(two, upper, mask, rows=128))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
