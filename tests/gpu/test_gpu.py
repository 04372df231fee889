"""What only an accelerator can show."""

import pytest
import torch
from families import FAMILIES

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
