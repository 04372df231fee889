"""What only an accelerator can show."""

import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES

import sparsify
from sparsify.data.examples import Examples
from sparsify.methods.tuning import _in_single
from sparsify.model.blocks import BlockView
from sparsify.model.statistics import GRAM, NORM
from sparsify.model.walk import Walk
from sparsify.pruners.sparsegpt import _captured_walk, eliminate, eliminate_replayed, inverse_factor
from sparsify.recovery import lowrank, passes, training
from sparsify.recovery.adapters import Adapters
from sparsify.recovery.schedule import Schedule
from sparsify.recovery.teacher import dense_copy
from sparsify.recovery.training import Trainer
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_the_kernel_makes_the_weight_that_torch_makes(dtype, transposed, base, monkeypatch):
    pytest.importorskip("triton")
    assert lowrank.has_kernel(torch.device("cuda", 0))
    torch.set_float32_matmul_precision("highest")
    for rank, (out, inp) in ((1, (7, 300)), (12, (4096, 11008)), (20, (130, 65))):
        weight = torch.randn((inp, out) if transposed else (out, inp), device="cuda")
        weight = torch.where(torch.rand_like(weight) < 0.7, 0, weight).to(dtype)
        weight = weight.T if transposed else weight
        a, b = torch.randn(rank, inp, device="cuda"), torch.randn(out, rank, device="cuda")
        fused = lowrank.effective_weight(weight, a, b, 2.0, base=base)
        with monkeypatch.context() as patch:
            patch.setattr(lowrank, "has_kernel", lambda device: False)
            plain = lowrank.effective_weight(weight, a, b, 2.0, base=base)
        assert fused.stride() == plain.stride() == weight.stride()
        assert not fused[weight == 0].any()
        eps = torch.finfo(dtype).eps  # an entry may be rounded the other way where sums are in another order
        assert (fused - plain).abs().max() <= 4 * eps * plain.abs().max()
        assert (fused.float() - plain.float()).norm() <= 4 * eps * plain.float().norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_merge_and_unmerge_to_the_bit(family):
    model = FAMILIES[family].build(torch.bfloat16).cuda().requires_grad_(False)
    view = BlockView(model)
    for layer in view.layers:
        layer.weight[torch.rand(layer.weight.shape, device="cuda") < 0.7] = 0
    before = [layer.weight.clone() for layer in view.layers]
    tokens = torch.randint(3, 90, (2, 11), device="cuda")
    with Adapters(view, 12, 16) as adapters:
        optimiser = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            optimiser.zero_grad()
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        adapters.merge()
        assert all(torch.equal(x.weight == 0, w == 0) for x, w in zip(view.layers, before, strict=True))
        adapters.unmerge()
        assert all(torch.equal(x.weight, w) for x, w in zip(view.layers, before, strict=True))


class Trained:
    """Adapters and all weights of one model, trained with and without captured passes."""

    text = Examples(tuple(torch.arange(3, 3 + n) for n in (9, 30, 17, 32, 12, 25, 20, 31)), (1,) * 8)

    def adapters(self, model):
        view = BlockView(model)
        with Adapters(view, 2, 4) as adapters:
            trainer = Trainer(view, adapters.parameters(), Schedule(batch=2, dropout=0.0, rate=1e-2, epochs=4), 16)
            losses = trainer.run(self.text, 0)
            adapters.merge()
            adapters.unmerge()
            adapters.set_ranks(3)  # what was captured goes on
            trainer.restart(16)
            losses += trainer.run(self.text, 1)
            return losses, trainer

    def weights(self, model):
        view = BlockView(model)
        teacher = dense_copy(view, {layer.spec.name: layer.weight * 1.5 for layer in view.layers})
        with _in_single(view) as parameters:
            schedule = Schedule(batch=2, distill=1.0, rate=1e-3, epochs=4)
            trainer = Trainer(view, parameters, schedule, 16, dense=teacher)
            return trainer.run(self.text, 0), trainer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["adapters", "weights"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_by_replayed_passes_is_training(family, what, dtype, monkeypatch):
    runs = []
    monkeypatch.setattr(passes, "SHORTEST", 8)  # samples of several sizes
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            if not allowed:
                patch.setattr(training, "replays", lambda view: False)
            losses, trainer = getattr(Trained(), what)(FAMILIES[family].build(getattr(torch, dtype)).cuda())
        runs.append(losses)
        assert (trainer.passes is not None) == allowed
        if allowed:
            assert all(replay is not None for replay in trainer.passes._replays.values())
    assert len(runs[0]) == len(runs[1])
    assert runs[0] == pytest.approx(runs[1], rel=1e-3 if dtype == "float32" else 0.03)
    assert min(runs[0][-4:]) < runs[0][0]
