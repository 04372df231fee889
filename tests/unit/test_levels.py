"""Levels of N:M on a whole model: by rank for pruners that rank, from a store for those that update weights."""

import psutil
import pytest
import torch

from sparsify.data.inputs import as_inputs
from sparsify.errors import UsageError
from sparsify.methods.blockwise import BlockwisePruning
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken
from sparsify.pruners import sparsegpt
from sparsify.pruners.magnitude import Magnitude
from sparsify.pruners.ria import RIA
from sparsify.pruners.sparsegpt import SparseGPT
from sparsify.pruners.wanda import Wanda
from sparsify.search.levels import LevelStore, level_proxy
from sparsify.search.proxy import Proxy
from sparsify.search.ranks import RankProxy, group_ranks
from sparsify.types import Ledger, SparsityPlan, Target


@pytest.fixture
def view(make_model):
    return BlockView(make_model())


def opened(view, tokens, pruner, group, levels, place="memory"):
    return level_proxy(view, view.snapshot(), as_inputs(tokens), NextToken(), pruner, group, levels, place)


def plan_of(view, kept, group):
    """Every layer its own N, starting from `kept`."""
    names = [layer.spec.name for layer in view.layers]
    counts = [(kept - 1 + i) % group + 1 for i in range(len(names))]
    return SparsityPlan(
        {x: Target(1 - n / group, n, group) for x, n in zip(names, counts, strict=True)}, Ledger(0.0, 0.0, 0.0, 0.0)
    )


def pruned(make_model, tokens, pruner, plan):
    """The weights that the pruner makes in the dense regime, batched as a proxy batches."""
    view = BlockView(make_model())
    BlockwisePruning(pruner, "dense", len(tokens)).apply(view, tokens, plan)
    return {layer.spec.name: layer.weight.clone() for layer in view.layers}


def same(view, weights):
    return all(torch.equal(layer.weight, weights[layer.spec.name]) for layer in view.layers)


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), RIA()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("group", [4, 8, 16])
def test_masks_by_rank_are_the_pruners_own_at_every_level(make_model, view, tokens, pruner, group):
    with opened(view, tokens, pruner, group, range(1, group + 1)) as proxy:
        assert isinstance(proxy, RankProxy)
        assert all(ranks.dtype == torch.int8 for ranks in proxy.ranks.values())
        for kept in range(1, group + 1, group // 4):  # every layer has another N, so all levels come up
            plan = plan_of(view, kept, group)
            proxy.apply(plan.targets)
            assert same(view, pruned(make_model, tokens, pruner, plan))


@pytest.mark.parametrize("pruner", [SparseGPT(), RIA(permute="deal"), RIA(permute="assign")], ids=str)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_store_has_what_the_pruner_makes_at_every_level(make_model, view, tokens, pruner, place):
    with opened(view, tokens, pruner, 8, range(1, 9), place) as proxy:
        assert isinstance(proxy, LevelStore)
        for kept in (1, 4, 7):  # every layer has another N, so all levels come up
            plan = plan_of(view, kept, 8)
            proxy.apply(plan.targets)
            assert same(view, pruned(make_model, tokens, pruner, plan))


def test_one_factorisation_serves_all_levels_and_layers_of_an_input(view, tokens, monkeypatch):
    calls, factor = [], sparsegpt.inverse_factor
    monkeypatch.setattr(sparsegpt, "inverse_factor", lambda *given: calls.append(1) or factor(*given))
    with opened(view, tokens, SparseGPT(), 8, [1, 2, 3, 4]):
        pass
    assert len(calls) == 2 * 4  # two blocks: q k v, o, gate up, down


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()])
def test_the_model_is_dense_afterwards_and_files_are_gone(view, tokens, pruner, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dense = view.snapshot()

    def interrupted():
        with opened(view, tokens, pruner, 8, [2, 3], "disk") as proxy:
            proxy.apply({layer.spec.name: Target(0.75, 2, 8) for layer in view.layers})
            assert view.sparsity() == pytest.approx(0.75)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not dense.changed()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_store_that_does_not_fit_is_refused_with_its_size_before_it_is_built(view, tokens, place, monkeypatch):
    needed = 3 * view.table.numel * 4
    free = type("Free", (), {"available": needed - 1, "free": needed - 1})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    monkeypatch.setattr(LevelStore, "_build", lambda self, allocate: pytest.fail("it was built"))
    with (
        pytest.raises(UsageError, match=f"{needed:,} bytes"),
        opened(view, tokens, SparseGPT(), 8, [1, 2, 3, 8], place),
    ):
        pass


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT()])
def test_only_layers_whose_level_changed_are_written(view, tokens, pruner, monkeypatch):
    plan = dict(plan_of(view, 2, 8).targets)
    with opened(view, tokens, pruner, 8, range(1, 9)) as proxy:
        proxy.apply(plan)
        written, write = [], type(proxy).write
        monkeypatch.setattr(type(proxy), "write", lambda self, layer, n: written.append(layer) or write(self, layer, n))
        proxy.apply(plan | {view.layers[3].spec.name: Target(0.5, 4, 8)})
        assert [layer.spec.name for layer in written] == [view.layers[3].spec.name]


def test_a_plan_of_another_pattern_is_refused(view, tokens):
    with opened(view, tokens, Wanda(), 8, [2]) as proxy:
        for target in (Target(0.5), Target(0.5, 2, 4)):
            with pytest.raises(UsageError, match="N of 8"):
                proxy.apply({layer.spec.name: target for layer in view.layers})


def test_both_kinds_are_proxies(view, tokens):
    for pruner in (Wanda(), SparseGPT()):
        with opened(view, tokens, pruner, 8, [2]) as proxy:
            assert isinstance(proxy, Proxy)


def test_ranks_within_groups_are_positions_leftmost_first():
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0, 0.0, 0.0, 5.0, -1.0]])
    assert group_ranks(scores, 4).tolist() == [[3, 0, 1, 2, 1, 2, 3, 0]]
