"""A layer's least-squares problem: a weight, inputs, and their Gram matrix."""

import torch

from sparsify.model.statistics import GRAM, Accumulator


def stats_of(x):
    """Statistics of one window of tokens, [tokens, inputs]."""
    accumulator = Accumulator(frozenset({GRAM}))
    accumulator.fold(x[None], 1)
    return accumulator.finalise(1)


def draw(rows, inputs, tokens, seed=0):
    """A weight, and correlated inputs of unequal sizes."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) * torch.rand(inputs)
    return torch.randn(rows, inputs), x
