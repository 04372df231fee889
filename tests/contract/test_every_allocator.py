"""What every allocator promises, found by the registry: a budget kept, the same plan twice, a model left dense."""

import copy
import json

import pytest
import torch

from sparsify.allocators.base import Allocator, allocate
from sparsify.allocators.context import Context
from sparsify.data.inputs import as_inputs
from sparsify.errors import PatternError
from sparsify.methods.job import Job
from sparsify.methods.losa import LoSA
from sparsify.model.blocks import BlockView
from sparsify.model.objective import NextToken
from sparsify.pruners.wanda import Wanda
from sparsify.recipe import Recipe, prune_model
from sparsify.recovery.schedule import Schedule
from sparsify.runs import menu, registry
from sparsify.types import Pattern

ALLOCATORS = registry.names("allocator")
IN_LOOP = ("similarity", "atp", "absorption")
"""Those that LoSA's loop is tested with every time."""
TOKENS = torch.randint(3, 96, (4, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model(make_model):
    """Weights that are far from zero, for rules that take their logarithm; blocks that differ."""
    model = make_model(num_hidden_layers=4)
    torch.manual_seed(3)
    for i, block in enumerate(model.model.layers):
        for weight in block.parameters():
            if weight.ndim == 2:
                weight.data = 0.2 * weight.data.sign() * (1 + torch.rand_like(weight) ** (1 + i))
    return model


@pytest.fixture
def built(model, tmp_path):
    """An allocator with the settings of the embedded scale; one that reads a file gets one."""

    def build(name, sparsity=0.5):
        node = copy.deepcopy(dict(menu.compose([f"allocator={name}"])["allocator"]))
        if "step" in node:
            node["step"] = 0.05  # of a grid that is fine for many blocks
        if node.get("file") == "???":
            file = tmp_path / "allocation.json"
            table = BlockView(model).table
            file.write_text(json.dumps({x.name: sparsity + 0.05 * (-1) ** x.block for x in table}))
            node["file"] = str(file)
        return registry.make(node)

    return build


def job_of(model, allocator, sparsity, pattern="unstructured"):
    tokens = as_inputs(TOKENS)
    return Job(
        view=BlockView(model),
        pruner=Wanda(),
        allocator=allocator,
        pattern=Pattern.parse(pattern),
        sparsity=sparsity,
        calibration=tokens,
        heldout=tokens,
        objective=NextToken(),
    )


def pattern_for(name):
    """A pattern that the allocator is for: unstructured, unless its YAML refuses that."""
    node = menu.compose([f"allocator={name}"])["allocator"]
    try:
        registry.check(node, 0.5, 4, Pattern())
    except PatternError:
        return "mixed:8"
    return "unstructured"


def tolerance(pattern, table):
    """Half a level of the largest block, where levels are whole."""
    group = Pattern.parse(pattern).group
    return max(table.block_numels()) / table.numel / group / 2 + 1e-9 if group else 1e-9


def mean_of(plan, table):
    return sum(plan.targets[x.name].sparsity * x.numel for x in table) / table.numel


def test_there_are_allocators():
    assert len(ALLOCATORS) >= 18
    assert all(issubclass(type(registry.build("allocator", n)), Allocator) for n in ALLOCATORS if n != "from_file")


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_keeps_the_budget_and_leaves_the_model_dense(name, sparsity, model, built):
    pattern = pattern_for(name)
    job = job_of(model, built(name, sparsity), sparsity, pattern)
    dense, flags = job.view.snapshot(), [p.requires_grad for p in model.parameters()]
    plan = job.plan(sparsity)
    assert list(plan.targets) == [layer.spec.name for layer in job.view.layers]
    assert mean_of(plan, job.view.table) == pytest.approx(sparsity, abs=tolerance(pattern, job.view.table))
    assert plan.ledger.wanted == sparsity
    assert not dense.changed()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    json.dumps([plan.notes, plan.trials, plan.to_rows()], allow_nan=False)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_gives_the_same_plan_twice(name, model, built):
    allocator = built(name)
    first, again = (job_of(model, allocator, 0.5, pattern_for(name)).plan(0.5) for _ in range(2))
    assert first.targets == again.targets


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_meets_a_pattern_to_within_a_level(name, model, built):
    job = job_of(model, built(name), 0.5, "mixed:8")
    plan, table = job.plan(0.5), job.view.table
    assert mean_of(plan, table) == pytest.approx(0.5, abs=max(table.block_numels()) / table.numel / 8)
    assert all(1 <= target.kept <= target.group == 8 for target in plan.targets.values())


@pytest.mark.parametrize("name", [n if n in IN_LOOP else pytest.param(n, marks=pytest.mark.slow) for n in ALLOCATORS])
def test_every_allocator_takes_its_place_in_the_loop_of_losa(name, model, built):
    allocate_in = "first" if name == "from_file" else "every"  # a file is of one sparsity
    schedule = Schedule(batch=2, rate=1e-2, warmup=0.0)
    method = LoSA(training=TOKENS, schedule=schedule, steps=2, allocate=allocate_in)
    view, pattern = BlockView(copy.deepcopy(model)), pattern_for(name)
    recipe = Recipe.of(Wanda(), built(name), method, pattern, 0.5)
    result = prune_model(view, as_inputs(TOKENS), recipe, heldout=as_inputs(TOKENS))
    assert mean_of(result.plan, view.table) == pytest.approx(0.5, abs=tolerance(pattern, view.table))
    assert result.sparsity == pytest.approx(0.5, abs=0.03)  # rows of 32 and 48 weights
    assert len(result.notes["loss"]) == 3


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_dense_model_needs_no_allocation(name, model, built):
    assert set(job_of(model, built(name), 0.0, pattern_for(name)).plan(0.0).sparsities().values()) == {0.0}


def test_a_rule_that_forgets_a_layer_is_refused(model):
    from sparsify.allocators.profile import Profile
    from sparsify.errors import BudgetError

    class Forgetful(Allocator):
        def profile(self, layers, sparsity, context):
            return Profile({layer.name: sparsity for layer in layers.layers[1:]})

    view = BlockView(model)
    with pytest.raises(BudgetError, match=view.layers[0].spec.name):
        allocate(Forgetful(), view.table, 0.5, Context(view, as_inputs(TOKENS)))
