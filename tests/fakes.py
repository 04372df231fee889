"""One stand-in for the context of allocators: weights and inputs that a test can follow by hand."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from sparsify.allocators.context import Context
from sparsify.data.inputs import TokenInputs
from sparsify.model.objective import NextToken
from sparsify.model.statistics import Accumulator
from sparsify.types import Pattern


class FakeContext(Context):
    """A dense model that is a dict of weights and of inputs, [tokens, inp]; scores are any function of a plan.

    Args:
        table: its layers.
        weight: makes the matrix of a layer.
        score: held-out score of a plan.
        proxy: what trials of a search run on.
    """

    def __init__(self, table, *, weight=None, score=None, proxy=None, seed=0):
        self.table, self._score, self._proxy = table, score, proxy
        weight = weight or (lambda x: torch.randn(x.out_features, x.in_features) * (1 + 0.5 * x.block))
        torch.manual_seed(1)
        self.tensors = {x.name: weight(x) for x in table}
        self.inputs = {x.name: torch.randn(40, x.in_features) * torch.rand(x.in_features) for x in table}
        self.features = [torch.randn(2, 9, 6) for _ in range(table.num_blocks)]
        self.calibration = self.heldout = TokenInputs(torch.zeros(5, 4, dtype=torch.long))
        self.seed, self.memo, self.pattern, self.pruner = seed, {}, Pattern(), None
        self.batch_size, self.objective, self.checkpoint = None, NextToken(), None
        self.reported, self.scored = [], []

    def progress(self, phase, done, total):
        assert 0 <= done <= total
        self.reported.append((phase, done, total))

    def weights(self):
        return self.tensors

    def stats_by_block(self, needs):
        for block in range(self.table.num_blocks):
            yield {x.name: self._stats(self.inputs[x.name], needs) for x in self.table if x.block == block}

    def _stats(self, x, needs):
        accumulator = Accumulator(needs)
        accumulator.fold(x, 1)
        return accumulator.finalise(1)

    def walk(self, samples=None):
        """The features, one block's after the other's."""
        walk = SimpleNamespace(hidden=self.features[0][:samples], view=SimpleNamespace(blocks=self.features))

        def advance(block):
            walk.hidden = self.features[(block + 1) % len(self.features)][:samples]

        walk.advance = advance
        return walk

    def score(self, plan):
        self.scored.append(plan)
        return self._score(plan)

    @contextmanager
    def proxy(self, samples, pattern=None):
        yield self._proxy


@dataclass
class FakeProxy:
    """A model whose loss is known: the squared distance of a plan from the best one."""

    best: dict[str, float]
    settled: int = 0
    plan: dict[str, float] = field(default_factory=dict)

    def settle(self, targets):
        self.settled += 1
        self.apply(targets)

    def apply(self, targets):
        self.plan = {name: target.sparsity for name, target in targets.items()}

    def loss(self, inputs):
        return sum((self.plan[name] - value) ** 2 for name, value in self.best.items())

    def marginal_costs(self, inputs, band):
        return {name: 2 * (self.plan[name] - value) for name, value in self.best.items()}


def state_of(model):
    """What a model is besides its numbers: modules, hooks, replaced forwards, flags, gradients. Equal or changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (id(m), type(m), m.training, m.__dict__.get("forward"), [len(getattr(m, kind)) for kind in hooks])
        for name, m in model.named_modules()
    }
    tensors = {
        name: (id(x), x.requires_grad, x.grad is None)
        for name, x in [*model.named_parameters(), *model.named_buffers()]
    }
    return modules, tensors
