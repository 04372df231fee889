"""Methods that loop, stages that follow, and what a job offers them."""

from dataclasses import dataclass, field, replace

import pytest
import torch

import sparsify
from sparsify.allocators.arithmetic import Arithmetic
from sparsify.data.inputs import as_inputs
from sparsify.errors import NumericsError
from sparsify.methods.base import Method, MethodResult, Stage, StageResult
from sparsify.methods.checkpoint import Checkpoint
from sparsify.methods.oneshot import OneShot
from sparsify.model.blocks import BlockView
from sparsify.model.masks import Masks
from sparsify.model.objective import NextToken
from sparsify.pruners.wanda import Wanda
from sparsify.recipe import Recipe, prune_model
from sparsify.types import Pattern


@dataclass(frozen=True)
class Gradual(Method):
    """Prune in steps, ask for a plan before each, nudge the survivors in between; go on where a killed run was."""

    steps: int = 3
    version: int = 1
    seen: list = field(default_factory=list, compare=False)

    def apply(self, view, job):
        masks, layers, plan = Masks(), [], None
        state = job.checkpoint.load() or {"step": 0, "weights": {}}
        for layer in view.layers:
            if layer.spec.name in state["weights"]:
                layer.write(state["weights"][layer.spec.name])
        for step in range(state["step"], self.steps):
            job.progress("step", step, self.steps)
            plan = job.plan(job.sparsity * (step + 1) / self.steps, changed=step > 0)
            layers = job.prune(plan, masks=masks)
            self.seen.append((step, plan.ledger.wanted, view.sparsity()))
            for layer in view.layers:
                layer.weight.mul_(1.001)
            weights = {layer.spec.name: layer.weight.clone() for layer in view.layers}
            job.checkpoint.save({"step": step + 1, "weights": weights})
        return MethodResult(plan, layers, masks, {"steps": self.steps})


@dataclass(frozen=True)
class Shift(Stage):
    """Add noise to the kept weights and to a norm."""

    name: str = "a"
    everywhere: bool = False
    seen: list = field(default_factory=list, compare=False)
    version: int = 1

    def apply(self, view, masks, job):
        self.seen.append((self.name, dict(masks)))
        for layer in view.layers:
            noise = 0.01 * torch.randn_like(layer.weight)
            layer.weight.add_(noise if self.everywhere else noise * masks[layer.spec.name])
        view.model.model.norm.weight.data.add_(1.0)
        return StageResult(masks, {"said": self.name})


def recipe(method=None, stages=None, sparsity=0.6, allocator=None):
    allocator = allocator or Arithmetic(0.1)
    return Recipe(Wanda(), allocator, method or OneShot(), Pattern(), sparsity, NextToken(), stages or {})


@pytest.fixture
def view(make_model):
    return BlockView(make_model())


@pytest.fixture
def inputs(tokens):
    return as_inputs(tokens)


@torch.no_grad()
def run(view, inputs, **options):
    return prune_model(view, inputs, recipe(**options))


def test_one_shot_is_a_plan_and_a_walk(view, inputs):
    result = run(view, inputs)
    assert result.sparsity == view.sparsity() == pytest.approx(0.6, abs=0.02)
    assert [row.name for row in result.layers] == [layer.spec.name for layer in view.layers]
    assert all(torch.equal(result.masks[x.spec.name], x.weight != 0) for x in view.layers)


def test_a_loop_asks_for_plans_again_and_again(view, inputs):
    method = Gradual()
    result = run(view, inputs, method=method)
    assert [(step, wanted) for step, wanted, _ in method.seen] == [(i, pytest.approx(0.2 * i + 0.2)) for i in range(3)]
    assert [sparsity for *_, sparsity in method.seen] == pytest.approx([0.2, 0.4, 0.6], abs=0.03)
    assert (result.plan.ledger.wanted, result.notes["steps"]) == (0.6, 3)


def test_a_search_inside_a_loop_comes_back_to_the_model_as_it_is(view, inputs):
    method = Gradual(2)
    allocator = Arithmetic("auto", step=0.3)
    result = prune_model(view, inputs, recipe(method=method, allocator=allocator), heldout=inputs)
    assert len(result.plan.trials) > 1
    assert [sparsity for *_, sparsity in method.seen] == pytest.approx([0.3, 0.6], abs=0.03)


def test_a_killed_loop_goes_on_to_the_same_weights(make_model, inputs, tmp_path, monkeypatch):
    whole = BlockView(make_model())
    prune_model(whole, inputs, recipe(method=Gradual()))
    killed, save = BlockView(make_model()), Checkpoint.save

    def deadly(self, state):
        save(self, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", deadly)
    with pytest.raises(KeyboardInterrupt):
        prune_model(killed, inputs, recipe(method=Gradual()), checkpoint=Checkpoint(tmp_path))
    monkeypatch.setattr(Checkpoint, "save", save)
    again, method = BlockView(make_model()), Gradual()
    prune_model(again, inputs, recipe(method=method), checkpoint=Checkpoint(tmp_path))
    assert [step for step, *_ in method.seen] == [2]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(whole.layers, again.layers, strict=True))


def test_a_checkpoint_without_a_folder_keeps_nothing():
    checkpoint = Checkpoint()
    checkpoint.save({"step": 1})
    assert checkpoint.load() is None


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"x": torch.ones(2)})
    assert torch.equal(checkpoint.load()["x"], torch.ones(2))
    checkpoint.file.write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="set aside"):
        assert checkpoint.load() is None
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.damaged.pt"]
    checkpoint.clear()


def test_stages_run_in_order_and_hand_the_masks_on(view, inputs):
    seen = []
    stages = {"recovery": Shift("first", seen=seen), "quantiser": Shift("second", seen=seen)}
    result = run(view, inputs, stages=stages)
    assert [name for name, _ in seen] == ["first", "second"]
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in result.masks)
    assert (result.notes["recovery.said"], result.notes["quantiser.said"]) == ("first", "second")
    assert all(not layer.weight[~result.masks[layer.spec.name]].any() for layer in view.layers)


def test_a_stage_that_brings_zeros_back_is_refused(view, inputs):
    with pytest.raises(NumericsError, match="no longer zero"):
        run(view, inputs, stages={"recovery": Shift(everywhere=True)})


def test_restoring_undoes_a_stage(view, inputs):
    dense = view.snapshot()
    run(view, inputs, stages={"recovery": Shift()})
    assert "model.norm.weight" in dense.changed()
    view.restore(dense)
    assert not dense.changed()


def test_the_seed_decides_what_a_stage_draws_and_the_callers_stays(make_model, inputs):
    weights = []
    for seed in (1, 1, 2):
        view = BlockView(make_model())
        torch.manual_seed(7)
        prune_model(view, inputs, recipe(stages={"recovery": Shift()}), seed=seed)
        weights.append(view.layers[0].weight.clone())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_library_call_takes_stages_as_objects(make_model, tokens):
    seen = []
    result = sparsify.prune(make_model(), tokens, sparsity=0.5, recovery=Shift(seen=seen))
    assert len(seen) == 1
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_job_scores_the_model_as_it_is(view, inputs):
    scores = []

    @dataclass(frozen=True)
    class Scored(Method):
        version: int = 1

        def apply(self, view, job):
            scores.append(job.score())
            result = OneShot().apply(view, job)
            scores.append(job.score())
            return replace(result, notes={})

    prune_model(view, inputs, recipe(method=Scored()), heldout=inputs)
    assert scores[1] == pytest.approx(sparsify.perplexity(view.model, inputs)) != scores[0]
